"""Ranks that hold up the others: slower than the median by a set ratio for a set time are named, and again when they keep up.

All ranks end a step together, so what is compared is each one's own time a step (trainer.control.step_timer): the time in which it
does not wait.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

from launcher.controller.core.context import ControllerContext
from midwatch.protocol import Straggler


class Stragglers:
    """Looks every now and then; keeps `context.live.stragglers`."""

    def __init__(self, context: ControllerContext, clock: Callable[[], float] = time.monotonic) -> None:
        self._context, self._clock = context, clock
        cluster = context.recipe.cluster
        self._ratio, self._seconds = cluster.straggler_ratio, cluster.straggler_seconds
        self._generation = 0
        self._named: dict[int, float] = {}
        """Since when, by the wall clock, each that was named is slow."""
        self._differs: dict[int, float] = {}
        """Seconds for which each rank has been other than it is named."""
        self._looked: float | None = None

    def look(self) -> None:
        context, now = self._context, self._clock()
        ledger, live = context.ledger, context.live
        if ledger.generation != self._generation or not ledger.generation_live:
            self._generation = ledger.generation
            self._named, self._differs, live.stragglers = {}, {}, ()
        trains = context.state == "training" and live.phase is not None and live.phase.phase == "training"
        passed = now - self._looked if self._looked is not None and trains else 0.0
        self._looked = now if trains else None  # while the ranks do something else, time does not count
        if not trains:
            return
        own, nodes = self._figures()
        if len(own) < 2:
            return
        # The lower one of two: of two ranks the slow one must not be half the yardstick.
        median = statistics.median_low(own.values())
        self._compare(own, nodes, median, passed)
        live.stragglers = tuple(
            Straggler(rank, nodes[rank], own[rank], median, since) for rank, since in sorted(self._named.items()) if rank in own
        )

    def _figures(self) -> tuple[dict[int, float], dict[int, str]]:
        """Each rank's own time a step, and its node, of the nodes that are heard."""
        own: dict[int, float] = {}
        nodes: dict[int, str] = {}
        for node in self._context.live.nodes.values():
            if node.reachable and node.stats is not None and node.stats.generation == self._generation:
                for beat in node.stats.ranks:
                    if beat.own > 0:
                        own[beat.rank], nodes[beat.rank] = beat.own, node.name
        return own, nodes

    def _compare(self, own: dict[int, float], nodes: dict[int, str], median: float, passed: float) -> None:
        changed = []
        for rank, seconds in own.items():
            if (seconds > self._ratio * median) == (rank in self._named):
                self._differs.pop(rank, None)
                continue
            self._differs[rank] = self._differs.get(rank, 0.0) + passed
            if self._differs[rank] >= self._seconds:
                changed.append(rank)
                del self._differs[rank]
        slow = [rank for rank in changed if rank not in self._named]
        again = [rank for rank in changed if rank in self._named]
        for rank in slow:
            self._named[rank] = self._context.clock() - self._seconds
        for rank in again:
            del self._named[rank]
        for node, ranks in _by_node(slow, nodes):
            worst = max(own[rank] for rank in ranks)
            told = f"{_names(ranks)} on {node} {'is' if len(ranks) == 1 else 'are'} slow: {_time(worst)} of its own a step, "
            told += f"{worst / median:.1f} times the median of {len(own)} ranks, for {self._seconds:g} s"
            self._context.note("warning", told, self._context.live.step)
        for node, ranks in _by_node(again, nodes):
            keeps = "keeps" if len(ranks) == 1 else "keep"
            self._context.note("info", f"{_names(ranks)} on {node} {keeps} up again", self._context.live.step)


def _by_node(ranks: Iterable[int], nodes: dict[int, str]) -> list[tuple[str, list[int]]]:
    """One word for each node, however many of its ranks are slow: mostly it is the node that is."""
    found: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        found.setdefault(nodes[rank], []).append(rank)
    return list(found.items())


def _names(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _time(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms" if seconds < 10 else f"{seconds:.1f} s"
