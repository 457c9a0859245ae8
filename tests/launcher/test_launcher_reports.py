"""A checkpoint is committed when the metrics up to its step are there, for its line will need them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from launcher_desk import Desk, desk_at, write_checkpoint

from launcher.controller.core.snapshot import SnapshotBuilder
from midwatch import protocol as p


@pytest.fixture
async def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        yield desk


def ready(desk: Desk, id: str, step: int) -> p.CheckpointReady:
    return desk.ready(id, step, write_checkpoint(desk.paths.checkpoints, f".writing-{id}", id, desk.ledger.generation))


async def test_a_checkpoint_waits_for_its_steps_row(desk: Desk) -> None:
    checkpoint = ready(desk, "c", 30)
    waiting = asyncio.create_task(desk.reports.rows_stored(checkpoint))
    await asyncio.sleep(1.3)
    assert not waiting.done(), "its row is on its way"
    for step in range(26, 31):
        desk.row(step)
    await asyncio.wait_for(waiting, 1)
    desk.says(checkpoint)
    assert "c" in desk.ledger.checkpoints


async def test_where_the_ranks_are_lost_before_its_row_came_it_is_not_committed(desk: Desk) -> None:
    checkpoint = ready(desk, "c", 30)
    waiting = asyncio.create_task(desk.reports.rows_stored(checkpoint))
    await asyncio.sleep(0.1)
    desk.ranks_die()
    await asyncio.wait_for(waiting, 1)
    desk.says(checkpoint)
    assert "c" not in desk.ledger.checkpoints, "the line goes on from one whose rows are known"


async def test_one_at_the_fork_of_its_line_needs_no_row_of_it(desk: Desk) -> None:
    view = desk.give("rollback", checkpoint="a")
    await desk.until(lambda: desk.orders)
    desk.answers(desk.orders[-1], step=10, lineage=2)
    assert desk.view(view).state == "done", desk.view(view).reason
    began = time.monotonic()
    await desk.reports.rows_stored(ready(desk, "d", 10))
    assert time.monotonic() - began < 0.5


async def test_a_later_stages_losses_go_from_what_it_found_before_its_first_step(desk: Desk) -> None:
    """The row of the same step and source is the end of the stage before it."""
    key = "eval/text/loss"
    desk.row(26, **{key: 3.0})
    desk.says(p.StageBorder(stage="first", event="end", step=26, stage_step=26, lineage=1, product="e"))
    desk.says(p.StageBorder(stage="second", event="begin", step=26, stage_step=0, lineage=1))
    desk.row(26, **{f"{key}_before": 5.0})
    desk.row(27)
    assert SnapshotBuilder(desk.context).snapshot().stages[-1].losses == {"text": (5.0, 5.0)}
    desk.row(30, **{key: 4.0})
    desk.row(36, **{key: 2.0})
    assert SnapshotBuilder(desk.context).snapshot().stages[-1].losses == {"text": (5.0, 2.0)}
