"""The disk of the journal errs, the disk of the checkpoints is away: real processes, and nothing is lost."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from midwatch.journal import entries as j
from tests.system.harness import Run, gone, recipe_text
from tests.system.preload import built


def checkpoints(run: Run) -> set[str]:
    return {d.name for d in (run.root / "checkpoints").iterdir() if not d.name.startswith(".")}


def kill_everything(run: Run) -> None:
    processes = [run.controller(), *run.agents(), *run.ranks(), *run.forks()]
    run.kill(*processes)
    assert gone(processes, 10)


@pytest.fixture
def disk(run: Run, tmp_path: Path) -> Path:
    """A file whose number is the error of each write to the run's journal."""
    file = tmp_path / "disk"
    file.write_text("0")
    run.environment = {**run.environment, "LD_PRELOAD": built("disk", tmp_path), "DISK_FILE": str(file)}
    return file


def test_a_journal_that_errs_while_checkpoints_are_written_costs_no_step_even_when_all_is_killed(
    run: Run, data: Path, disk: Path
) -> None:
    run.start(recipe_text(data, steps=100_000, every=20))
    run.wait(lambda s: len(s.checkpoints) >= 3)
    known = checkpoints(run)
    disk.write_text(str(errno.EIO))
    held = run.wait(lambda s: bool(s.faults) and s.state == "paused", 90)
    assert "Input/output error; the storage is at fault, not full" in held.faults[0]
    assert known <= checkpoints(run), "nothing is pruned while the records of newer ones are not durable"
    refused = run.midwatch("checkpoint", str(run.root))
    assert refused.returncode == 1 and "nothing can be journaled" in refused.stdout
    newest = max(int(name.split("-")[0]) for name in checkpoints(run))
    assert newest > max(int(name.split("-")[0]) for name in known), "the checkpoints of that time are there"
    kill_everything(run)
    disk.write_text("0")
    again = run.wait(lambda s: s.generation > held.generation and s.state == "training" and s.step > newest, 90)
    assert again.faults == ()
    began = [e for _, e in run.entries() if isinstance(e, j.GenerationBegan)]
    assert began[-1].checkpoint is not None and int(began[-1].checkpoint.split("-")[0]) == newest
    assert any(isinstance(e, j.CheckpointCommitted) and e.adopted for _, e in run.entries())
    run.done("stop-now")


def test_a_journal_that_can_be_written_again_lets_the_run_go_on_by_itself(run: Run, data: Path, disk: Path) -> None:
    run.start(recipe_text(data, steps=100_000, every=20))
    run.wait(lambda s: len(s.checkpoints) >= 1)
    disk.write_text(str(errno.ENOSPC))
    held = run.wait(lambda s: bool(s.faults) and s.state == "paused", 90)
    assert "free some space" in held.faults[0]
    disk.write_text("0")
    after = run.wait(lambda s: s.state == "training" and s.step > held.step + 5, 60)
    assert (after.generation, after.lineage, after.faults) == (1, 1, ())
    ledger = run.ledger()
    assert len(ledger.checkpoints) <= 4, "what was put off is deleted"
    run.done("stop-now")


def test_checkpoints_whose_storage_is_away_are_waited_for_and_taken_up_again(run: Run, data: Path, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        if os.environ.get("CI") == "true":
            pytest.fail("mounting needs root")
        pytest.skip("mounting needs root")
    run.start(recipe_text(data, steps=100_000, every=20))
    run.wait(lambda s: len(s.checkpoints) >= 3)
    golden = run.done("golden", checkpoint="latest").detail["checkpoint"]
    kill_everything(run)
    known = run.ledger().checkpoints
    empty = tmp_path / "empty"
    empty.mkdir()
    subprocess.run(["mount", "--bind", str(empty), str(run.root / "checkpoints")], check=True)
    try:
        waits = run.wait(lambda s: bool(s.faults), 60)
        assert "is the storage mounted?" in waits.faults[0] and all(c.missing for c in waits.checkpoints)
        assert {c.id for c in waits.checkpoints} == set(known)
        assert not run.ranks()
    finally:
        subprocess.run(["umount", str(run.root / "checkpoints")], check=True)
    newest = max(view.step for view in known.values())
    back = run.wait(lambda s: s.generation > waits.generation and s.state == "training" and s.step > newest, 90)
    assert back.faults == ()
    assert next(c for c in back.checkpoints if c.id == golden).golden
    assert all(e.undone < 60 for _, e in run.entries() if isinstance(e, j.LineageOpened)), "not from the beginning"
    run.done("stop-now")
