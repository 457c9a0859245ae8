"""Nothing is lost with the journal or the storage: not while it cannot be written, nor damaged, nor away for a while."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from pathlib import Path

import msgspec
import pytest
from launcher_desk import Desk, desk_at, make_recipe, write_checkpoint

from launcher.controller.core import recovery
from launcher.controller.core.events import CommandEnded, NodesToSpare
from launcher.controller.core.snapshot import SnapshotBuilder
from midwatch import protocol as p
from midwatch.checkpoint_format import directory as files
from midwatch.journal import entries as j
from midwatch.journal import journal as journal_module
from midwatch.journal.journal import Journal, JournalError, read_journal
from midwatch.recipe import Watch
from midwatch.run_directory import PUBLIC_FILE, Address, RunPaths, write_address
from shards.common.files import write_atomically


class Storage:
    """Makes the journal's disk fail and work again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch, self._write = monkeypatch, os.fsync

    def fails(self, number: int) -> None:
        def refused(handle: int) -> None:
            if os.readlink(f"/proc/self/fd/{handle}").endswith(".log"):
                raise OSError(number, os.strerror(number))
            self._write(handle)

        self._patch.setattr(journal_module.os, "fsync", refused)

    def works(self) -> None:
        self._patch.setattr(journal_module.os, "fsync", self._write)


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch) -> Storage:
    return Storage(monkeypatch)


def notes(desk: Desk, level: str = "alarm") -> list[str]:
    return [e.text for _, e in desk.journal.entries if isinstance(e, j.Noted) and e.level == level]


def there(desk: Desk) -> set[str]:
    return {d.name for d in desk.paths.checkpoints.iterdir()}


def messages(desk: Desk, kind: type[p.Message]) -> list[p.Message]:
    return [m for m in desk.rank if isinstance(m, kind)]


def flip(file: Path, what: bytes) -> None:
    """Damages each line that holds `what`."""
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(line.replace(what, what[:-1] + b"#") for line in lines))


# The journal cannot be written


@pytest.mark.parametrize(("number", "way"), [(errno.EIO, "the storage is at fault, not full"), (errno.ENOSPC, "free some space")])
async def test_while_nothing_can_be_journaled_nothing_is_pruned_acknowledged_or_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: Storage, number: int, way: str
) -> None:
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        command = desk.give("checkpoint")
        await desk.until(lambda: desk.orders)
        storage.fails(number)
        acknowledged = desk.reports.acknowledged()
        del desk.rank[:-1]
        for step in (26, 27, 28, 29, 30):
            desk.row(step)
            desk.saves(f"c{step}", step, numbers=(command.number,) if step == 26 else ())
        desk.dispatch.look()
        assert {"a", "b", "c26", "c27", "c28", "c29", "c30"} <= there(desk), "older ones are all that a restart would know"
        assert desk.reports.acknowledged() == acknowledged
        assert not messages(desk, p.Committed)
        shown = SnapshotBuilder(desk.context).snapshot()
        assert next(c for c in shown.commands if c.number == command.number).state == "sent"
        assert len(shown.faults) == 1 and way in shown.faults[0] and " at /" in shown.faults[0]
        with pytest.raises(JournalError, match=way):
            desk.give("pause")
        assert messages(desk, p.Hold) == [p.Hold(on=True)], "it has waited for longer than checkpoints are kept"

        storage.works()
        desk.context.retry_backlog()
        desk.dispatch.look()
        assert desk.reports.acknowledged() > acknowledged
        assert [m.id for m in messages(desk, p.Committed)] == ["c26", "c27", "c28", "c29", "c30"]  # type: ignore[attr-defined]
        assert messages(desk, p.Hold)[-1] == p.Hold(on=False)
        shown = SnapshotBuilder(desk.context).snapshot()
        assert shown.faults == ()
        assert next(c for c in shown.commands if c.number == command.number).state == "done"
        desk.saves("c31", 31)
        assert not {"a", "b", "c26"} & there(desk), "what was put off is done"


async def test_a_run_is_held_when_nothing_was_journaled_for_a_minute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: Storage
) -> None:
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        storage.fails(errno.EDQUOT)
        desk.says(p.Note(level="warning", text="x", step=25))
        desk.dispatch.look()
        assert not desk.dispatch.holding
        desk.context._unwritten_since -= 61.0
        desk.dispatch.look()
        assert desk.dispatch.holding
        assert "quota" in desk.context.journal_fault


