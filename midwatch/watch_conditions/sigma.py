"""A value far above those before it."""

from __future__ import annotations

import math
from collections import deque

from midwatch.watch_conditions.base import Judge, Judgement, WatchCondition

LEAST_DEVIATION = 1e-12
"""In place of 0, where all values before were the same."""


class Sigma(WatchCondition, frozen=True, kw_only=True):
    """More than `value` standard deviations above the mean of the last `window` values; silent until there are so many.

    Values for which it holds are not among those that later ones are compared with.
    """

    value: float
    window: int = 128

    def problems(self) -> list[tuple[str, str]]:
        return self.too_small_or_large("window", 1)

    def judge(self) -> Judge:
        past: deque[float] = deque(maxlen=self.window)

        def judge(step: int, value: float) -> Judgement:
            if not math.isfinite(value):
                return Judgement(False, "")
            judgement = self._compared(value, past)
            if not judgement.holds:
                past.append(value)
            return judgement

        return judge

    def _compared(self, value: float, past: deque[float]) -> Judgement:
        if len(past) < self.window:
            return Judgement(False, "")
        mean = math.fsum(past) / len(past)
        deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in past) / len(past))
        limit = mean + self.value * max(deviation, LEAST_DEVIATION)
        how = f"(mean {mean:.4g} + {self.value:g} standard deviations of {self.window} values)"
        return Judgement(value > limit, f"above {limit:.4g} {how}")
