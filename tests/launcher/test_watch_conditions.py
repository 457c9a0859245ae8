"""Conditions of watch rules: Midwatch's by their own keys or by name, and those that another package brings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launcher.controller.core.watch_rules import WatchRules
from midwatch.protocol import Metrics
from midwatch.recipe import Recipe, RecipeError, Watch, dump_recipe, parse_recipe
from midwatch.recipe.watch_checks import condition_problems
from midwatch.watch_conditions import BUILT_IN, GROUP, ConditionError, make_condition
from tests.packages import install

PLATEAU = """
from midwatch.watch_conditions import Judgement, WatchCondition


class Plateau(WatchCondition):
    "The lowest value so far is so many steps old."

    steps: int

    def problems(self):
        return [] if self.steps > 0 else [("steps", "must be at least 1")]

    def judge(self):
        best = None

        def judge(step, value):
            nonlocal best
            if best is None or value < best[1]:
                best = (step, value)
            return Judgement(step - best[0] >= self.steps, f"no lower value for {step - best[0]} steps")

        return judge


class Broken(WatchCondition):
    def judge(self):
        return lambda step, value: 1 / 0
"""
RECIPE = """
[run]
name = "r"
[model]
num_layers = 1
hidden_size = 8
num_heads = 2
[[data.source]]
name = "text"
kind = "text"
origin = "stdlib-topics"
[[stage]]
name = "first"
objective = "pretrain"
steps = 50
context = 8
global_batch = 1
mixture = { text = 1.0 }
[[watch]]
name = "rule"
metric = "train/loss"
"""


def recipe(rule: str) -> Recipe:
    return parse_recipe(f"{RECIPE}{rule}\n")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that Python imports from, with a package that brings conditions."""
    entries = {"plateau": "plateau_rules:Plateau", "broken": "plateau_rules:Broken", "absent": "no_such_module:X"}
    place = install(tmp_path / "site", "plateau_rules", PLATEAU, GROUP, **entries, number="plateau_rules:GROUPLESS", text="os:name")
    monkeypatch.syspath_prepend(str(place))
    return place


def fired(watching: WatchRules, *values: float) -> None:
    for step, value in enumerate(values, 1):
        watching.see(Metrics(lineage=1, step=step, tokens=step, time=0.0, values={"train/loss": value}))


def watch(*rules: Watch) -> tuple[WatchRules, list[str]]:
    told: list[str] = []
    return WatchRules(rules, lambda rule, step, seen: told.append(f"{rule.name} at {step}: {seen.words('loss')}")), told


BY_NAME: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"above": 4.0}, {"name": "above", "value": 4}),
    ({"below": 4.0}, {"name": "below", "value": 4.0}),
    ({"not_finite": True}, {"name": "not_finite"}),
    ({"sigma": 3.0, "window": 3}, {"name": "sigma", "value": 3.0, "window": 3}),
    ({"change_above": 1.0, "over": 4}, {"name": "change_above", "value": 1.0, "over": 4}),
    ({"change_below": -1.0, "over": 4}, {"name": "change_below", "value": -1.0, "over": 4}),
    ({"ratio_above": 1.5, "over": 4}, {"name": "ratio_above", "value": 1.5, "over": 4}),
    ({"ratio_below": 0.5, "over": 4}, {"name": "ratio_below", "value": 0.5, "over": 4}),
]


