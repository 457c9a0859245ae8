"""`[run]`, `[checkpoint]` and `[report]`: what concerns the run as a whole."""

from __future__ import annotations

import math

import msgspec

from midwatch.recipe.bounds import MOST_COUNT, MOST_STEPS, bounded


class Run(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    seed: int = 0
    """All randomness (weights, order of samples, generation) derives from it."""
    restarts: int = 3
    """Restarts without a step of progress between them after which the run waits for an operator."""

    def problems(self) -> list[tuple[str, str]]:
        if not self.name or any(c in self.name for c in "/\\\0\n") or self.name.startswith("."):
            return [("name", f"{self.name!r} cannot name a directory")]
        return bounded(self, 0, MOST_COUNT, ("restarts",))


class Checkpoint(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    every: int = 1000
    """Steps between checkpoints; each stage's end has one besides."""
    keep: int = 3
    """Newest checkpoints kept; goldens, stage ends, forks of lineages and the last one before a standing alarm are kept besides."""
    undone_hours: float = 24.0
    """How long the checkpoints that a rollback takes off the line are kept, so that it can be undone."""
    asynchronous: bool = True
    """Write while training goes on."""

    def problems(self) -> list[tuple[str, str]]:
        return [
            *bounded(self, 1, MOST_STEPS, ("every",)),
            *bounded(self, 1, MOST_COUNT, ("keep",)),
            *bounded(self, 0, MOST_COUNT, ("undone_hours",)),
        ]


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    seconds: float = 1.0
    """Shortest time between two lines of a headless report."""

    def problems(self) -> list[tuple[str, str]]:
        return [] if 0 <= self.seconds < math.inf else [("seconds", "must be finite and not negative")]
