"""Talking to a run that trains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.system.harness import Run, gone, recipe_text


@pytest.mark.soak  # what it does shorter tests do in parts
def test_a_checkpoint_answers_while_training_goes_on_and_nothing_is_left_when_the_controller_dies(run: Run, data: Path) -> None:
    run.start(recipe_text(data, steps=20_000, every=25))
    run.wait(lambda s: bool(s.checkpoints))
    done = run.midwatch("probe", str(run.root), "--prompt", "import", "--limit", "8", "--json")
    assert done.returncode == 0, done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["type"] for each in told] == ["ProbeBegan", *["ProbeToken"] * (len(told) - 2), "ProbeEnd"]
    assert told[0]["stage"] == "pretrain" and told[0]["form"] == "text"
    step = run.snapshot().step
    probes = run._processes("trainer.probe")
    assert len(probes) == 1, "it waits for the next prompt"
    assert run.wait_step(step + 5).state == "training"
    run.kill(run.controller())
    assert gone(probes, 5)
    assert run.ranks(), "the ranks train on"
