"""Whether the ranks move, by whatever says so: rank 0's reports, and each agent's look at its own ranks."""

from __future__ import annotations

import statistics
import time

from launcher.controller.core.context import ControllerContext
from midwatch.protocol import NodeStats

STALL_SECONDS = 3.0
"""Without a step, and twice a step's time, before ranks that a node is cut off from count as standing still."""


class Moves:
    """Of the living generation."""

    def __init__(self, context: ControllerContext) -> None:
        self._context = context
        self._step = -1
        self._last = time.monotonic()

    def begin(self) -> None:
        """A generation begins."""
        self._step = -1
        self.seen()

    def seen(self) -> None:
        """The ranks have just moved."""
        self._last = time.monotonic()

    def see(self, stats: NodeStats) -> None:
        """An agent tells how far its ranks are."""
        if stats.generation == self._context.ledger.generation and stats.ranks:
            newest = max(beat.step for beat in stats.ranks)
            if newest > self._step:
                self._step = newest
                self.seen()

    def stalled(self) -> bool:
        """Whether no rank moves though it should: a node that is out of reach while the others train is only shown as such."""
        if self._context.state == "paused":
            return False
        pace = self._context.live.step_seconds
        return time.monotonic() - self._last > max(STALL_SECONDS, 2 * statistics.median(pace) if pace else 0.0)
