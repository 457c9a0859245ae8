"""The ledger: the same from the same journal, right about lines of steps, and never confused by a damaged entry."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import pytest

from midwatch.journal import entries as j
from midwatch.journal.run_state import Ledger
from midwatch.metrics.m4_columns import LineageSegment
from midwatch.protocol import Lineage, Replay

_times = itertools.count(1)


def committed(id: str, step: int, lineage: int = 1, *, suspect: bool = False, ended: bool = False) -> j.CheckpointCommitted:
    return j.CheckpointCommitted(
        time=float(next(_times)),
        id=id,
        digest=f"digest-{id}",
        step=step,
        lineage=lineage,
        stage="pretrain",
        stage_step=step,
        ended=ended,
        generation=1,
        bytes=10,
        suspect=suspect,
        seconds=0.1,
        stall_seconds=0.0,
    )


def opened(id: int, parent: int | None = None, fork: str | None = None, step: int = 0, cause: str = "start") -> j.LineageOpened:
    lineage = Lineage(id=id, parent=parent, fork=fork, fork_step=step, cause=cause)  # type: ignore[arg-type]
    return j.LineageOpened(time=1.0, lineage=lineage, number=90 + id if cause == "rollback" else None)


def given(number: int, verb: str, **arguments: object) -> j.CommandAccepted:
    return j.CommandAccepted(time=1.0, author="ann", number=number, id=f"id-{number}", verb=verb, arguments=arguments)


def ended(number: int, step: int | None = None, state: str = "done", **detail: object) -> j.CommandEnded:
    return j.CommandEnded(time=1.0, number=number, state=state, step=step, detail=detail)  # type: ignore[arg-type]


def setting(number: int, step: int, key: str, value: float) -> list[j.Entry]:
    return [given(number, "set", key=key, value=value), ended(number, step, key=key, old=1.0, new=value)]


def fold(*entries: j.Entry) -> Ledger:
    ledger = Ledger()
    for entry in entries:
        ledger.apply(1, entry)
    return ledger


LIFE: list[j.Entry] = [
    j.TermBegan(time=1.0, term=1, host="h", pid=1, accepts={}, versions={"torch": "1"}),
    j.RunBegan(time=1.0, name="r", recipe="x"),
    j.DataBuilt(time=1.0, directory="d", seconds=2.0),
    j.AgentStarted(time=1.0, node="h", pid=5, created=0.0),
    opened(1),
    j.GenerationBegan(time=1.0, generation=1, lineage=1, checkpoint=None, nodes=("h",), world=2, environment={"ranks": "2"}),
    j.StateChanged(time=1.0, state="training"),
    j.StageBegan(time=1.0, stage="pretrain", step=0, lineage=1),
    committed("a", 10),
    committed("b", 20),
    *setting(1, 25, "lr", 0.5),
    j.GoldenMarked(time=1.0, id="a", golden=True),
    given(2, "pause"),
    j.CommandSent(time=1.0, number=2, generation=1),
    ended(2, 26),
    given(92, "rollback", checkpoint="a"),
    j.CommandSent(time=1.0, number=92, generation=1),
    opened(2, 1, "a", 10, "rollback"),
    ended(92, 10),
    j.SettingsInForce(time=1.0, lineage=2, step=10, settings={"lr": 1.0}),
    committed("c", 14, 2),
    j.GenerationEnded(time=1.0, generation=1, cause="killed", step=17),
    opened(3, 2, "c", 14, "crash"),
    j.GenerationBegan(time=1.0, generation=2, lineage=3, checkpoint="c", nodes=("h",), world=4, environment={"ranks": "4"}),
    given(94, "rollback", checkpoint="b"),
    opened(4, 1, "b", 20, "rollback"),
    j.LineageAbandoned(time=1.0, lineage=4),
    ended(94, 15, "failed"),
    j.CheckpointPruned(time=1.0, id="b"),
    j.StageEnded(time=1.0, stage="pretrain", step=30, stage_step=30, lineage=3, product="d"),
    j.SampleTaken(time=1.0, stage="pretrain", step=30, lineage=3, prompt="p", text="t"),
    j.TermBegan(time=1.0, term=2, host="h", pid=2, accepts={}, versions={"torch": "2"}),
]


def test_the_same_journal_gives_the_same_ledger() -> None:
    assert asdict(fold(*LIFE)) == asdict(fold(*LIFE))


def test_a_life_adds_up() -> None:
    ledger = fold(*LIFE)
    assert (ledger.lineage, ledger.generation, ledger.world) == (3, 2, 4)
    assert set(ledger.checkpoints) == {"a", "c"}
    assert ledger.checkpoints["a"].golden
    assert ledger.held
    assert ledger.changes == ("torch: 1 -> 2",)
    assert [ledger.commands[n].state for n in (1, 2, 92, 94)] == ["done", "done", "done", "failed"]


@pytest.mark.parametrize("lost", range(len(LIFE)), ids=lambda i: f"{i}-{type(LIFE[i]).__name__}")
def test_no_entry_that_damage_takes_away_keeps_the_rest_from_being_read(lost: int) -> None:
    ledger = fold(*LIFE[:lost], *LIFE[lost + 1 :])
    ledger.path()
    ledger.restart_point()
    ledger.replays(0)
    ledger.stage_record("pretrain")
    ledger.open_commands()
    assert ledger.lineage in ledger.lineages


def test_the_path_leads_through_forks_and_keeps_only_what_was_not_undone() -> None:
    ledger = fold(opened(1), committed("a", 10), committed("b", 20), opened(2, 1, "b", 20, "rollback"), committed("c", 30, 2))
    assert ledger.path() == [LineageSegment(1, -1, 20), LineageSegment(2, 20, None)]
    ledger.apply(1, opened(3, 1, "a", 10, "rollback"))
    assert ledger.path() == [LineageSegment(1, -1, 10), LineageSegment(3, 10, None)]
    assert {i: c.on_line for i, c in ledger.checkpoints.items()} == {"a": True, "b": False, "c": False}
    assert ledger.path(2) == [LineageSegment(1, -1, 20), LineageSegment(2, 20, None)]


def test_a_second_rollback_to_the_same_fork_leaves_nothing_of_the_lineage_between() -> None:
    ledger = fold(opened(1), committed("a", 10), opened(2, 1, "a", 10, "rollback"), opened(3, 2, "a", 10, "crash"))
    assert [s for s in ledger.path() if s.last is None or s.last > s.after] == [
        LineageSegment(1, -1, 10),
        LineageSegment(3, 10, None),
    ]


def test_the_restart_point_is_the_newest_good_one_of_the_line_in_force() -> None:
    ledger = fold(opened(1))
    assert ledger.restart_point() is None
    for entry, expected in [
        (committed("a", 10), "a"),
        (committed("b", 20), "b"),
        (committed("bad", 30, suspect=True), "b"),
        (opened(2, 1, "a", 10, "rollback"), "a"),
        (committed("worse", 12, 2, suspect=True), "a"),
        (committed("c", 14, 2), "c"),
        (committed("end", 14, 2, ended=True), "end"),
        (j.CheckpointPruned(time=1.0, id="end"), "c"),
    ]:
        ledger.apply(1, entry)
        point = ledger.restart_point()
        assert point is not None and point.id == expected


def test_settings_are_set_again_after_a_crash() -> None:
    ledger = fold(
        opened(1), committed("a", 10), *setting(1, 5, "lr", 2.0), *setting(2, 12, "clip", 3.0), *setting(3, 15, "lr", 4.0)
    )
    crash = [opened(2, 1, "a", 10, "crash"), opened(3, 2, "a", 10, "crash")]
    for entry in crash:
        ledger.apply(1, entry)
        assert ledger.replays(10) == (Replay(step=12, key="clip", value=3.0), Replay(step=15, key="lr", value=4.0))


def test_settings_are_listed_and_not_set_again_after_a_rollback() -> None:
    ledger = fold(opened(1), committed("a", 10), *setting(1, 5, "clip", 2.0), *setting(2, 15, "lr", 4.0))
    ledger.apply(1, opened(2, 1, "a", 10, "rollback"))
    assert ledger.replays(10) == ()
    assert ledger.asked == {"lr": 4.0}
    ledger.apply(1, j.SettingsInForce(time=1.0, lineage=2, step=10, settings={"lr": 1.0, "max_grad_norm": 2.0}))
    assert ledger.asked == {"lr": 4.0}
    for entry in setting(3, 12, "lr", 4.0):
        ledger.apply(1, entry)
    assert ledger.asked == {}


def test_an_abandoned_lineage_leaves_no_trace_but_its_number() -> None:
    before = [opened(1), committed("a", 10), committed("b", 20), *setting(1, 15, "lr", 4.0)]
    after = [opened(2, 1, "a", 10, "rollback"), j.LineageAbandoned(time=1.0, lineage=2)]
    then, now = fold(*before), fold(*before, *after)
    assert (now.lineage, now.path(), now.restart_point()) == (then.lineage, then.path(), then.restart_point())
    assert now.checkpoints == then.checkpoints
    assert now.asked == {}
    assert now.newest_lineage == 2


def test_going_on_after_an_abandoned_rollback_is_on_the_lineage_that_was_left() -> None:
    """Not on the one the checkpoint belongs to: that was left long ago."""
    ledger = fold(opened(1), committed("a", 10), opened(2, 1, "a", 10, "rollback"), committed("b", 20, 2))
    for entry in (opened(3, 1, "a", 10, "rollback"), j.LineageAbandoned(time=1.0, lineage=3)):
        ledger.apply(1, entry)
    assert ledger.lineage == 2


def test_a_rollback_sent_and_not_journaled_as_a_lineage_waits_again_in_the_next_term() -> None:
    begun = [opened(1), given(7, "rollback", checkpoint="a"), j.CommandSent(time=1.0, number=7, generation=1)]
    ledger = fold(*begun, LIFE[-1])
    assert ledger.commands[7].state == "queued"


def test_reports_are_numbered_within_a_generation() -> None:
    ledger = fold(j.Noted(time=1.0, level="info", text="x", report=9))
    assert ledger.reported == 9
    ledger.apply(1, LIFE[5])
    assert ledger.reported == 0


def test_a_stage_whose_end_was_never_told_has_ended_by_its_checkpoint_or_by_the_next_one() -> None:
    began = j.StageBegan(time=0.0, stage="pretrain", step=0, lineage=1)
    ledger = fold(opened(1), began, committed("a", 30, ended=True))
    record = ledger.stage_record("pretrain")
    assert record is not None and (record.last_step, record.stage_steps, record.product) == (30, 30, "a")
    ledger.apply(1, opened(2, 1, "a", 30, "crash"))
    ledger.apply(1, j.StageBegan(time=9.0, stage="sft", step=30, lineage=2))
    assert ledger.stage_record("pretrain") == record
    ledger.apply(1, j.CheckpointPruned(time=10.0, id="a"))
    record = ledger.stage_record("pretrain")
    assert record is not None and (record.ended, record.last_step, record.product) == (9.0, 30, None)
    after = ledger.stage_record("sft")
    assert after is not None and after.ended is None
