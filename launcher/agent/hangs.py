"""Tells ranks that hang from ranks that are slow: by what they have taken before, each phase of the work on its own.

The limit of a phase is five times the longest that a rank has stood still in it (the very longest left out, which may have been a
mishap), and never below a floor. As long as a phase is not known, a generous limit stands in.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from midwatch.protocol import RankBeat

FACTOR = 5.0
KNOWN = 5
"""Moves seen in a phase before its limit is learned; a look at a rank that has gone n steps on has seen n."""
REMEMBERED = 200


class Hang(NamedTuple):
    phase: str
    ranks: tuple[int, ...]
    """Those that stand still for longer than the limit."""
    seconds: float
    limit: float


class HangWatch:
    """Is shown the ranks' beats every second or so."""

    def __init__(self, floor: float, first: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._floor, self._first, self._clock = floor, first, clock
        self._stood: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=REMEMBERED))
        """Of each phase: seconds between two moves."""
        self._moves: Counter[str] = Counter()
        self._last: dict[int, tuple[RankBeat, float]] = {}
        self._generation = 0

    def limit(self, phase: str) -> float:
        if self._moves[phase] < KNOWN:
            return max(self._floor, self._first)
        return max(self._floor, FACTOR * sorted(self._stood[phase])[-2:][0])

    def see(self, generation: int, beats: Sequence[RankBeat]) -> Hang | None:
        """What hangs, if anything does."""
        now = self._clock()
        if generation != self._generation:
            self._generation, self._last = generation, {}
        late: list[tuple[float, float, RankBeat]] = []
        for beat in beats:
            before, since = self._last.get(beat.rank, (None, now))
            if before is None or (before.step, before.time, before.phase) != (beat.step, beat.time, beat.phase):
                if before is not None and before.phase == beat.phase and before.time:
                    self._stood[beat.phase].append(now - since)
                    self._moves[beat.phase] += max(1, beat.step - before.step)
                self._last[beat.rank] = (beat, now)
            elif now - since > self.limit(beat.phase):
                late.append((now - since, self.limit(beat.phase), beat))
        if not late:
            return None
        seconds, limit, beat = max(late, key=lambda each: each[0])
        return Hang(beat.phase, tuple(each.rank for _, _, each in late), seconds, limit)
