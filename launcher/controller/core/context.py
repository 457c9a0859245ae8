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

import msgspec

from launcher.controller.core.events import CommandEnded, Events, StateChanged
from launcher.controller.core.rollout_samples import Samples
from launcher.metrics.store import MetricStore
from midwatch.directory_identity import DirectoryWatch
from midwatch.journal import entries as j
from midwatch.journal.journal import BALLAST, Journal, JournalError, Ousted
from midwatch.journal.run_identity import claim
from midwatch.journal.run_state import Ledger
from midwatch.protocol import CommandView, NodeStats, Phase, State, Straggler
from midwatch.recipe import Recipe
from midwatch.run_directory import RunPaths, mount_of

log = logging.getLogger("launcher.controller")

MISSING_SECONDS = 2.0
"""That the run directory may be out of sight before it counts as moved or deleted."""
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
class LiveState:
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
    storage_fault: str = ""
    """Why all checkpoints are out of sight at once; empty where they are not."""
    stragglers: tuple[Straggler, ...] = ()
    """Ranks that are slower than the others, and have been for some time."""


class ControllerContext:
    """Shared by all parts of one controller; lives in one event loop, so nothing in it is locked."""

    def __init__(
        self,
        paths: RunPaths,
        recipe: Recipe,
        journal: Journal,
        metrics: MetricStore,
        clock: Callable[[], float] = time.time,
        run: str | None = None,
    ) -> None:
        self.paths, self.recipe, self.journal, self.metrics, self.clock = paths, recipe, journal, metrics, clock
        self.run = run if run is not None else claim(paths, journal.entries).run
        """The run's id."""
        self.directory = DirectoryWatch(paths.root, MISSING_SECONDS)
        self.ledger = Ledger()
        for term, entry in journal.entries:
            self.ledger.apply(term, entry)
        self.live = LiveState()
        self.samples = Samples(paths.samples, journal.term)
        self.changes = 0
        """Counts everything that a screen would show."""
        self.changed = asyncio.Event()
        self.over = asyncio.Event()
        """Set when this controller's work is done."""
        self.events = Events()
        self.adopting = asyncio.Lock()
        """Held while checkpoints that the journal does not know are taken in; ranks are started after that."""
        self.rejected: set[tuple[str, str]] = set()
        """Names and digests of directories that were read whole and are damaged."""
        self._backlog: list[j.Entry] = []
        self._acts: list[Callable[[], None]] = []
        """What waits for the backlog to be durable."""
        self._fault = ""
        self._unwritten_since = 0.0
        self._ballast = paths.journal / BALLAST
        self._lay_ballast()

    @property
    def term(self) -> int:
        return self.journal.term

    @property
    def state(self) -> State:
        return self.ledger.state

    def restore(self) -> None:
        """Fills in from the index what a screen wants at once."""
        path = self.ledger.path()
        for series in self.metrics.names():
            point = self.metrics.latest(series.name, path)
            if point is not None:
                self.live.latest[series.name] = point.value
                if series.name == "train/loss":
                    self.live.step, self.live.tokens, self.live.step_time = point.step, point.tokens, point.time

    def touch(self) -> None:
        """Something that screens show has changed."""
        self.changes += 1
        self.changed.set()

    @property
    def journal_fault(self) -> str:
        """Why the journal cannot be written, and where it lies; empty where all that has happened is durable."""
        return self._fault if self._backlog else ""

    @property
    def unwritten(self) -> tuple[j.Entry, ...]:
        """What has happened and is not durable yet, oldest first."""
        return tuple(self._backlog)

    @property
    def seconds_unwritten(self) -> float:
        """How long the oldest of that has waited."""
        return time.monotonic() - self._unwritten_since if self._backlog else 0.0

    def record(self, *entries: j.Entry) -> None:
        """Journals what has happened, later where the journal cannot be written now. Raises Ousted after a takeover.

        Nothing may be deleted, acknowledged or reported as done on the strength of it before it is durable: see `when_durable`.
        """
        if not self._backlog and not self._write(entries):
            self._unwritten_since = time.monotonic()
            self._backlog.extend(entries)
            log.critical("nothing can be journaled: %s", self._fault)
        elif self._backlog:
            self._backlog.extend(entries)
        for entry in entries:
            self.ledger.apply(self.term, entry)
        self.when_durable(lambda: self._announce(entries))
        self.touch()

    def _announce(self, entries: tuple[j.Entry, ...]) -> None:
        for entry in entries:
            if isinstance(entry, j.CommandEnded):
                self.events.publish(CommandEnded(entry))

    def when_durable(self, act: Callable[[], None]) -> None:
        """Acts as soon as all that was recorded so far is durable: mostly at once."""
        if self._backlog:
            self._acts.append(act)
        else:
            act()

    def as_durable(self, command: CommandView) -> CommandView:
        """A command as the durable part of the journal knows it: its end counts once it is there."""
        if any(isinstance(entry, j.CommandEnded) and entry.number == command.number for entry in self._backlog):
            return msgspec.structs.replace(command, state="sent", step=None, detail={}, reason="")
        return command

    def promise(self, *entries: j.Entry) -> None:
        """Journals what is about to be done; raises JournalError, and nothing is done, where that cannot be made durable."""
        if self._backlog or not self._write(entries):
            raise JournalError(f"nothing can be journaled: {self._fault}")
        for entry in entries:
            self.ledger.apply(self.term, entry)
        self.touch()

    def note(
        self, level: Literal["info", "warning", "alarm"], text: str, step: int | None = None, report: int = 0, rule: str = ""
    ) -> None:
        log.log({"info": 20, "warning": 30, "alarm": 40}[level], "%s", text)
        self.record(j.Noted(time=self.clock(), level=level, text=text, step=step, report=report, rule=rule))

    def note_once(self, text: str) -> None:
        """An alarm, unless an earlier term has raised the very same."""
        if not any(isinstance(entry, j.Noted) and entry.text == text for _, entry in self.journal.entries):
            self.note("alarm", text)

    def raise_alarm(self, text: str, step: int, *, rule: str, value: float | None, threshold: str) -> None:
        """An alarm of a watch rule."""
        log.error("%s", text)
        self.record(j.Noted(time=self.clock(), level="alarm", text=text, step=step, rule=rule, value=value, threshold=threshold))

    def change_state(self, state: State, reason: str = "") -> None:
        if (state, reason) != (self.ledger.state, self.ledger.reason):
            log.info("state: %s %s", state, reason)
            self.record(j.StateChanged(time=self.clock(), state=state, reason=reason))
            self.events.publish(StateChanged())

    def sync(self) -> None:
        """Returns once all telemetry that was taken in would survive a loss of power."""
        self.metrics.sync()
        try:
            self.samples.sync()
        except OSError as error:  # of these nothing depends on a single one
            log.warning("samples cannot be made durable: %s", error)

    def retry_backlog(self) -> None:
        """Writes what could not be written before, and does what waits for it."""
        if self._backlog and self._write(tuple(self._backlog)):
            waited = self.seconds_unwritten
            self._backlog.clear()
            acts, self._acts = self._acts, []
            for act in acts:
                act()
            self.note("warning", f"the journal could not be written for {waited:.0f} s: {self._fault}")
        with contextlib.suppress(OSError):
            if not self._backlog and not self._ballast.exists():
                self._lay_ballast()

    def _write(self, entries: tuple[j.Entry, ...]) -> bool:
        for attempt in range(2):
            try:
                self.journal.append(*entries)
                return True
            except Ousted:
                raise
            except JournalError as error:
                if not self._backlog:
                    log.error("journal: %s", error)
                self._fault = f"{error} ({mount_of(self.paths.journal)})"
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
