"""Damaged, booby-trapped and unwritable checkpoints: refused by name, run nothing, and the run trains on."""

from __future__ import annotations

import os
import pickle
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import Run, recipe_text

LONG = {"steps": 5000, "every": 1000}


def test_rolling_back_to_a_corrupted_checkpoint_is_refused_naming_the_file(run: Run, data: Path) -> None:
    run.start(recipe_text(data, **LONG))
    run.wait_step(5)
    saved = run.done("checkpoint").detail["checkpoint"]
    file = sorted((run.root / "checkpoints" / saved).glob("rank-*"))[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    view = run.command("rollback", checkpoint=saved)
    assert view.state == "refused" and str(file) in view.reason
    after = run.wait_step(run.snapshot().step + 10)
    assert (after.state, after.lineage, after.generation) == ("training", 1, 1)


class _Trap:
    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[object, tuple[str, ...]]:
        return os.system, (f"touch {self._mark}",)


def test_a_booby_trapped_checkpoint_runs_nothing(run: Run, data: Path, tmp_path: Path) -> None:
    run.start(recipe_text(data, **LONG))
    run.wait_step(5)
    saved = run.done("checkpoint").detail["checkpoint"]
    mark = tmp_path / "sprung"
    trap = pickle.dumps(_Trap(mark))
    directory = run.root / "checkpoints" / saved
    for name in (".metadata", "manifest.msgpack", *(f.name for f in directory.glob("rank-*"))):
        (directory / name).write_bytes(trap)
    view = run.command("rollback", checkpoint=saved)
    assert view.state == "refused" and "manifest.msgpack" in view.reason
    run.wait_step(run.snapshot().step + 5)
    assert not mark.exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of four megabytes."""
    if os.geteuid() != 0:
        if os.environ.get("CI") == "true":
            pytest.fail("mounting a small disk needs root")
        pytest.skip("mounting a small disk needs root")
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_leaves_the_older_checkpoints_whole_and_the_run_training(
    small_disk: Path, environment: dict[str, str], data: Path
) -> None:
    run = Run(small_disk / "run", environment)
    try:
        run.start(recipe_text(data, **LONG))
        run.wait_step(5)
        saved = run.done("checkpoint").detail["checkpoint"]
        fill = small_disk / "fill"
        with fill.open("wb") as file:
            try:
                while True:
                    file.write(bytes(65536))
                    file.flush()
            except OSError:
                pass
        view = run.command("checkpoint")
        assert view.state in ("failed", "refused"), run.story()
        run.wait(lambda s: any(e.level == "alarm" for e in s.events) or view.state == "refused")
        step = run.snapshot().step
        assert run.wait_step(step + 10).state == "training"
        fill.unlink()
        run.wait(lambda s: s.step > step + 20)
        again = run.done("checkpoint").detail["checkpoint"]
        rolled = run.done("rollback", checkpoint=saved)
        assert rolled.detail["step"] == int(saved.split("-")[0])
        assert (run.root / "checkpoints" / again).is_dir()
        assert [p.name for p in (run.root / "checkpoints").iterdir() if p.is_dir() and p.name.startswith(".")] == []
    finally:
        run.clear()


@pytest.mark.soak
def test_a_rollback_to_an_earlier_stage_rebuilds_it_in_place(run: Run, data: Path) -> None:
    run.start(recipe_text(data, steps=60, sft_steps=3000, every=20))
    run.wait(lambda s: s.stage == "sft" and s.step >= 65)
    ranks = [r.pid for r in run.ranks()]
    target = next(c.id for c in run.snapshot().checkpoints if c.stage == "pretrain" and not c.ended)
    run.done("pause")
    view = run.done("rollback", checkpoint=target)
    after = run.wait(lambda s: s.stage == "pretrain" and s.state == "paused")
    assert after.lineage == 2 and view.detail["step"] == int(target.split("-")[0])
    assert [r.pid for r in run.ranks()] == ranks, "no process was restarted"
    run.done("resume")
    run.wait(lambda s: s.stage == "sft" and s.step >= 65 and s.lineage == 2)
    steps = [row.step for row in run.rows("train/loss")]
    assert steps == list(range(1, len(steps) + 1))


def test_skipping_passes_over_exactly_so_many_batches(run: Run, data: Path) -> None:
    run.start(recipe_text(data, **LONG))
    run.wait_step(5)
    saved = run.done("checkpoint").detail["checkpoint"]
    run.done("rollback", checkpoint=saved, skip=7, lr_scale=0.5)
    later = run.done("checkpoint").detail["checkpoint"]
    before, after = run.state(saved), run.state(later)
    assert after["position"] - before["position"] == 16 * (after["step"] - before["step"] + 7)
    assert after["settings"]["lr_scale"] == 0.5


def test_a_crash_loop_ends_in_failed_and_a_rollback_brings_the_run_back(run: Run, data: Path) -> None:
    run.start(recipe_text(data, steps=5000, every=1000, restarts=1))
    run.wait_step(5)
    saved = run.done("checkpoint").detail["checkpoint"]
    model = data / "tokenizer.model"
    hidden = model.with_suffix(".hidden")
    model.rename(hidden)
    try:
        run.kill(run.ranks()[0])
        failed = run.wait_state("failed")
        assert "in a row" in failed.reason
        assert run.command("pause").state == "refused"
        assert run.done("set", key="lr", value=5e-4).detail["new"] == 5e-4
    finally:
        hidden.rename(model)
    run.done("rollback", checkpoint=saved, skip=2)
    after = run.wait(lambda s: s.state == "training" and s.step > int(saved.split("-")[0]))
    assert after.lineages[-1].cause == "rollback" and after.lineages[-1].skip == 2
