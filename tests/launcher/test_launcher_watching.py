"""Watch rules over what goes wrong with policies: the guide's own rules, on series made to need them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from launcher.controller.core.watch_rules import WatchRules
from midwatch.protocol import Metrics
from midwatch.recipe import Recipe, Watch, dump_recipe, parse_recipe
from midwatch.recipe.watch import Condition

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
"""


def guide() -> Recipe:
    """The rules of the guide."""
    page = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    part = page.partition("### Rules for rollouts")[2].partition("\n## ")[0]
    return parse_recipe("\n".join([RECIPE, *re.findall(r"```toml\n(.*?)```", part, re.DOTALL)]))


def fired(rules: tuple[Watch, ...], values: Callable[[int], Mapping[str, float]], steps: int = 1200) -> dict[str, int]:
    """Each rule that fires, with the step of the first time."""
    found: dict[str, int] = {}
    watching = WatchRules(rules, lambda rule, step, seen: found.setdefault(rule.name, step) and None)
    for step in range(1, steps + 1):
        watching.see(Metrics(lineage=1, step=step, tokens=step, time=0.0, values=dict(values(step))))
    return found


Series = Callable[[int], float]


def course(**changed: Series) -> Callable[[int], dict[str, float]]:
    """A healthy PPO run, a rollout every 4 steps, an evaluation every 50; with some metrics another way."""
    random = np.random.default_rng(1)
    noise = random.normal(0, 1, (1300, 6))
    metrics: dict[str, Series] = {
        "policy_reward": lambda step: 0.5 + 0.001 * step + 0.05 * noise[step, 0],
        "policy_reward_std": lambda step: 0.9 + 0.03 * noise[step, 1],
        "policy_kl_sequence": lambda step: 3 + 0.2 * noise[step, 2],
        "policy_entropy": lambda step: 2.4 + 0.05 * noise[step, 3],
        "policy_truncated_fraction": lambda step: abs(0.02 * noise[step, 4]),
        "policy_ratio_outlier_fraction": lambda step: abs(0.002 * noise[step, 5]),
        "eval_questions_reward": lambda step: 0.5 + 0.001 * step,
    }
    metrics |= changed

    def at(step: int) -> dict[str, float]:
        found = {"train/loss": 1.0}
        for name, value in metrics.items():
            due = 50 if name.startswith("eval") else 1 if "ratio" in name else 4
            if step % due == 0:
                head, _, rest = name.partition("_")
                found[f"{head}/{rest.replace('questions_', 'questions/')}"] = value(step)
        return found

    return at


def late(before: float, after: float, since: int = 600) -> Series:
    return lambda step: before if step < since else after


def rising(before: float, slope: float, since: int = 600) -> Series:
    return lambda step: before + slope * max(0, step - since)


FLAT = rising(1.1, 0.0)
HACKED = {"policy_reward": rising(1.1, 0.003), "eval_questions_reward": FLAT, "policy_kl_sequence": rising(3, 0.01)}
WRONG: list[tuple[str, dict[str, Series], int, int]] = [
    # a rule, the metrics that go wrong from step 600 on, and between which steps it fires first
    ("entropy-collapse", {"policy_entropy": late(2.4, 0.8)}, 796, 800),
    ("far-from-reference", {"policy_kl_sequence": lambda step: 3 + 0.1 * (step % 3) + 2 * (step >= 600)}, 600, 600),
    ("cut-off", {"policy_truncated_fraction": late(0.0, 0.3)}, 616, 616),
    ("ratio", {"policy_ratio_outlier_fraction": late(0.0, 0.05)}, 602, 602),
    ("reward-spread", {"policy_reward_std": late(0.9, 0.9 * 3**0.5 * 1.01)}, 620, 660),
    (
        "hacking",
        {"policy_reward": rising(1.1, 0.003), "eval_questions_reward": FLAT, "policy_kl_sequence": rising(3, 0.01)},
        700,
        900,
    ),
]


@pytest.mark.parametrize(("name", "changed", "first", "last"), WRONG, ids=[each[0] for each in WRONG])
def test_the_guides_rules_fire_on_what_they_are_for(name: str, changed: dict[str, Series], first: int, last: int) -> None:
    found = fired(guide().watch, course(**changed))
    assert name in found and first <= found[name] <= last, found


def test_a_healthy_run_is_left_alone() -> None:
    quiet = fired(guide().watch, course())
    assert quiet.keys() <= {"far-from-reference"}, "three sigma of noise now and then"
    assert len(guide().watch) == len(WRONG)


@pytest.mark.parametrize(
    "changed",
    [
        HACKED | {"policy_reward": FLAT},
        HACKED | {"policy_kl_sequence": rising(3, 0.0)},
        HACKED | {"eval_questions_reward": rising(1.1, 0.003)},
    ],
    ids=["no reward", "no drift", "held-out rises too"],
)
def test_hacking_needs_all_three(changed: dict[str, Series]) -> None:
    assert "hacking" not in fired(guide().watch, course(**changed))


def test_rules_survive_the_recipe_of_the_run() -> None:
    recipe = guide()
    assert parse_recipe(dump_recipe(recipe)).watch == recipe.watch
    assert [other.metric for other in recipe.watch[-1].others] == ["eval/questions/reward", "policy/kl_sequence"]


TREND: list[tuple[dict[str, Any], Series, int | None]] = [
    ({"change_above": 1.0, "over": 40}, late(0.0, 2.0, 100), 105),
    ({"change_below": -1.0, "over": 40}, late(0.0, -2.0, 100), 105),
    ({"ratio_above": 3.0, "over": 40}, late(1.0, 4.0, 100), 106),
    ({"ratio_below": 0.5, "over": 40}, late(1.0, 0.1, 100), 105),
    ({"ratio_above": 1.5, "over": 40}, late(-1.0, -4.0, 100), None),
    ({"change_above": -1.0, "over": 40}, lambda step: float("nan"), None),
    ({"change_above": -1.0, "over": 40}, lambda step: 0.0, 31),
]


@pytest.mark.parametrize(("condition", "series", "step"), TREND, ids=[str(each[0]) for each in TREND])
def test_a_metric_is_compared_with_its_own_past(condition: dict[str, Any], series: Series, step: int | None) -> None:
    rule = Watch(name="trend", metric="x", **condition)
    found = fired((rule,), lambda at: {"x": series(at)}, 140)
    assert found.get("trend") == step


def test_what_fires_tells_every_value_and_a_rollback_forgets_them() -> None:
    rule = Watch(name="both", metric="x", above=1.0, others=(Condition(metric="y", below=0.0),), cooldown=1)
    told: list[str] = []
    watching = WatchRules((rule,), lambda _, step, seen: told.append(f"{step}: {seen.words('x')}"))

    def see(step: int, **values: float) -> None:
        watching.see(Metrics(lineage=1, step=step, tokens=1, time=0.0, values=values))

    see(1, x=2.0)
    see(2, y=-1.0)
    assert told == []
    see(3, x=3.0)
    assert told == ["3: x is 3, threshold: above 1; y is -1 (below 0)"]
    watching.forget()
    see(4, x=3.0)
    assert len(told) == 1


def test_what_is_wrong_with_a_rule_is_said_of_its_conditions_too() -> None:
    rule = Watch(name="n", metric="x", change_above=1.0, over=2, others=(Condition(metric="y"), Condition(metric="z", above=0.0)))
    problems = dict(rule.problems())
    assert problems.keys() == {"over", "and"} and problems["and"].startswith("y: metric: needs exactly one of above")
    assert msgspec.convert({"name": "n", "metric": "x", "above": 0.0}, Watch).problems() == []
