"""Watch rules: conditions on metrics, checked on each step's row, and what is done when one holds."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Any

from launcher.protocol import Metrics, Verb
from launcher.recipe import Watch

Fire = Callable[[Watch, int, float], None]


class Watcher:
    """One rule's memory."""

    def __init__(self, rule: Watch) -> None:
        self.rule = rule
        self._past: deque[float] = deque(maxlen=rule.window)
        self._run = 0
        self._quiet_until = -1

    def see(self, step: int, value: float) -> bool:
        """Takes a value in; whether the rule fires on it."""
        holds = self._holds(value)
        if math.isfinite(value) and not holds:
            self._past.append(value)
        self._run = self._run + 1 if holds else 0
        if self._run < self.rule.steps or step < self._quiet_until:
            return False
        self._run = 0
        self._quiet_until = step + self.rule.cooldown
        return True

    def forget(self) -> None:
        """After a rollback: what was seen belongs to another line."""
        self._past.clear()
        self._run = 0
        self._quiet_until = -1

    def _holds(self, value: float) -> bool:
        rule = self.rule
        if rule.not_finite:
            return not math.isfinite(value)
        if rule.above is not None:
            return value > rule.above
        if rule.below is not None:
            return value < rule.below
        if rule.sigma is None or len(self._past) < rule.window or not math.isfinite(value):
            return False
        mean = math.fsum(self._past) / len(self._past)
        spread = math.sqrt(math.fsum((v - mean) ** 2 for v in self._past) / len(self._past))
        return value > mean + rule.sigma * max(spread, 1e-12)


class Watching:
    """All rules of a recipe."""

    def __init__(self, rules: tuple[Watch, ...], fire: Fire) -> None:
        self._watchers = [Watcher(rule) for rule in rules]
        self._fire = fire

    def see(self, row: Metrics) -> None:
        for watcher in self._watchers:
            value = row.values.get(watcher.rule.metric)
            if value is not None and watcher.see(row.step, value):
                self._fire(watcher.rule, row.step, value)

    def forget(self) -> None:
        for watcher in self._watchers:
            watcher.forget()


def action(rule: Watch) -> tuple[Verb, dict[str, Any]] | None:
    """The command that a rule gives; None for an alert."""
    if rule.action == "pause":
        return "pause", {}
    if rule.action == "stop":
        return "stop", {}
    if rule.action == "rollback":
        return "rollback", {"checkpoint": "golden", "skip": rule.skip, "lr_scale": rule.lr_scale}
    return None
