"""Alarms of the journal: repeats of one kind are one alarm with a count, which stands until somebody acknowledges it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import msgspec

from midwatch.journal import entries as j
from midwatch.protocol import Alarm

FAILED = "run failed"
"""Key of the alarm that the run has failed; it goes when the run goes on."""
MOST = 200
"""Alarms that are remembered; the oldest acknowledged ones are dropped first."""
_VARIES = re.compile(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?")
"""What differs between two repeats of one alarm: steps, values, ids."""


def add(
    alarms: dict[str, Alarm],
    entry: j.StateChanged | j.NodeFailed | j.Noted,
    text: str,
    step: int | None,
    lineage: int,
    on_line: Callable[[Alarm], bool],
) -> None:
    """Adds an alarm, or one more repeat of an alarm that stands.

    A repeat keeps the step and time of the first one, unless that lies on a line that a rollback has left (`on_line` says so):
    then the first one on the new line counts.
    """
    key = _key(alarms, entry, text)
    noted = entry if isinstance(entry, j.Noted) else None
    alarm = Alarm(
        key=key,
        text=text,
        rule=noted.rule if noted is not None else "",
        value=noted.value if noted is not None else None,
        threshold=noted.threshold if noted is not None else "",
        step=step,
        lineage=lineage,
        time=entry.time,
        last_step=step,
        last_time=entry.time,
    )
    before = alarms.pop(key, None)  # popped, so that the newest is the last of the table
    if before is not None and not before.acknowledged:
        alarm = msgspec.structs.replace(alarm, count=before.count + 1)
        if on_line(before):
            alarm = msgspec.structs.replace(alarm, step=before.step, lineage=before.lineage, time=before.time)
    alarms[key] = alarm
    if len(alarms) > MOST:
        del alarms[next((key for key, each in alarms.items() if each.acknowledged), next(iter(alarms)))]


def acknowledge(alarms: dict[str, Alarm], keys: Iterable[str], author: str) -> None:
    """Marks alarms as seen by an operator. One that is raised again after that stands again, as a new one."""
    for key in keys:
        if key in alarms:
            alarms[key] = msgspec.structs.replace(alarms[key], acknowledged=True, acknowledged_by=author)


def _key(alarms: dict[str, Alarm], entry: j.StateChanged | j.NodeFailed | j.Noted, text: str) -> str:
    """A rule's name; else the node or state; else a number, the same for texts that differ in figures alone."""
    if isinstance(entry, j.StateChanged):
        return FAILED
    if isinstance(entry, j.NodeFailed):
        return f"node {entry.node}"
    if entry.rule:
        return entry.rule
    form = _VARIES.sub("#", text)
    for key, alarm in alarms.items():
        if not alarm.rule and _VARIES.sub("#", alarm.text) == form:
            return key
    number = 1
    while f"alarm-{number}" in alarms:
        number += 1
    return f"alarm-{number}"
