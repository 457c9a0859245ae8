"""`[[watch]]`: a condition on a metric, or several at once, and what is done when they hold."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from midwatch.commands import BY_VERB, SPECS, CommandError, TypedCommand, parse_command
from midwatch.recipe.bounds import MOST_COUNT, MOST_STEPS, bounded
from midwatch.watch_conditions import BUILT_IN, ConditionError, WatchCondition, make_condition


class Condition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that may hold of a metric, by exactly one of the keys from `above` to `condition`.

    Changes and ratios compare the metric with its own past: its mean over the newest quarter of the last `over` steps with that
    over the oldest quarter of them. They are silent until both have a value.
    """

    metric: str
    """Slash-path of the metric, as `train/loss`."""
    above: float | None = None
    below: float | None = None
    sigma: float | None = None
    """Standard deviations over the mean of the last `window` values."""
    not_finite: bool = False
    """Holds of NaN and infinity."""
    change_above: float | None = None
    """It has changed by more than this: newest mean minus oldest."""
    change_below: float | None = None
    ratio_above: float | None = None
    """Newest mean over oldest."""
    ratio_below: float | None = None
    condition: dict[str, Any] | None = None
    """A condition by its name, with its parameters, as `{ name = "plateau", steps = 500 }`; another package may bring it."""
    window: int = 128
    """Values that `sigma` looks back on; it is silent until there are so many."""
    over: int = 200
    """Steps that changes and ratios look back on."""

    @property
    def _given(self) -> list[str]:
        """Keys of the conditions that it has."""
        keys = (*BUILT_IN, "condition")
        return [key for key in keys if getattr(self, key) is not None and getattr(self, key) is not False]

    def problems(self) -> list[tuple[str, str]]:
        """(key, what is wrong and the way out). Whether another package's condition is there is not among it: see `make`."""
        found: list[tuple[str, str]] = []
        given = self._given
        numbers = [key for key in given if key not in ("not_finite", "condition")]
        found += [(key, "must be a finite number") for key in numbers if not math.isfinite(getattr(self, key))]
        if len(given) != 1:
            keys = ", ".join((*BUILT_IN, "condition"))
            found.append(("metric", f"needs exactly one of {keys}, but has {', '.join(given) or 'none'}"))
        found += bounded(self, 1, MOST_COUNT, ("window",))
        found += bounded(self, 4, MOST_COUNT, ("over",))
        if self.condition is not None:
            name = self.condition.get("name")
            if not isinstance(name, str):
                found.append(("condition", 'needs the name of a condition, as { name = "above", value = 4 }'))
            elif name in BUILT_IN and len(given) == 1:
                try:
                    self.make()
                except ConditionError as error:
                    found.append(("condition", str(error)))
        return found

    def make(self) -> WatchCondition:
        """What judges the metric's values. Raises ConditionError.

        Another package's condition is imported here, and never while a recipe is read.
        """
        key = self._given[0]
        if self.condition is not None:
            name = str(self.condition.get("name"))
            return make_condition(name, {key: value for key, value in self.condition.items() if key != "name"})
        fields = BUILT_IN[key].__struct_fields__
        parameters = {"value": getattr(self, key), "window": self.window, "over": self.over}
        return make_condition(key, {name: value for name, value in parameters.items() if name in fields})


class Watch(Condition, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One watch rule."""

    name: str
    others: tuple[Condition, ...] = msgspec.field(default=(), name="and")
    """What must hold as well, by the newest value of each one's metric."""
    steps: int = 1
    """Values in a row for which all of it must hold."""
    action: str = "alert"
    """What follows the alarm when it fires: `alert` (nothing), or a command as it is typed, as `set lr_scale=0.5`. `rollback` alone
    goes back to the newest golden checkpoint, with `skip` and `lr_scale`."""
    skip: int = 0
    """Rollback: steps of data to pass over."""
    lr_scale: float = 1.0
    """Rollback: factor on the learning rate."""
    cooldown: int = 100
    """Steps after firing in which the rule is silent."""

    def problems(self) -> list[tuple[str, str]]:
        found = [("name" if key == "metric" else key, message) for key, message in Condition.problems(self)]
        for other in self.others:
            found += [("and", f"{other.metric}: {key}: {message}") for key, message in other.problems()]
        found += bounded(self, 1, MOST_STEPS, ("steps",))
        if not 0 < self.lr_scale < math.inf:
            found.append(("lr_scale", "must be greater than 0 and finite"))
        found += bounded(self, 0, MOST_STEPS, ("skip", "cooldown"))
        try:
            self.command()
        except CommandError as error:
            found.append(("action", str(error)))
        return found

    def command(self) -> TypedCommand | None:
        """What is asked of the run when the rule fires; None: nothing, an alarm is enough. Raises CommandError."""
        if self.action == "alert":
            return None
        if self.action == "rollback":
            arguments = {"checkpoint": "golden", "skip": self.skip, "lr_scale": self.lr_scale}
            return TypedCommand("rollback", arguments)
        found = parse_command(self.action)
        if not BY_VERB[found.verb].by_rule:
            usable = ", ".join(["alert", *(spec.typed for spec in SPECS if spec.by_rule)])
            raise CommandError(f"{self.action}: a rule cannot give this command (it can: {usable})")
        if found.verb == "rollback" and (self.skip, self.lr_scale) != (0, 1.0):
            raise CommandError("skip and lr_scale belong to `rollback` alone; write them as --skip and --lr-scale here")
        return found