async def test_a_client_that_waits_hears_that_a_command_is_done_when_that_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: Storage
) -> None:
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        ended: list[int] = []
        desk.context.events.subscribe(CommandEnded, lambda event: ended.append(event.entry.number))
        command = desk.give("pause")
        await desk.until(lambda: desk.orders)
        storage.fails(errno.EIO)
        desk.answers(desk.orders[-1], step=25)
        assert ended == []
        assert desk.context.as_durable(desk.view(command)).state == "sent"
        storage.works()
        desk.context.retry_backlog()
        assert ended == [command.number]


async def test_ranks_are_not_started_before_their_generation_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: Storage
) -> None:
    monkeypatch.setattr("launcher.controller.supervision.generations.STORAGE_SECONDS", 0.01)
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        storage.fails(errno.EIO)
        desk.ranks_die()
        await asyncio.sleep(0.05)
        assert len(desk.starts) == 1
        storage.works()
        desk.context.retry_backlog()
        await desk.until(lambda: len(desk.starts) == 2)
        assert (desk.starts[-1].generation, desk.starts[-1].checkpoint) == (2, "b")


async def test_checkpoints_that_could_not_be_journaled_are_found_by_the_next_controller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: Storage
) -> None:
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        storage.fails(errno.EIO)
        for step in (26, 27, 28, 29):
            desk.row(step)
            desk.saves(f"c{step}", step, suspect=step == 29)
    storage.works()
    async with desk_at(tmp_path / "run", monkeypatch) as desk:
        assert {"a", "b", "c26", "c27", "c28", "c29"} <= set(desk.ledger.checkpoints)
        assert desk.ledger.restart_point().id == "c28"
        assert desk.ledger.checkpoints["c29"].suspect
        assert any("c28 was not in the journal; it is complete" in text for text in notes(desk, "warning"))
        desk.agent_comes()
        desk.ranks_die()
        await desk.until(lambda: desk.starts)
        assert desk.starts[-1].checkpoint == "c28"


