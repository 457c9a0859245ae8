"""All conditions by name: Midwatch's, and those of other packages."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import msgspec

from midwatch.watch_conditions.base import WatchCondition
from midwatch.watch_conditions.sigma import Sigma
from midwatch.watch_conditions.thresholds import Above, Below, NotFinite
from midwatch.watch_conditions.trend import ChangeAbove, ChangeBelow, RatioAbove, RatioBelow
from shards.common.extensions import ExtensionError, Registry

GROUP = "midwatch.watch_conditions"
BUILT_IN: dict[str, type[WatchCondition]] = {
    "above": Above,
    "below": Below,
    "sigma": Sigma,
    "not_finite": NotFinite,
    "change_above": ChangeAbove,
    "change_below": ChangeBelow,
    "ratio_above": RatioAbove,
    "ratio_below": RatioBelow,
}
REGISTRY = Registry(GROUP, "watch condition", {name: f"{kind.__module__}:{kind.__name__}" for name, kind in BUILT_IN.items()})


class ConditionError(Exception):
    """The condition cannot be used; the message says why."""


def make_condition(name: str, parameters: Mapping[str, Any]) -> WatchCondition:
    """The condition of this name. Another package's is imported here. Raises ConditionError."""
    kind = _kind(name)
    try:
        made = msgspec.convert(parameters, kind)
    except msgspec.ValidationError as error:
        raise ConditionError(f"{name}: {error}") from None
    try:
        found = problems(made)
    except Exception as error:  # of another package's code
        raise ConditionError(f"{name}: its check has failed: {type(error).__name__}: {error}") from error
    if found:
        raise ConditionError(f"{name}: " + "; ".join(f"{key} {message}" for key, message in found))
    return made


def problems(condition: WatchCondition) -> list[tuple[str, str]]:
    """(parameter, what is wrong with it)."""
    values = msgspec.structs.asdict(condition).items()
    infinite = [(key, "must be a finite number") for key, value in values if isinstance(value, float) and not math.isfinite(value)]
    return infinite or condition.problems()


def _kind(name: str) -> type[WatchCondition]:
    try:
        found = REGISTRY.load(name)
    except ExtensionError as error:
        raise ConditionError(str(error)) from None
    if not (isinstance(found, type) and issubclass(found, WatchCondition)):
        raise ConditionError(f"{name!r} is not a WatchCondition, but {found!r}")
    return found
