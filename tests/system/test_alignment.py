"""The recipe with a reward model, PPO and DPO, as an operator starts it; on the text that every machine has."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from tests.system.harness import Run

RECIPE = Path(__file__).parents[2] / "recipes" / "align.toml"


@pytest.mark.soak
def test_a_reward_model_and_dpo_tell_better_from_worse_and_ppo_writes_what_the_reward_model_likes(run: Run) -> None:
    done = run.midwatch("run", str(RECIPE), "--dir", str(run.root), "--headless", timeout=3000)
    assert done.returncode == 0, done.stdout[-2000:]
    assert run.midwatch("attach", str(run.root), "--headless").returncode == 0
    told = json.loads(run.midwatch("status", str(run.root), "--json").stdout.splitlines()[0])
    origins = {stage["name"]: stage.get("origin") for stage in told["stages"]}
    assert origins["ppo"] == origins["dpo"] == origins["reward"] == "920-1-sft"
    accuracy, reward = (series(run, f"eval/preferences/{name}") for name in ("accuracy_low", "reward"))
    # With 121 held-out pairs: the lower end of the interval in which the share of pairs told apart lies 19 times in 20.
    assert accuracy[980] > 0.5, "the reward model, over chance"
    assert accuracy[1160] > 0.5, "DPO, over chance"
    assert reward[1060] > reward[980] + 0.3, "on prompts that nothing was trained on"
    explained = series(run, "value/explained_variance")
    assert statistics.mean(explained[step] for step in range(1051, 1061)) > 0.5, "the value model foresees what responses score"


def series(run: Run, name: str) -> dict[int, float]:
    """By step."""
    told = run.midwatch("metrics", str(run.root), name).stdout.splitlines()
    return {int(words[words.index("step") + 1]): float(words[-1]) for words in (line.split() for line in told) if "step" in words}
