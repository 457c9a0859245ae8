"""Kill -9 of each process, alone and together: the run goes on or is resumed by one command, and nothing committed is lost."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from midwatch.journal import entries as j
from tests.system.harness import Run, gone, recipe_text

LONG = {"steps": 3000, "every": 20}


def assert_contiguous(run: Run) -> None:
    """Along the surviving line each step was taken once, none was left out, and no sample was skipped or read twice."""
    steps = [row.step for row in run.rows("train/loss")]
    assert steps == list(range(1, len(steps) + 1)), run.story()


def assert_commands_took_effect_once(run: Run) -> None:
    ended = [e.number for _, e in run.entries() if isinstance(e, j.CommandEnded)]
    assert len(ended) == len(set(ended))


def test_a_killed_rank_is_recovered_from_whichever_it_is(run: Run, data: Path) -> None:
    run.start(recipe_text(data, **LONG))
    run.wait_step(25)
    for generation, rank in ((1, 0), (2, 1)):
        run.kill(run.ranks()[rank])
        before = run.wait(lambda s, g=generation: s.generation == g + 1 and s.state == "training")
        run.wait_step(before.step + 10)
    assert_contiguous(run)


@pytest.mark.soak
def test_a_rank_killed_ten_times_in_a_row_recovers_ten_times(run: Run, data: Path) -> None:
    run.start(recipe_text(data, **LONG))
    run.wait_step(5)
    for generation in range(1, 11):
        run.kill(random.choice(run.ranks()))
        before = run.wait(lambda s, g=generation: s.generation == g + 1 and s.state == "training")
        run.wait_step(before.step + 5)
    assert_contiguous(run)


def test_the_controller_killed_costs_no_step_and_no_command(run: Run, data: Path) -> None:
    run.start(recipe_text(data, **LONG))
    run.wait_step(10)
    golden = run.done("checkpoint").detail["checkpoint"]
    run.done("golden", checkpoint=golden)
    ranks = run.ranks()
    step = run.snapshot().step
    run.kill(run.controller())
    time.sleep(3)
    after = run.wait(lambda s: s.term == 2 and s.state == "training")
    assert after.generation == 1 and [r.pid for r in run.ranks()] == [r.pid for r in ranks], "the ranks were not restarted"
    assert run.wait_step(step + 10).step > step
    assert next(c for c in after.checkpoints if c.id == golden).golden
    run.done("pause")
    run.done("resume")
    assert_contiguous(run)
    assert_commands_took_effect_once(run)


def test_an_agent_killed_leaves_no_orphan_training(run: Run, data: Path) -> None:
    run.start(recipe_text(data, **LONG))
    run.wait_step(25)
    ranks = run.ranks()
    run.kill(*run.agents())
    assert gone(ranks, 5), "ranks outlived their agent"
    again = run.wait(lambda s: s.generation == 2 and s.state == "training")
    run.wait_step(again.step + 10)
    assert_contiguous(run)


@pytest.mark.soak  # what it does shorter tests do in parts
def test_everything_killed_at_once_is_resumed_by_one_command(run: Run, data: Path) -> None:
    run.start(recipe_text(data, **LONG))
    run.wait_step(45)
    run.done("checkpoint")
    committed = set(run.ledger().checkpoints)
    run.kill(run.controller(), *run.agents(), *run.ranks())
    assert run.midwatch("status", str(run.root)).returncode == 0
    again = run.wait(lambda s: s.generation == 2 and s.state == "training")
    assert committed - {e.id for _, e in run.entries() if isinstance(e, j.CheckpointPruned)} <= {c.id for c in again.checkpoints}
    run.wait_step(again.step + 10)
    assert_contiguous(run)


def test_a_rank_killed_during_a_checkpoint_a_rollback_and_a_stage_change(run: Run, data: Path) -> None:
    run.start(recipe_text(data, steps=400, sft_steps=3000, every=20))
    run.wait_step(30)
    saved = run.done("checkpoint").detail["checkpoint"]
    run.done("golden", checkpoint=saved)
    for verb, arguments in (("checkpoint", {}), ("rollback", {"checkpoint": saved}), ("advance", {})):
        generation = run.snapshot().generation
        reply = run.midwatch("--version")  # lets the controller breathe between two blows
        assert reply.returncode == 0
        run.midwatch(verb, str(run.root), *arguments.values(), "--no-wait")
        run.kill(run.ranks()[1])
        again = run.wait(lambda s, g=generation: s.generation > g and s.state == "training")
        run.wait_step(again.step + 5)
        run.wait(lambda s: all(c.state not in ("queued", "sent") for c in s.commands))
    assert {c.verb: c.state for c in run.ledger().commands.values()} == {
        "checkpoint": "done",
        "golden": "done",
        "rollback": "done",
        "advance": "done",
    }, run.story()
    run.wait(lambda s: s.stage == "sft")
    assert_contiguous(run)
    assert_commands_took_effect_once(run)


@pytest.mark.soak
def test_the_ranks_end_when_agent_and_controller_are_gone_for_good(run: Run, data: Path) -> None:
    run.start(recipe_text(data, **LONG))
    run.wait_step(5)
    ranks = run.ranks()
    run.kill(run.controller(), *run.agents())
    assert gone(ranks, 5)


@pytest.mark.soak
def test_a_controller_stopped_for_a_while_misses_nothing(run: Run, data: Path) -> None:
    run.start(recipe_text(data, **LONG))
    run.wait_step(10)
    controller = run.controller()
    controller.send_signal(signal.SIGSTOP)
    time.sleep(4)
    controller.send_signal(signal.SIGCONT)
    step = run.wait_step(60).step
    assert step >= 60
    assert_contiguous(run)


def test_a_hang_up_does_not_touch_the_run(run: Run, data: Path) -> None:
    run.start(recipe_text(data, **LONG))
    step = run.wait_step(5).step
    for process in (run.controller(), *run.agents(), *run.ranks()):
        if process.pid not in [r.pid for r in run.ranks()]:
            os.kill(process.pid, signal.SIGHUP)
    after = run.wait_step(step + 20)
    assert (after.term, after.generation) == (1, 1)


@pytest.mark.soak
def test_two_runs_side_by_side_do_not_meet(make_run: Callable[[str], Run], data: Path) -> None:
    one, other = make_run("one"), make_run("other")
    one.start(recipe_text(data, **LONG))
    other.start(recipe_text(data, **LONG))
    one.wait_step(5)
    one.done("stop")
    assert other.wait_step(20).state == "training"


@pytest.mark.soak
def test_the_process_that_forks_ranks_may_die_or_stand_still(run: Run, data: Path) -> None:
    run.start(recipe_text(data, **LONG))
    run.wait_step(5)
    (forks,) = run.forks()
    run.kill(forks)
    again = run.wait(lambda s: s.generation == 2 and s.state == "training")
    run.wait_step(again.step + 5)
    (forks,) = run.forks()
    forks.suspend()
    run.kill(run.ranks()[1])
    again = run.wait(lambda s: s.generation == 3 and s.state == "training")
    run.wait_step(again.step + 5)
    assert forks not in run.forks() and {r.parent() for r in run.ranks()} == set(run.forks()), "another has taken its place"
    assert_contiguous(run)
