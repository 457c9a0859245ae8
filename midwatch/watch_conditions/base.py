"""What a condition of a watch rule is: parameters from the recipe, and a judge of a metric's values."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

MOST = 1_000_000
"""Values or steps that a condition may look back on."""


class Judgement(NamedTuple):
    """What a condition makes of a value."""

    holds: bool
    threshold: str
    """What the value was compared with, in words, as `above 4`; empty: with nothing yet."""


Judge = Callable[[int, float], Judgement]
"""Takes in the metric's value of a step; values come in the order of steps. It may remember them."""


class WatchCondition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A condition on one metric. Its fields are its parameters, read from the recipe by their types.

    Another package brings one as an entry point of the group `midwatch.watch_conditions`, which refers to a subclass. A rule names
    it:

        condition = { name = "plateau", steps = 500 }
    """

    def problems(self) -> list[tuple[str, str]]:
        """(parameter, what is wrong with it and the way out)."""
        return []

    def too_small_or_large(self, key: str, least: int, most: int = MOST) -> list[tuple[str, str]]:
        """The problem of a whole number outside these bounds, if it is."""
        value = getattr(self, key)
        if least <= value <= most:
            return []
        return [(key, f"must be at least {least}" if value < least else f"must be at most {most:,}")]

    def judge(self) -> Judge:
        """A judge that has seen nothing yet. After a rollback a new one begins: what was seen belongs to another line."""
        raise NotImplementedError
