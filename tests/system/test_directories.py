"""A live run's directory copied, moved or deleted: the copy never steers the original, and no process outlives its run."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.system.harness import Run, gone, recipe_text

LONG = {"steps": 100_000, "every": 20}
END_SECONDS = 20.0


def processes(run: Run) -> list[psutil.Process]:
    return [run.controller(), *run.agents(), *run.ranks(), *run.forks()]


def copy_of(run: Run, make_run: Callable[[str], Run]) -> Run:
    copy = make_run("copy")
    subprocess.run(["cp", "-r", str(run.root), str(copy.root)], check=False)  # files may vanish while it copies
    return copy


def test_a_copy_of_a_live_run_never_steers_the_original(run: Run, make_run: Callable[[str], Run], data: Path) -> None:
    run.start(recipe_text(data, **LONG))
    run.wait(lambda s: bool(s.checkpoints))
    copy = copy_of(run, make_run)
    for verb in (("pause",), ("stop",), ("rollback", "latest"), ("set", "max_grad_norm", "0.5")):
        done = copy.midwatch(verb[0], str(copy.root), *verb[1:])
        assert done.returncode != 0, done.stdout
        assert "copy" in done.stderr and f"midwatch resume {copy.root}" in done.stderr and str(run.root) in done.stderr
    seen = run.snapshot()
    assert seen.state == "training" and not seen.commands and seen.generation == 1

    done = copy.midwatch("resume", str(copy.root))
    assert done.returncode == 0, done.stdout + done.stderr
    assert copy.wait_state("training").generation == 2
    copy.wait_step(seen.checkpoints[0].step + 5)
    assert run.snapshot().state == "training" and run.snapshot().generation == 1
    assert {x.pid for x in run.agents()}.isdisjoint(x.pid for x in copy.agents())
    copy.done("stop")
    assert run.snapshot().state == "training"


def test_a_moved_run_ends_by_itself_and_goes_on_where_it_lies(run: Run, make_run: Callable[[str], Run], data: Path) -> None:
    run.start(recipe_text(data, **LONG))
    run.wait(lambda s: bool(s.checkpoints))
    old, before = run.root, processes(run)
    moved = make_run("moved")
    old.rename(moved.root)
    assert gone(before, END_SECONDS), [p for p in before if p.is_running()]
    assert not old.exists()
    assert "moved" in (moved.root / "logs" / "controller.log").read_text()
    done = moved.midwatch("resume", str(moved.root))
    assert done.returncode == 0, done.stdout + done.stderr
    now = moved.wait_state("training")
    moved.wait_step(now.step + 5)
    assert not old.exists()
    moved.done("stop")


def test_a_run_that_is_moved_and_resumed_at_once_goes_on(run: Run, make_run: Callable[[str], Run], data: Path) -> None:
    run.start(recipe_text(data, **LONG))
    run.wait(lambda s: bool(s.checkpoints))
    old, before = run.root, processes(run)
    moved = make_run("moved")
    old.rename(moved.root)
    done = moved.midwatch("resume", str(moved.root))
    assert done.returncode == 0, done.stdout + done.stderr
    now = moved.wait_state("training")
    moved.wait_step(now.step + 5)
    assert gone(before, 0.1) and not old.exists()
    moved.done("stop")


@pytest.mark.parametrize("controller", ["alive", "killed"])
def test_no_process_outlives_a_deleted_run_nor_makes_its_directory_again(run: Run, data: Path, controller: str) -> None:
    run.start(recipe_text(data, **LONG))
    run.wait_step(30)
    before = processes(run)
    if controller == "killed":
        run.kill(run.controller())
    deadline = time.monotonic() + END_SECONDS
    while run.root.exists() and time.monotonic() < deadline:
        shutil.rmtree(run.root, ignore_errors=True)  # whoever writes while it is deleted makes it fail
        time.sleep(0.05)
    assert gone(before, END_SECONDS), [p for p in before if p.is_running()]
    assert not run.root.exists()
