"""Watch rules: conditions on metrics, checked on each step's row, and what is done when one holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from midwatch.protocol import Metrics
from midwatch.recipe import Watch
from midwatch.recipe.watch import Condition
from midwatch.watch_conditions import ConditionError


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
    """One condition, and what it makes of the newest value of its metric."""

    def __init__(self, condition: Condition) -> None:
        """Raises ConditionError."""
        self._condition = condition.make()
        self._judge = self._condition.judge()
        self.value = math.nan
        self.holds = False
        """Of the newest value."""
        self.threshold = ""
        """What the newest value was compared with, in words."""

    def see(self, step: int, value: float) -> None:
        """Takes a value in."""
        self.value = value
        self.holds, self.threshold = self._judge(step, value)

    def forget(self) -> None:
        self._judge = self._condition.judge()
        self.value, self.holds, self.threshold = math.nan, False, ""


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
    """All rules of a recipe. One whose condition is missing or broken is left out, and the others go on."""

    def __init__(self, rules: tuple[Watch, ...], fire: Fire) -> None:
        self._watchers: list[RuleState] = []
        self._fire = fire
        self.broken: list[tuple[Watch, str]] = []
        """Rules that watch nothing, and why; whoever reports them takes them from here."""
        for rule in rules:
            try:
                self._watchers.append(RuleState(rule))
            except Exception as error:  # of a condition that another package brings
                self._break(rule, error)

    def _break(self, rule: Watch, error: Exception) -> None:
        why = str(error) if isinstance(error, ConditionError) else f"its condition has failed: {type(error).__name__}: {error}"
        self.broken.append((rule, f"{rule.name}: the rule watches no more: {why}"))

    def see(self, row: Metrics) -> None:
        for watcher in tuple(self._watchers):
            try:
                fires = watcher.see(row.step, row.values)
            except Exception as error:
                self._watchers.remove(watcher)
                self._break(watcher.rule, error)
                continue
            if fires:
                self._fire(watcher.rule, row.step, watcher.firing())

    def forget(self) -> None:
        for watcher in tuple(self._watchers):
            try:
                watcher.forget()
            except Exception as error:
                self._watchers.remove(watcher)
                self._break(watcher.rule, error)
