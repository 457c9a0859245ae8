"""How a metric has changed: its mean over the newest quarter of the last `over` steps, against that over their oldest quarter.

Silent until both quarters have a value.
"""

from __future__ import annotations

import math
from collections import deque

from midwatch.watch_conditions.base import Judge, Judgement, WatchCondition
from midwatch.words import plural

Trend = deque[tuple[int, float]]
"""Steps and values."""


class _Change(WatchCondition, frozen=True, kw_only=True):
    value: float
    over: int = 200

    def problems(self) -> list[tuple[str, str]]:
        return self.too_small_or_large("over", 4)

    def judge(self) -> Judge:
        trend: Trend = deque()

        def judge(step: int, value: float) -> Judgement:
            if math.isfinite(value):
                trend.append((step, value))
                while trend[0][0] <= step - self.over:
                    trend.popleft()
            quarter = self.over / 4
            old = [value for at, value in trend if at <= step - self.over + quarter]
            new = [value for at, value in trend if at > step - quarter]
            if not old or not new:
                return Judgement(False, "")
            before, now = math.fsum(old) / len(old), math.fsum(new) / len(new)
            holds, words = self.compared(before, now)
            means = f"(mean {before:.4g} -> {now:.4g} over {plural(self.over, 'step')})"
            return Judgement(holds, f"{words} {self.value:g} {means}" if words else "")

        return judge

    def compared(self, before: float, now: float) -> tuple[bool, str]:
        """Whether it holds, and the name of the threshold; empty: nothing can be said."""
        raise NotImplementedError


class ChangeAbove(_Change, frozen=True, kw_only=True):
    """Newest mean minus oldest."""

    def compared(self, before: float, now: float) -> tuple[bool, str]:
        return now - before > self.value, "change above"


class ChangeBelow(_Change, frozen=True, kw_only=True):
    def compared(self, before: float, now: float) -> tuple[bool, str]:
        return now - before < self.value, "change below"


class RatioAbove(_Change, frozen=True, kw_only=True):
    """Newest mean over oldest, if that is above 0."""

    def compared(self, before: float, now: float) -> tuple[bool, str]:
        return (now / before > self.value, "ratio above") if before > 0 else (False, "")


class RatioBelow(_Change, frozen=True, kw_only=True):
    def compared(self, before: float, now: float) -> tuple[bool, str]:
        return (now / before < self.value, "ratio below") if before > 0 else (False, "")
