"""How far a build is, as JSON lines for programs, bars for a terminal, or plain lines for a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

import msgspec

from shards.common.terminal import make_console, safe, write_json

Phase = Literal["read", "clean", "tokenizer", "encode", "verify", "count", "compare", "merge", "done"]
INTERVAL = 0.25  # seconds between reports of one phase


class ProgressReport(msgspec.Struct, frozen=True):
    """One report."""

    phase: Phase
    done: int
    total: int | None  # None: not known
    unit: str  # of done and total: bytes, documents, tokens, shards
    rate: float  # units a second, since the phase began
    seconds_left: float | None
    message: str


Report = Callable[[ProgressReport], None]


class ProgressMeter:
    """Turns "so much is done" into reports, not too many of them."""

    def __init__(self, report: Report, clock: Callable[[], float] = time.monotonic) -> None:
        self._report = report
        self._clock = clock
        self._start = self._last = clock()
        self._from = 0

    def begin(self, phase: Phase, message: str, unit: str = "", total: int | None = None, done: int = 0) -> None:
        """A phase, or another source within it."""
        self._phase, self._message, self._unit = phase, message, unit
        self._start, self._from = self._clock(), done
        self.update(done, total, now=True)

    def update(self, done: int, total: int | None = None, *, unit: str | None = None, now: bool = False) -> None:
        """So much is done; reported if the last report is old enough, or if asked to `now`."""
        moment = self._clock()
        if not now and moment - self._last < INTERVAL:
            return
        self._last = moment
        self._unit = self._unit if unit is None else unit
        passed = moment - self._start
        rate = (done - self._from) / passed if passed > 0 else 0.0
        left = max(0, total - done) / rate if total is not None and rate > 0 else None
        self._report(ProgressReport(self._phase, done, total, self._unit, round(rate, 1), left and round(left, 1), self._message))


def print_progress(progress: ProgressReport) -> None:
    """One JSON object a line on standard output. Raises OutputError."""
    write_json(progress, flush=True)


class Screen:
    """A bar on a terminal; without one, a line for each phase and source. A context: it restores the terminal.

    transient: nothing is left of the bar when it ends.
    """

    def __init__(self, *, transient: bool = False) -> None:
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
        from rich.table import Column

        self._console = make_console(stderr=True)
        said = TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=3))
        speed = TextColumn("{task.fields[speed]}", markup=False, table_column=Column(no_wrap=True, justify="right", width=14))
        self._bars = Bars(
            said, BarColumn(None, table_column=Column(ratio=2)), TextColumn("{task.percentage:>3.0f}%", markup=False), speed,
            TimeRemainingColumn(), console=self._console, disable=not self.is_terminal, transient=transient, expand=True,
        )  # fmt: skip
        self._task = self._bars.add_task("", total=None, speed="")
        self._shown = ""

    @property
    def is_terminal(self) -> bool:
        return self._console.is_terminal

    def __call__(self, progress: ProgressReport) -> None:
        said = safe(f"{progress.phase}: {progress.message}")
        if said != self._shown and not self.is_terminal:
            self._console.print(said, soft_wrap=True)
        if said != self._shown:
            self._bars.reset(self._task, description=said, total=progress.total)
        self._shown = said
        self._bars.update(self._task, completed=progress.done, total=progress.total, speed=_speed(progress))

    def __enter__(self) -> Screen:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()


def _speed(progress: ProgressReport) -> str:
    """Units a second, in at most 14 characters."""
    rate, unit = progress.rate, {"bytes": "B", "tokens": "tok", "documents": "docs"}.get(progress.unit, progress.unit)
    for letter in ("", "k", "M", "G"):
        if rate < 1000 or letter == "G":
            return f"{rate:.3g} {letter}{unit}/s" if rate else ""
        rate /= 1000
    return ""