async def test_a_whole_checkpoint_that_nobody_committed_is_adopted_if_its_metrics_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranks that the controller did not hear any more have written it."""
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        desk.row(26)
        for step in (26, 27):
            write_checkpoint(desk.paths.checkpoints, f".g1-{step}-1", f"{step}-1", 1, step=step, stage_step=step)
        write_checkpoint(desk.paths.checkpoints, ".g1-28-1", "28-1", 1, step=28)
        (desk.paths.checkpoints / ".g1-28-1" / "data.bin").write_bytes(b"torn")
        desk.metrics.sync()
    async with desk_at(tmp_path / "run", monkeypatch) as desk:
        desk.agent_comes()
        desk.ranks_die()
        await desk.until(lambda: desk.starts)
        assert desk.starts[-1].checkpoint == "26-1"
        assert desk.ledger.checkpoints["27-1"].suspect, "nobody knows whether its loss was finite"
        assert "metrics of its step are not known" in desk.ledger.doubt(desk.ledger.checkpoints["27-1"])
        assert not [name for name in there(desk) if name.startswith(".g")]


# The journal is damaged


async def test_a_golden_checkpoint_stays_golden_though_each_mark_in_the_journal_is_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        desk.give("golden", checkpoint="a")
        assert files.is_golden(desk.paths.checkpoints, "a")
        journal = desk.paths.journal
    flip(journal / "000001.log", b"GoldenMarked")
    async with desk_at(tmp_path / "run", monkeypatch) as desk:
        assert desk.ledger.checkpoints["a"].golden
        assert any("a is golden by the mark in its directory" in text for text in notes(desk, "warning"))
        desk.rank_comes()
        for step in (30, 31, 32, 33):
            desk.saves(f"c{step}", step)
        assert "a" in there(desk)
        assert "b" not in there(desk)


async def test_a_mark_that_appears_under_the_controllers_hands_is_seen_before_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        (desk.paths.checkpoints / "a" / files.GOLDEN).touch()
        for step in (30, 31, 32):
            desk.saves(f"c{step}", step)
        assert "a" in there(desk) and desk.ledger.checkpoints["a"].golden
        assert "b" not in there(desk)


@pytest.mark.parametrize("damage", ["missing", "short", "newest missing"])
async def test_a_term_that_is_gone_is_an_alarm_and_no_number_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    root = tmp_path / "run"
    async with desk_at(root, monkeypatch, "training") as desk:
        first = desk.paths.journal / "000001.log"
    async with desk_at(root, monkeypatch) as desk:
        desk.agent_comes()
        desk.rank_comes()
        desk.phase("training", 25)
        desk.give("golden", checkpoint="a")
        desk.ranks_die()
        await desk.until(lambda: desk.starts)
        generation, command = desk.ledger.generation, desk.ledger.newest_command
        assert (generation, desk.context.term) == (2, 2)
        second = desk.paths.journal / "000002.log"
        write_address(desk.paths.address, Address(term=2, url="unix:x", host="h", pid=1, generation=2))
    if damage != "newest missing":
        async with desk_at(root, monkeypatch) as desk:
            assert desk.context.term == 3
    lost = first if damage == "missing" else second
    if damage == "short":
        os.truncate(lost, lost.stat().st_size // 2)
    else:
        lost.unlink()
    async with desk_at(root, monkeypatch) as desk:
        assert desk.context.term == (3 if damage == "newest missing" else 4)
        alarms = [text for text in notes(desk) if "commands, golden marks, rollbacks and settings" in text]
        assert len(alarms) == 1 and str(lost) in alarms[0]
        assert desk.ledger.generation >= generation
        assert desk.ledger.newest_command >= command
        assert set(desk.ledger.checkpoints) == {"a", "b"}, "what lies there whole is known again"
        desk.agent_comes()
        desk.ranks_die()
        await desk.until(lambda: desk.starts)
        assert desk.starts[-1].generation > generation and desk.starts[-1].checkpoint == "b"
    async with desk_at(root, monkeypatch) as desk:
        assert len([text for text in notes(desk) if "commands, golden marks" in text]) == 1, "it is raised once"


def test_a_term_file_that_is_put_back_counts_again(tmp_path: Path) -> None:
    first = Journal(tmp_path, 1.0, "h", 1)
    first.append(j.Noted(time=1.0, level="info", text="once"))
    first.close()
    Journal(tmp_path, 2.0, "h", 1).close()
    (tmp_path / "000001.log").rename(tmp_path / "away")
    Journal(tmp_path, 3.0, "h", 1).close()
    (tmp_path / "away").rename(tmp_path / "000001.log")
    again = Journal(tmp_path, 4.0, "h", 1)
    assert [e.text for _, e in again.entries if isinstance(e, j.Noted)] == ["once"]
    assert again.lost == []


# Checkpoints out of sight


async def test_storage_that_is_away_at_takeover_is_waited_for_and_nothing_is_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.controller.supervision.generations.STORAGE_SECONDS", 0.01)
    root = tmp_path / "run"
    async with desk_at(root, monkeypatch, "failed") as desk:
        desk.give("golden", checkpoint="a")
    (root / "checkpoints").rename(tmp_path / "elsewhere")
    async with desk_at(root, monkeypatch) as desk:
        desk.agent_comes()
        desk.generations.restart()
        await asyncio.sleep(0.1)
        assert not desk.starts, "not from the beginning"
        assert set(desk.ledger.checkpoints) == {"a", "b"}
        shown = SnapshotBuilder(desk.context).snapshot()
        assert all(c.missing for c in shown.checkpoints)
        assert "is the storage mounted?" in shown.faults[0] and "is the storage mounted?" in shown.reason
        shutil.rmtree(root / "checkpoints")
        (tmp_path / "elsewhere").rename(root / "checkpoints")
        await desk.until(lambda: desk.starts)
        assert desk.starts[-1].checkpoint == "b"
        assert desk.ledger.checkpoints["a"].golden
        assert SnapshotBuilder(desk.context).snapshot().faults == ()
        assert not [e for _, e in desk.journal.entries if isinstance(e, j.CheckpointPruned)]


async def test_one_that_is_out_of_sight_is_passed_over_and_used_again_when_it_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        place = desk.paths.checkpoints / "b"
        place.rename(tmp_path / "b")
        desk.ranks_die()
        await desk.until(lambda: len(desk.starts) == 2)
        assert desk.starts[-1].checkpoint == "a"
        assert any("b" in text and "used again when back" in text for text in notes(desk))
        (tmp_path / "b").rename(place)
        view = desk.give("rollback", checkpoint="b")
        desk.rank_comes()
        desk.phase("training", 10)
        await desk.until(lambda: desk.orders or desk.view(view).state != "queued")
        assert desk.orders[-1].arguments["checkpoint"] == "b"


async def test_nothing_out_of_sight_is_journaled_as_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        (desk.paths.checkpoints / "a").rename(tmp_path / "a")
        for step in (30, 31, 32, 33):
            desk.saves(f"c{step}", step)
        assert "a" in desk.ledger.checkpoints
        assert "b" not in desk.ledger.checkpoints


# What an operator may want to go back to


async def test_an_alarm_pins_the_last_good_checkpoint_before_it_and_marks_those_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe((Watch(name="spike", metric="train/loss", above=5.0),))
    async with desk_at(tmp_path / "run", monkeypatch, "training", recipe) as desk:
        desk.row(28, **{"train/loss": 9.0})
        for step in (30, 40, 50, 60, 70):
            desk.saves(f"c{step}", step)
        assert "b" in there(desk), "the last one before the spike"
        assert "a" not in there(desk)
        views = {c.id: c for c in SnapshotBuilder(desk.context).snapshot().checkpoints}
        assert views["b"].doubt == ""
        assert "after the alarm at step 28: spike: train/loss is 9" in views["c70"].doubt
        assert desk.ledger.restart_point().id == "c70", "a crash does not undo what an operator may well accept"
        assert "no rule may trust it" in desk.term._commits.mark("c70", True, "")
        desk.give("rollback", checkpoint="b")
        await desk.until(lambda: desk.orders)
        desk.answers(desk.orders[-1], step=20, lineage=2)
        desk.saves("d30", 30)
        assert desk.ledger.doubt(desk.ledger.checkpoints["d30"]) == "", "the alarm is of the line that was left"


async def test_what_a_rollback_undoes_is_kept_for_its_hours_and_can_be_gone_back_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    recipe = msgspec.structs.replace(recipe, checkpoint=msgspec.structs.replace(recipe.checkpoint, undone_hours=2.0))
    async with desk_at(tmp_path / "run", monkeypatch, "training", recipe) as desk:
        assert isinstance(desk.ledger.find("undone"), str)
        desk.saves("c", 30)
        desk.give("rollback", checkpoint="a")
        await desk.until(lambda: desk.orders)
        desk.answers(desk.orders[-1], step=10, lineage=2)
        for step in (11, 12, 13, 14):
            desk.saves(f"d{step}", step)
        assert {"b", "c"} <= there(desk)
        assert SnapshotBuilder(desk.context).snapshot().undone == "c"
        back = desk.give("rollback", checkpoint="undone")
        await desk.until(lambda: len(desk.orders) == 2)
        assert desk.orders[-1].arguments["checkpoint"] == "c"
        desk.answers(desk.orders[-1], step=30, lineage=3)
        assert desk.view(back).state == "done"
        assert {c.id for c in desk.ledger.checkpoints.values() if c.on_line} >= {"a", "b", "c"}
        desk.now += 3 * 3600
        desk.saves("e", 31)
        assert not {"d11", "d12", "d13", "d14"} & there(desk)


async def test_a_checkpoint_that_fails_verification_is_kept_and_trusted_again_when_it_can_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        file = desk.paths.checkpoints / "b" / "data.bin"
        whole = file.read_bytes()
        file.write_bytes(b"short")
        desk.ranks_die()
        await desk.until(lambda: len(desk.starts) == 2)
        assert desk.starts[-1].checkpoint == "a"
        assert "damaged" in desk.ledger.doubt(desk.ledger.checkpoints["b"])
        file.write_bytes(whole)
        assert await desk.term._commits.verify(desk.ledger.checkpoints["b"]) == ""
        assert desk.ledger.restart_point().id in ("a", "b")
        assert desk.ledger.doubt(desk.ledger.checkpoints["b"]) == ""


# Who may read it


def test_what_may_hold_secrets_is_for_the_owner_and_the_operators_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        own, shared = RunPaths(tmp_path / "own"), RunPaths(tmp_path / "shared")
        own.create()
        shared.create(os.getgid())
        for paths in (own, shared):
            Journal(paths.journal, 1.0, "h", 1).close()
            write_atomically(paths.metrics / "x", b"", PUBLIC_FILE)

        def mode(path: Path) -> str:
            return oct(path.stat().st_mode & 0o7777)

        assert [mode(d) for d in (own.journal, own.logs, own.samples)] == ["0o700"] * 3
        assert [mode(d) for d in (shared.journal, shared.logs, shared.samples)] == ["0o2750"] * 3
        assert mode(shared.journal / "000001.log") == "0o640"
        assert [mode(own.checkpoints), mode(own.metrics / "x")] == ["0o755", "0o644"]
        os.umask(0o077)
        write_atomically(own.metrics / "y", b"", PUBLIC_FILE)
        assert mode(own.metrics / "y") == "0o600"
    finally:
        os.umask(before)


# Storage that errs in other ways, and what meets in time


async def test_storage_that_errs_when_looked_at_is_no_end_of_the_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        real, successor = os.stat, str(desk.paths.journal / "000002.log")

        def stat(path: object, *more: object, **options: object) -> os.stat_result:
            if str(path) == successor:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            return real(path, *more, **options)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(journal_module.os, "stat", stat)
            desk.says(p.Note(level="warning", text="kept", step=25))
            assert "Stale file handle" in desk.context.journal_fault
        desk.context.retry_backlog()
        assert desk.context.journal_fault == ""
        desk.context.note("info", "and this")
        texts = [e.text for _, e in read_journal(desk.paths.journal).entries if isinstance(e, j.Noted)]
        assert texts[-1] == "and this" and texts.count("kept") == 1


async def test_a_rules_action_and_a_spare_node_wait_for_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: Storage
) -> None:
    recipe = make_recipe((Watch(name="spike", metric="train/loss", above=5.0, action="pause"),))
    async with desk_at(tmp_path / "run", monkeypatch, "training", recipe) as desk:
        storage.fails(errno.ENOSPC)
        desk.row(28, **{"train/loss": 9.0})
        desk.context.events.publish(NodesToSpare("n9"))
        assert not desk.orders
        storage.works()
        desk.context.retry_backlog()
        await desk.until(lambda: desk.orders)
        assert desk.orders[-1].op == p.Op.PAUSE


async def test_a_rollback_that_was_cancelled_while_every_byte_was_read_is_not_carried_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        read = asyncio.Event()

        async def slowly(view: p.CheckpointView) -> str:
            await read.wait()
            return ""

        monkeypatch.setattr(desk.term._commits, "verify", slowly)
        rollback = desk.give("rollback", checkpoint="a")
        await asyncio.sleep(0.01)
        assert desk.view(desk.give("cancel", id=rollback.id)).state == "done"
        read.set()
        await asyncio.sleep(0.02)
        assert desk.view(rollback).state == "cancelled"
        assert not desk.orders and len(desk.ledger.lineages) == 1


async def test_checkpoints_that_were_deleted_do_not_stop_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`rm -rf checkpoints/*` leaves the mark of the storage; storage that is not mounted has none."""
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        recovery.look_now(desk.context)
        for name in ("a", "b"):
            shutil.rmtree(desk.paths.checkpoints / name)
        assert isinstance(desk.saves("c", 30), p.Committed)
        assert desk.ledger.missing == {"a", "b"}
        (desk.paths.checkpoints / recovery.MARK).unlink()
        shutil.rmtree(desk.paths.checkpoints / "c")
        assert isinstance(desk.saves("d", 31), p.CommitRefused)


async def test_a_run_whose_whole_journal_is_gone_asks_where_to_go_on_and_does_not_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "run"
    async with desk_at(root, monkeypatch, "training") as desk:
        journal = desk.paths.journal
    (journal / "000001.log").unlink()
    async with desk_at(root, monkeypatch) as desk:
        await desk.until(lambda: desk.ledger.state == "failed")
        assert "roll back to the one to continue from (a, b)" in desk.ledger.reason and not desk.starts
        desk.give("rollback", checkpoint="b")
        await desk.until(lambda: desk.starts)
        assert desk.starts[-1].checkpoint == "b" and desk.starts[-1].generation > 1
