"""A run that was disturbed ends with the weights of one that was not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.system.harness import Run, gone, recipe_text


def test_paused_rolled_back_killed_and_resumed_ends_bit_for_bit_the_same(run: Run, undisturbed: Run, data: Path) -> None:
    run.start(recipe_text(data))
    run.wait_step(30)
    run.done("pause")
    saved = run.done("checkpoint").detail["checkpoint"]
    run.done("rollback", checkpoint=saved)
    run.done("resume")
    run.wait_step(80)
    run.kill(run.ranks()[1])
    run.wait(lambda s: s.generation == 2 and s.state == "training")
    run.wait_step(120)
    run.kill(run.controller())
    run.wait_step(180)
    run.kill(run.controller(), *run.agents(), *run.ranks())
    run.wait(lambda s: s.generation == 3)
    end = run.wait_state("finished", "failed", timeout=90)
    assert end.state == "finished", run.story()
    mine = {s.name: s.product for s in end.stages}
    theirs = {s.name: s.product for s in undisturbed.snapshot().stages}
    for stage in ("pretrain", "sft"):
        assert run.weights(mine[stage]) == undisturbed.weights(theirs[stage]), f"{stage}\n{run.story()}"
    losses, reference = run.rows("train/loss"), undisturbed.rows("train/loss")
    assert [(r.step, r.value) for r in losses] == [(r.step, r.value) for r in reference]


@pytest.mark.soak
def test_a_stopped_run_goes_on_where_it_was(run: Run, undisturbed: Run, data: Path) -> None:
    run.start(recipe_text(data))
    run.wait_step(40)
    stop = run.done("stop")
    assert gone([*run.ranks(), *run.agents()], 10)
    run.done("resume")
    end = run.wait_state("finished", timeout=90)
    assert stop.detail["checkpoint"].startswith(f"{stop.step}-")
    assert {s.name: s.product for s in end.stages}["sft"] == "320-1-sft", "a stop repeats no step, so it opens no lineage"
    assert run.weights("320-1-sft") == undisturbed.weights("320-1-sft")


@pytest.mark.soak  # what it does shorter tests do in parts
def test_release_gives_the_ranks_back_and_resume_brings_them_again(run: Run, undisturbed: Run, data: Path) -> None:
    run.start(recipe_text(data))
    run.wait_step(40)
    view = run.done("release")
    assert run.wait_state("released").step == view.step
    assert gone(run.ranks(), 10)
    assert run.command("checkpoint").state == "refused"
    run.done("resume")
    run.wait_state("finished", timeout=90)
    assert run.weights("320-1-sft") == undisturbed.weights("320-1-sft")


def test_a_crash_applies_the_settings_again_and_a_rollback_lists_them(run: Run, data: Path) -> None:
    run.start(recipe_text(data))
    run.wait_step(30)
    first = run.done("checkpoint").detail["checkpoint"]
    view = run.done("set", key="lr", value=1e-3)
    run.wait_step(view.step + 10)
    run.kill(run.ranks()[0])
    run.wait(lambda s: s.generation == 2 and s.state == "training")
    after_crash = run.wait(lambda s: s.step > view.step)
    assert after_crash.settings["lr"] == 1e-3
    run.done("rollback", checkpoint=first)
    after_rollback = run.wait(lambda s: "lr" in s.settings_asked)
    assert after_rollback.settings["lr"] == 3e-3
    assert after_rollback.settings_asked == {"lr": 1e-3}
