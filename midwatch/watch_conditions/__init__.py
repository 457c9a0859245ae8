"""Conditions of watch rules, one class each."""

from midwatch.watch_conditions.base import Judge, Judgement, WatchCondition
from midwatch.watch_conditions.registry import BUILT_IN, GROUP, ConditionError, make_condition

__all__ = ["BUILT_IN", "GROUP", "ConditionError", "Judge", "Judgement", "WatchCondition", "make_condition"]
