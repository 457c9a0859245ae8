"""Conditions on a single value: above, below, not finite."""

from __future__ import annotations

import math

from midwatch.watch_conditions.base import Judge, Judgement, WatchCondition


class Above(WatchCondition, frozen=True, kw_only=True):
    value: float

    def judge(self) -> Judge:
        return lambda step, value: Judgement(value > self.value, f"above {self.value:g}")


class Below(WatchCondition, frozen=True, kw_only=True):
    value: float

    def judge(self) -> Judge:
        return lambda step, value: Judgement(value < self.value, f"below {self.value:g}")


class NotFinite(WatchCondition, frozen=True, kw_only=True):
    """Holds of NaN and infinity."""

    def judge(self) -> Judge:
        return lambda step, value: Judgement(not math.isfinite(value), "not finite")
