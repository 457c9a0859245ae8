"""Objectives as a recipe, the live settings and the plan see them: by their specs, and without torch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from test_launcher_recipe import GOOD, PREFERS, line_with

from midwatch.objectives import registry
from midwatch.objectives.registry import ObjectiveError, built_in, spec_of
from midwatch.objectives.setting import settings_of
from midwatch.recipe import RecipeError, Stage, dump_recipe, parse_recipe
from midwatch.recipe.live_settings import stage_settings
from midwatch.recipe.rollout import Rollout

ROOT = Path(__file__).parents[2]
COMPARED = re.compile(r"objective\"?\]?\)? (==|!=|in|not in) [\"(]")


def test_specs_bring_no_torch_along() -> None:
    code = "import sys; from midwatch.objectives.registry import built_in; built_in(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], cwd=ROOT).returncode == 0


def test_no_code_asks_for_an_objective_by_its_name() -> None:
    files = [file for package in ("midwatch", "trainer", "tui", "launcher") for file in (ROOT / package).rglob("*.py")]
    found = [f"{file.name}: {line}" for file in files for line in file.read_text().splitlines() if COMPARED.search(line)]
    assert found == []


@pytest.mark.parametrize("spec", built_in(), ids=lambda spec: spec.name)
def test_a_spec_is_whole(spec: registry.ObjectiveSpec) -> None:
    assert spec.summary.endswith(".") and spec.sources
    assert set(settings_of(spec.settings)) == set(spec.settings.__struct_fields__), "each key has a meaning"
    assert all(setting.help for setting in settings_of(spec.settings).values())
    assert set(spec.rollout) <= set(Rollout.__struct_fields__)
    spec.settings()  # each key has a default
    assert not {*spec.settings.__struct_fields__} & {*Stage.__struct_fields__}
    assert spec.implicit_reward is None or settings_of(spec.settings)[spec.implicit_reward].live is not None


@pytest.mark.parametrize(
    ("text", "key", "says"),
    [
        (GOOD, "beta = 0.1", 'beta: is for objective "dpo"'),
        (GOOD, "label_smoothing = 0.0", "label_smoothing: is for objective"),
        (GOOD, "reference_cached = true", "reference_cached: is for objective"),
        (GOOD, "margin = 1.0", 'margin: is for objective "reward", this stage\'s is "sft" .drop it'),
        (GOOD, "center_rewards = 0.01", "center_rewards: is for objective"),
        (GOOD, 'principles = ["Be brief."]', 'principles: is for objective "constitutional"'),
        (PREFERS, "margin = 1.0", "margin: is for objective"),
        (PREFERS, "beta = -1", "beta: must not be negative"),
        (PREFERS, "beta = inf", "beta: must not be negative, and finite"),
        (PREFERS, "beta = true", "beta: expected `float`, got `bool`, but it is "),
        (PREFERS, "label_smoothing = 1.5", "label_smoothing: must lie between 0 and 1"),
        (PREFERS, "label_smothing = 0.1", "unknown key 'label_smothing' .did you mean 'label_smoothing'"),
        (PREFERS, "settings = { beta = 0.2 }", "unknown key 'settings'"),
        (PREFERS.replace('"dpo"', '"reward"'), "margin = nan", "margin: must be finite"),
    ],
)
def test_a_key_is_checked_by_its_objective(text: str, key: str, says: str) -> None:
    changed = text.replace("lr = 1e-5", f"lr = 1e-5\n{key}")
    with pytest.raises(RecipeError, match=rf":{line_with(changed, key)}: .*{says}"):
        parse_recipe(changed)


@pytest.mark.parametrize(
    ("objective", "key", "says"),
    [
        ("grpo", "whiten = false", 'rollout.whiten: is for objective "ppo", this stage\'s is "grpo" .drop it'),
        ("grpo", "value_clip = 0.2", "rollout.value_clip: is for objective"),
        ("grpo", "kl_target = 6.0", "rollout.kl_target: is for objective"),
        ("ppo", 'advantage = "leave-one-out"', 'rollout.advantage: is for objective "grpo"'),
        ("rejection_sampling", "ratio_clip = 0.1", 'rollout.ratio_clip: is for objective "grpo" or "ppo"'),
        ("constitutional", "num_generations = 4", "rollout.num_generations: is for objective"),
    ],
)
def test_a_key_of_the_rollout_is_for_those_that_read_it(objective: str, key: str, says: str) -> None:
    more = '\nprinciples = ["Be brief."]' if objective == "constitutional" else ""
    fewest = "" if "num_generations" in key else ", num_generations = 4"
    table = f'rollout = {{ max_new_tokens = 8, function = "f.py:f", {key}{fewest} }}'
    changed = GOOD.replace('objective = "sft"', f'objective = "{objective}"').replace("lr = 1e-5", f"lr = 1e-5{more}\n{table}")
    with pytest.raises(RecipeError, match=rf":{line_with(changed, 'rollout')}: .*{says}"):
        parse_recipe(changed)


def test_a_stage_has_the_settings_of_its_objective_alone_and_writes_them_flat() -> None:
    recipe = parse_recipe(PREFERS.replace("lr = 1e-5", "lr = 1e-5\nbeta = 0.25"))
    first, second = recipe.stage
    assert "beta" not in stage_settings(recipe, first) and stage_settings(recipe, second)["beta"] == 0.25
    text = dump_recipe(recipe)
    assert "\nbeta = 0.25\n" in text and text.count("beta =") == 1 and "settings" not in text
    assert parse_recipe(text) == recipe and parse_recipe(text).digest() == recipe.digest()
    other = msgspec.structs.replace(second, objective="reward")
    assert other.settings == spec_of("reward").settings()


def test_an_unknown_objective_is_named_with_those_that_there_are() -> None:
    with pytest.raises(ObjectiveError, match=r'no objective "dop" .did you mean "dpo".* there are: .*grpo'):
        spec_of("dop")
