"""Alarms: repeats are folded, they say where and why they fired, and stand until an operator acknowledges them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launcher_desk import desk_at, make_recipe

from launcher.controller.core.snapshot import SnapshotBuilder
from midwatch.journal import entries as j
from midwatch.journal.run_state import Ledger
from midwatch.protocol import Alarm, Lineage
from midwatch.recipe import Watch

At = Callable[..., Any]
SPIKE = Watch(name="spike", metric="x", above=5.0, cooldown=1)


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> At:
    return lambda state=None, **more: desk_at(tmp_path / "run", monkeypatch, state, **more)


def noted(text: str, step: int | None = None, time: float = 1.0, rule: str = "") -> j.Noted:
    return j.Noted(time=time, level="alarm", text=text, step=step, rule=rule)


def opened(id: int, parent: int | None = None, fork_step: int = 0) -> j.LineageOpened:
    cause: Any = "start" if parent is None else "rollback"
    return j.LineageOpened(time=1.0, lineage=Lineage(id=id, parent=parent, fork="c", fork_step=fork_step, cause=cause))


def ledger_of(*entries: j.Entry) -> Ledger:
    ledger = Ledger()
    for entry in entries:
        ledger.apply(1, entry)
    return ledger


async def test_repeats_of_a_rule_are_one_alarm_with_step_value_threshold_and_count(at: At) -> None:
    async with at("training", recipe=make_recipe(watch=(SPIKE,))) as desk:
        for step in (30, 31, 32):
            desk.row(step, x=float(step))
        (alarm,) = desk.ledger.standing_alarms()
        assert (alarm.key, alarm.rule, alarm.step, alarm.last_step, alarm.count) == ("spike", "spike", 30, 32, 3)
        assert (alarm.value, alarm.threshold, alarm.lineage) == (32.0, "above 5", desk.ledger.lineage)
        assert "x is 32, threshold: above 5" in alarm.text
        lines = [line.text for line in SnapshotBuilder(desk.context).journal() if line.level == "alarm"]
        assert lines[0] == "spike: x is 30, threshold: above 5 (step 30)"


async def test_an_acknowledged_alarm_stands_no_more_until_it_is_raised_again(at: At) -> None:
    async with at("training", recipe=make_recipe(watch=(SPIKE,))) as desk:
        desk.row(30, x=9.0)
        desk.context.note("alarm", "disk full")
        command = desk.give("acknowledge", alarm="spike")
        assert desk.view(command).state == "done" and desk.view(command).detail == {"alarms": ["spike"]}
        assert [alarm.text for alarm in desk.ledger.standing_alarms()] == ["disk full"]
        assert desk.ledger.alarms["spike"].acknowledged_by == desk.view(command).author != ""
        assert [alarm.key for alarm in SnapshotBuilder(desk.context).snapshot().alarms] == [desk.ledger.standing_alarms()[0].key]
        desk.row(40, x=9.0)
        again = desk.ledger.standing_alarms()[0]
        assert (again.key, again.step, again.count, again.acknowledged) == ("spike", 40, 1, False)
        assert desk.view(desk.give("acknowledge", alarm="all")).state == "done"
        assert desk.ledger.standing_alarms() == []
        refused = desk.view(desk.give("acknowledge", alarm="all"))
        assert refused.state == "refused" and "there is no unacknowledged alarm" in refused.reason
        replayed = ledger_of(*(entry for _, entry in desk.journal.entries))
        assert replayed.alarms == desk.ledger.alarms, "a takeover knows the same"


def test_alarms_that_differ_in_figures_alone_are_one() -> None:
    ledger = ledger_of(
        opened(1),
        noted("checkpoint 40-1 could not be written: full", 40, 2.0),
        noted("checkpoint 50-1 could not be written: full", 50, 3.0),
        noted("the ranks hang: no progress in training for 61 s (the limit is 60 s)", 50, 4.0),
        noted("the ranks hang: no progress in training for 62.5 s (the limit is 60 s)", 51, 5.0),
    )
    assert [(a.key, a.count, a.time, a.last_time) for a in ledger.standing_alarms()] == [
        ("alarm-2", 2, 4.0, 5.0),
        ("alarm-1", 2, 2.0, 3.0),
    ]


def test_after_a_rollback_the_alarm_begins_with_its_first_repeat_on_the_new_line() -> None:
    before = (opened(1), noted("spike", 50, rule="spike"), noted("spike", 60, rule="spike"))
    past = ledger_of(*before, opened(2, 1, 40), noted("spike", 45, rule="spike"))
    assert [(a.step, a.lineage, a.count) for a in past.standing_alarms()] == [(45, 2, 3)]
    kept = ledger_of(*before, opened(2, 1, 55), noted("spike", 70, rule="spike"))
    assert [(a.step, a.lineage, a.count) for a in kept.standing_alarms()] == [(50, 1, 3)], "that one is on the line still"


def test_the_alarm_of_a_failed_run_goes_when_the_run_goes_on() -> None:
    failed = j.StateChanged(time=1.0, state="failed", reason="no node is left")
    assert [a.text for a in ledger_of(failed).standing_alarms()] == ["failed: no node is left"]
    assert ledger_of(failed, j.StateChanged(time=2.0, state="starting")).standing_alarms() == []


def test_alarms_without_end_take_no_memory_without_end() -> None:
    ledger = ledger_of(*(noted(f"node {'x' * n} is odd", time=float(n)) for n in range(300)))
    assert len(ledger.alarms) == 200
    assert isinstance(ledger.standing_alarms()[0], Alarm) and ledger.standing_alarms()[0].last_time == 299.0