@pytest.mark.parametrize(("keys", "condition"), BY_NAME, ids=[each["name"] for _, each in BY_NAME])
def test_midwatchs_conditions_are_the_same_by_key_and_by_name(keys: dict[str, Any], condition: dict[str, Any]) -> None:
    by_key, said = watch(Watch(name="r", metric="train/loss", cooldown=1, **keys))
    by_name, said_too = watch(Watch(name="r", metric="train/loss", cooldown=1, condition=condition))
    for watching in (by_key, by_name):
        fired(watching, 3, 3.1, 2.9, 3, 9, 9.5, 1, 0.5, 0.5, float("nan"), 3, 5)
    assert said and said == said_too
    assert set(BUILT_IN) == {each["name"] for _, each in BY_NAME}


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ("", "needs exactly one of above, below, sigma"),
        ('above = 1\ncondition = { name = "plateau" }', "needs exactly one of"),
        ("condition = { value = 4 }", 'recipe.toml:22: watch "rule": condition: needs the name of a condition'),
        ('condition = { name = "above" }', "missing required field `value`"),
        ('condition = { name = "above", value = "x" }', "Expected `float`, got `str`"),
        ('condition = { name = "above", value = nan }', "above: value must be a finite number"),
        ('condition = { name = "sigma", value = 1.0, window = 0 }', "sigma: window must be at least 1"),
        ('condition = { name = "sigma", value = 1.0, over = 9 }', "unknown field `over`"),
        ("sigma = 1\nwindow = 0", "window: must be at least 1"),
        ("above = inf", "above: must be a finite number"),
    ],
)
def test_a_condition_that_cannot_be_is_refused_with_its_line(rule: str, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(rule)
    assert says in str(error.value)


def test_another_packages_condition_watches(package: Path) -> None:
    made = recipe('condition = { name = "plateau", steps = 3 }\ncooldown = 2')
    assert parse_recipe(dump_recipe(made)).watch == made.watch
    assert list(condition_problems(made)) == []
    watching, said = watch(*made.watch)
    fired(watching, 5, 4, 4.5, 4.5, 4.5, 3)
    assert said == ["rule at 5: loss is 4.5, threshold: no lower value for 3 steps"]
    watching.forget()
    fired(watching, 5, 5, 5)
    assert len(said) == 1, "after a rollback it begins anew"


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        ('name = "dance"', 'there is no watch condition "dance" (there are: above, below, sigma'),
        (
            'name = "absent"',
            'watch condition "absent" of package plateau-rules cannot be loaded (no_such_module:X): ModuleNotFoundError',
        ),
        (
            'name = "number"',
            'watch condition "number" of package plateau-rules cannot be loaded (plateau_rules:GROUPLESS): AttributeError',
        ),
        ('name = "text"', "'text' is not a WatchCondition"),
        ('name = "plateau", steps = 0', "plateau: steps must be at least 1"),
        ('name = "plateau", stpes = 3', "plateau: Object contains unknown field `stpes`"),
    ],
)
def test_a_condition_that_is_not_there_stops_the_start_but_no_reading(package: Path, condition: str, says: str) -> None:
    made = recipe(f"condition = {{ {condition} }}")
    (problem,) = condition_problems(made)
    assert problem.startswith('watch "rule": condition: ') and says in problem


def test_two_packages_with_one_name_are_both_named(package: Path) -> None:
    install(package, "other_rules", PLATEAU, GROUP, plateau="other_rules:Plateau")
    with pytest.raises(ConditionError, match="in more than one package, package other-rules and package plateau-rules"):
        make_condition("plateau", {"steps": 1})


def test_a_broken_condition_ends_its_own_rule_alone(package: Path) -> None:
    named = {name: Watch(name=name, metric="train/loss", condition={"name": name}) for name in ("dance", "broken")}
    watching, said = watch(*named.values(), Watch(name="well", metric="train/loss", above=1.0))
    assert watching.broken[0][1].startswith('dance: the rule watches no more: there is no watch condition "dance"')
    fired(watching, 0.5, 2.0)
    assert [rule.name for rule, _ in watching.broken] == ["dance", "broken"]
    assert (
        watching.broken[1][1] == "broken: the rule watches no more: its condition has failed: ZeroDivisionError: division by zero"
    )
    assert said == ["well at 2: loss is 2, threshold: above 1"]


@pytest.mark.parametrize(
    ("action", "says"),
    [
        ("set lr_scale=0.5", ""),
        ("set beta=0.5", "no setting 'beta'"),
        ("set lr_scale=-1", "not between"),
        ("advance", "there is no such later stage (later ones: none)"),
        ("advance --to sft", "there is no such later stage"),
        ("golden", ""),
        ("rollback golden --skip 5", ""),
        ("stop --now", ""),
    ],
)
def test_a_rule_whose_command_could_never_apply_is_refused_with_its_line(action: str, says: str) -> None:
    def read() -> Recipe:
        return recipe(f'above = 1\naction = "{action}"')

    if not says:
        assert read().watch[0].command()
        return
    with pytest.raises(RecipeError) as error:
        read()
    assert f'recipe.toml:23: watch "rule": action: {action}: ' in str(error.value) and says in str(error.value)


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        ('action = "dance"', "dance: no such command"),
        ('action = "resume"', "a rule cannot give this command"),
        ('action = "set lr"', "VALUE is missing"),
        ('action = "rollback golden"\nskip = 3', "write them as --skip and --lr-scale"),
    ],
)
def test_an_action_that_is_no_command_is_refused_with_its_line(rule: str, says: str) -> None:
    with pytest.raises(RecipeError) as error:
        recipe(f"above = 1\n{rule}")
    assert 'recipe.toml:23: watch "rule": action: ' in str(error.value) and says in str(error.value)


def test_the_command_line_finds_the_package_and_names_what_is_broken(package: Path, tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    environment = os.environ | {"PYTHONPATH": str(package)}

    def check(condition: str) -> subprocess.CompletedProcess[str]:
        file.write_text(f"{RECIPE}condition = {{ {condition} }}\n")
        command = [sys.executable, "-P", "-m", "midwatch", "check", str(file)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    assert check('name = "plateau", steps = 3').returncode == 0
    done = check('name = "absent"')
    assert done.returncode == 2 and '"absent" of package plateau-rules cannot be loaded' in done.stderr
