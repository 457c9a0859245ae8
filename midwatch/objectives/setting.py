"""What a key of an objective's settings means, and which values it takes: metadata of a struct's field.

    class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        beta: Annotated[float, Setting("strength of the tie to the reference", least=0, live=(0, 100))] = 0.1

The recipe's checks, the live settings and the docs are derived from it.
"""

from __future__ import annotations

import functools
import math
import typing
from dataclasses import dataclass

import msgspec

Problem = tuple[str, str]
"""(key, what is wrong and the way out)."""


@dataclass(frozen=True)
class Setting:
    """Of one key."""

    help: str
    least: float = -math.inf
    """Of a number in a recipe."""
    most: float = math.inf
    above: bool = False
    """Whether `least` itself is too small."""
    live: tuple[float, float] | None = None
    """Bounds between which the key can be changed while a run trains; None: it cannot be."""
    unset: float | str = 0.0
    """The live value where the recipe leaves the key out: a number, or the key of the stage whose value it takes."""
    when: tuple[str, object] | None = None
    """Another key of the same settings and the value that it must have for this one to mean anything."""

    def problem(self, value: object) -> str | None:
        """Why a recipe cannot have this value."""
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return None
        small = value <= self.least if self.above else value < self.least
        if not small and value <= self.most and math.isfinite(value):
            return None
        if math.isfinite(self.least) and math.isfinite(self.most):
            return f"must lie between {self.least:g} and {self.most:g}"
        if not math.isfinite(self.least):
            return "must be finite"
        if self.above:
            return f"must be greater than {self.least:g} and finite"
        return "must not be negative, and finite" if self.least == 0 else f"must be at least {self.least:g} and finite"


class NoSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of an objective that has none of its own."""


@functools.cache
def settings_of(kind: type[msgspec.Struct]) -> dict[str, Setting]:
    """The metadata of each of a struct's fields that has any, in their order."""
    hints = typing.get_type_hints(kind, include_extras=True)
    found: dict[str, Setting] = {}
    for key in kind.__struct_fields__:
        for each in getattr(hints[key], "__metadata__", ()):
            if isinstance(each, Setting):
                found[key] = each
    return found


def in_force(settings: msgspec.Struct, setting: Setting) -> bool:
    """Whether a key means anything beside the others."""
    return setting.when is None or getattr(settings, setting.when[0]) == setting.when[1]


def problems(settings: msgspec.Struct) -> list[Problem]:
    """Of each value that lies outside of its bounds, or means nothing beside the others."""
    found: list[Problem] = []
    defaults = type(settings)()
    for key, setting in settings_of(type(settings)).items():
        value = getattr(settings, key)
        message = setting.problem(value)
        if message is not None:
            found.append((key, message))
        elif not in_force(settings, setting) and value != getattr(defaults, key):
            assert setting.when is not None
            other, needed = setting.when
            found.append((key, f'is for {other} "{needed}" (drop it, or use that)'))
    return found
