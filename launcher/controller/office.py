"""What the parts of a controller share: the run's files, its journal and ledger, the metrics, and what lives only in memory."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from launcher import journal as j
from launcher.ledger import Ledger
from launcher.metrics.store import Metrics
from launcher.paths import RunPaths
from launcher.protocol import NodeStats, Phase, State, Straggler
from launcher.recipe import Recipe
from launcher.samples import Samples

log = logging.getLogger("launcher.controller")

BALLAST_BYTES = 256 * 1024
"""Kept free beside the journal, so that it can still be written when the disk is full."""


@dataclass
class Node:
    """An agent as the controller sees it."""

    name: str
    pid: int = 0
    reachable: bool = False
    problem: str = ""
    """Why there is no agent, where one was to be started."""
    stats: NodeStats | None = None


@dataclass
class Live:
    """What is known of the moment and rebuilt from reports after a takeover."""

    phase: Phase | None = None
    phase_since: float = 0.0
    step: int = 0
    tokens: int = 0
    heard: float = 0.0
    """When the ranks last reported anything, by the controller's clock."""
    step_time: float = 0.0
    """Wall clock of the last step reported."""
    latest: dict[str, float] = field(default_factory=dict)
    step_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=50))
    nodes: dict[str, Node] = field(default_factory=dict)
    building: tuple[float, str] = (0.0, "")
    """Part done of the data, and what is being done."""
    building_since: float = 0.0
    dropped: int = 0
    verifying: set[str] = field(default_factory=set)
    """Checkpoints that are being read and must not be deleted."""
    probed: dict[tuple[object, int, int], str] = field(default_factory=dict)
    """Checkpoints that answer somebody and must not be deleted: by client, ask and place."""
    refused_peers: int = 0
    stragglers: tuple[Straggler, ...] = ()
    """Ranks that are slower than the others, and have been for some time."""


class Office:
    """Shared by all parts of one controller; lives in one event loop, so nothing in it is locked."""

    def __init__(
        self, paths: RunPaths, recipe: Recipe, journal: j.Journal, metrics: Metrics, clock: Callable[[], float] = time.time
    ) -> None:
        self.paths, self.recipe, self.journal, self.metrics, self.clock = paths, recipe, journal, metrics, clock
        self.ledger = Ledger()
        for term, entry in journal.entries:
            self.ledger.apply(term, entry)
        self.live = Live()
        self.samples = Samples(paths.samples, journal.term)
        self.changes = 0
        """Counts everything that a screen would show."""
        self.changed = asyncio.Event()
        self.over = asyncio.Event()
        """Set when this controller's work is done."""
        self.ended_listeners: list[Callable[[j.CommandEnded], None]] = []
        self._backlog: list[j.Entry] = []
        self._ballast = paths.journal / j.BALLAST
        self._lay_ballast()

    @property
    def term(self) -> int:
        return self.journal.term

    @property
    def state(self) -> State:
        return self.ledger.state

    def touch(self) -> None:
        """Something that screens show has changed."""
        self.changes += 1
        self.changed.set()

    def record(self, *entries: j.Entry) -> None:
        """Journals what has happened. On a full disk it is kept and written later; raises Ousted after a takeover."""
        if self._backlog or not self._write(entries):
            self._backlog.extend(entries)
        for entry in entries:
            self.ledger.apply(self.term, entry)
            if isinstance(entry, j.CommandEnded):
                for listener in self.ended_listeners:
                    listener(entry)
        self.touch()

    def promise(self, *entries: j.Entry) -> None:
        """Journals what is about to be done; raises JournalError, and nothing is done, where that cannot be made durable."""
        if self._backlog:
            raise j.JournalError("the disk of the run directory is full")
        if not self._write(entries):
            raise j.JournalError(f"{self.paths.journal}: cannot be written; free some space")
        for entry in entries:
            self.ledger.apply(self.term, entry)
        self.touch()

    def note(self, level: Literal["info", "warning", "alarm"], text: str, step: int | None = None, report: int = 0) -> None:
        log.log({"info": 20, "warning": 30, "alarm": 40}[level], "%s", text)
        self.record(j.Noted(time=self.clock(), level=level, text=text, step=step, report=report))

    def raise_alarm(self, text: str, step: int, *, rule: str, value: float | None, threshold: str) -> None:
        """An alarm of a watch rule."""
        log.error("%s", text)
        self.record(j.Noted(time=self.clock(), level="alarm", text=text, step=step, rule=rule, value=value, threshold=threshold))

    def change_state(self, state: State, reason: str = "") -> None:
        if (state, reason) != (self.ledger.state, self.ledger.reason):
            log.info("state: %s %s", state, reason)
            self.record(j.StateChanged(time=self.clock(), state=state, reason=reason))

    def sync(self) -> None:
        """Returns once all telemetry that was taken in would survive a loss of power."""
        self.metrics.sync()
        try:
            self.samples.sync()
        except OSError as error:  # of these nothing depends on a single one
            log.warning("samples cannot be made durable: %s", error)

    def retry_backlog(self) -> None:
        """Writes what a full disk has kept back, as far as it goes."""
        if self._backlog and self._write(tuple(self._backlog)):
            self._backlog.clear()
        if not self._backlog and not self._ballast.exists():
            self._lay_ballast()

    def _write(self, entries: tuple[j.Entry, ...]) -> bool:
        for attempt in range(2):
            try:
                self.journal.append(*entries)
                return True
            except j.Ousted:
                raise
            except j.JournalError as error:
                log.error("journal: %s", error)
                if attempt == 0:
                    with contextlib.suppress(OSError):
                        self._ballast.unlink()
        return False

    def _lay_ballast(self) -> None:
        with contextlib.suppress(OSError):
            handle = os.open(self._ballast, os.O_WRONLY | os.O_CREAT, 0o600)
            try:
                os.posix_fallocate(handle, 0, BALLAST_BYTES)
            finally:
                os.close(handle)
