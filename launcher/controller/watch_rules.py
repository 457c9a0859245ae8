"""Watch rules: conditions on metrics, checked on each step's row, and what is done when one holds."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from midwatch.protocol import Metrics
from midwatch.recipe import Watch
from midwatch.recipe.watch import TRENDS, Condition
from midwatch.words import plural


class Firing(NamedTuple):
    """What a rule has seen when it fired."""

    value: float
    """Of the rule's metric."""
    threshold: str
    """What the rule compares it with, as `above 4`."""
    others: str
    """The other conditions' metrics and values; empty: there are none."""

    def words(self, metric: str) -> str:
        return f"{metric} is {self.value:g}, threshold: {self.threshold}" + (f"; {self.others}" if self.others else "")


Fire = Callable[[Watch, int, Firing], None]
"""The rule, the step, and what it has seen there."""


class ConditionState:
    """One condition's memory of its metric."""

    def __init__(self, condition: Condition) -> None:
        self._condition = condition
        self._past: deque[float] = deque(maxlen=condition.window)
        """What `sigma` compares with."""
        self._trend: deque[tuple[int, float]] = deque()
        """Steps and values of the last `over` steps, where it is a trend that is asked for."""
        self._trends = any(getattr(condition, key) is not None for key in TRENDS)
        self.value = math.nan
        self.holds = False
        """Of the newest value."""
        self.threshold = ""
        """What the newest value was compared with, in words."""

    def see(self, step: int, value: float) -> None:
        """Takes a value in."""
        if self._trends and math.isfinite(value):
            self._trend.append((step, value))
            while self._trend[0][0] <= step - self._condition.over:
                self._trend.popleft()
        self.value, self.holds = value, self._judge(step, value)
        if math.isfinite(value) and not self.holds:
            self._past.append(value)

    def forget(self) -> None:
        self._past.clear()
        self._trend.clear()
        self.value, self.holds, self.threshold = math.nan, False, ""

    def _judge(self, step: int, value: float) -> bool:
        rule = self._condition
        if rule.not_finite:
            self.threshold = "not finite"
            return not math.isfinite(value)
        if rule.above is not None:
            self.threshold = f"above {rule.above:g}"
            return value > rule.above
        if rule.below is not None:
            self.threshold = f"below {rule.below:g}"
            return value < rule.below
        if self._trends:
            return self._has_changed(step)
        if rule.sigma is None or len(self._past) < rule.window or not math.isfinite(value):
            return False
        mean = math.fsum(self._past) / len(self._past)
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in self._past) / len(self._past))
        limit = mean + rule.sigma * max(spread, 1e-12)
        self.threshold = f"above {limit:.4g} (mean {mean:.4g} + {rule.sigma:g} standard deviations of {rule.window} values)"
        return value > limit

    def _has_changed(self, step: int) -> bool:
        rule = self._condition
        quarter = rule.over / 4
        old = [value for at, value in self._trend if at <= step - rule.over + quarter]
        new = [value for at, value in self._trend if at > step - quarter]
        if not old or not new:
            return False
        before, now = math.fsum(old) / len(old), math.fsum(new) / len(new)
        means = f"(mean {before:.4g} -> {now:.4g} over {plural(rule.over, 'step')})"
        if rule.change_above is not None:
            self.threshold = f"change above {rule.change_above:g} {means}"
            return now - before > rule.change_above
        if rule.change_below is not None:
            self.threshold = f"change below {rule.change_below:g} {means}"
            return now - before < rule.change_below
        if before <= 0:  # a ratio to less than nothing says nothing
            return False
        ratio = now / before
        if rule.ratio_above is not None:
            self.threshold = f"ratio above {rule.ratio_above:g} {means}"
            return ratio > rule.ratio_above
        self.threshold = f"ratio below {rule.ratio_below or 0.0:g} {means}"
        return ratio < (rule.ratio_below or 0.0)


class RuleState:
    """One rule's memory."""

    def __init__(self, rule: Watch) -> None:
        self.rule = rule
        self._own = ConditionState(rule)
        self._others = [(other.metric, ConditionState(other)) for other in rule.others]
        self._run = 0
        self._quiet_until = -1

    def see(self, step: int, values: Mapping[str, float]) -> bool:
        """Takes a row in; whether the rule fires on it. It can where the row has the rule's own metric."""
        for metric, held in self._others:
            if metric in values:
                held.see(step, values[metric])
        value = values.get(self.rule.metric)
        if value is None:
            return False
        self._own.see(step, value)
        holds = self._own.holds and all(held.holds for _, held in self._others)
        self._run = self._run + 1 if holds else 0
        if self._run < self.rule.steps or step < self._quiet_until:
            return False
        self._run = 0
        self._quiet_until = step + self.rule.cooldown
        return True

    def firing(self) -> Firing:
        """What it has just fired on."""
        others = ", ".join(f"{metric} is {held.value:g} ({held.threshold})" for metric, held in self._others)
        return Firing(self._own.value, self._own.threshold, others)

    def forget(self) -> None:
        """After a rollback: what was seen belongs to another line."""
        for held in (self._own, *(held for _, held in self._others)):
            held.forget()
        self._run = 0
        self._quiet_until = -1


class WatchRules:
    """All rules of a recipe."""

    def __init__(self, rules: tuple[Watch, ...], fire: Fire) -> None:
        self._watchers = [RuleState(rule) for rule in rules]
        self._fire = fire

    def see(self, row: Metrics) -> None:
        for watcher in self._watchers:
            if watcher.see(row.step, row.values):
                self._fire(watcher.rule, row.step, watcher.firing())

    def forget(self) -> None:
        for watcher in self._watchers:
            watcher.forget()
