"""From an objective's name to its spec.

Each folder of `trainer.objectives` that has a `spec.py` is an objective, and so is each entry point of the group
`midwatch.objectives` that an installed package has. A spec is imported when its name is asked for, so that a broken one stops only
what asks for it. The folders are found by name at run time, as entry points are: this package does not depend on the trainer.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from midwatch.objectives.spec import ObjectiveSpec

GROUP = "midwatch.objectives"
BUILT_IN = "trainer.objectives"


class ObjectiveError(ValueError):
    """There is no such objective, or it cannot be loaded; the message names it, its place and the way out."""


@dataclass(frozen=True)
class _Place:
    module: str
    attribute: str
    package: str
    """Who brings it, for messages."""

    @property
    def shown(self) -> str:
        return f"{self.module}:{self.attribute}"


@functools.cache
def spec_of(name: str) -> ObjectiveSpec:
    """Raises ObjectiveError."""
    places = _places().get(name, ())
    if not places:
        close = difflib.get_close_matches(name, _places(), 1)
        hint = f'did you mean "{close[0]}"? ' if close else ""
        raise ObjectiveError(f'there is no objective "{name}" ({hint}there are: {", ".join(names())})')
    if len(places) > 1:
        brought = " and ".join(f"{place.package} ({place.shown})" for place in places)
        raise ObjectiveError(f'objective "{name}" is brought twice, by {brought} (uninstall one of them)')
    (place,) = places
    where = f'objective "{name}" of {place.package} ({place.shown})'
    try:
        found = functools.reduce(getattr, place.attribute.split("."), importlib.import_module(place.module))
    except Exception as error:  # whatever the code of another package raises
        raise ObjectiveError(f"{where} cannot be loaded: {type(error).__name__}: {error} (correct or uninstall it)") from error
    if not isinstance(found, ObjectiveSpec):
        raise ObjectiveError(f"{where} is a {type(found).__name__}, not an ObjectiveSpec (correct or uninstall it)")
    if found.name != name:
        raise ObjectiveError(f'{where} names itself "{found.name}" (give the entry point that name)')
    return found


def names() -> list[str]:
    """All objectives that are installed, working or not."""
    return sorted(_places())


def built_in() -> list[ObjectiveSpec]:
    """Midwatch's own."""
    return [spec_of(name) for name in _folders() if len(_places()[name]) == 1]


@functools.cache
def _folders() -> tuple[str, ...]:
    try:
        package = importlib.util.find_spec(BUILT_IN)
    except ModuleNotFoundError:
        return ()
    roots = package.submodule_search_locations if package is not None else None
    return tuple(sorted({file.parent.name for root in roots or () for file in Path(root).glob("*/spec.py")}))


@functools.cache
def _places() -> dict[str, tuple[_Place, ...]]:
    found = {name: [_Place(f"{BUILT_IN}.{name}.spec", "SPEC", "midwatch")] for name in _folders()}
    for entry in entry_points(group=GROUP):
        place = _Place(entry.module, entry.attr, _package(entry))
        if place not in found.setdefault(entry.name, []):
            found[entry.name].append(place)
    return {name: tuple(places) for name, places in found.items()}


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else entry.module.partition(".")[0]
