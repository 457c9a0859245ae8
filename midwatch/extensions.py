"""Parts that other packages can bring, found by entry point: each kind of part has a group, as `midwatch.backends`.

A package names its parts in its metadata:

    [project.entry-points."midwatch.backends"]
    flux = "my_package.flux:FluxBackend"

The names are read without importing anything. A part is imported when a recipe asks for it, so that a broken one is reported by its
name and stops only what asks for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any


class ExtensionError(Exception):
    """A part does not exist or cannot be loaded; the message names it, its package and the way out."""


@dataclass(frozen=True)
class Registry:
    """The parts of one kind."""

    group: str
    """Of the entry points."""
    kind: str
    """In messages: `backend`."""
    built_in: Mapping[str, str]
    """Name to `module:attribute`. Built-in parts are found by name too, so that a package's metadata may be older than its code."""

    def names(self) -> tuple[str, ...]:
        """All names, built-in ones first."""
        return (*self.built_in, *sorted({each.name for each in self._outside()} - self.built_in.keys()))

    def knows(self, name: str) -> bool:
        return name in self.built_in or any(each.name == name for each in self._outside())

    def load(self, name: str) -> Any:
        """The part of that name, imported. Raises ExtensionError."""
        if name in self.built_in:
            module, _, attribute = self.built_in[name].partition(":")
            return getattr(importlib.import_module(module), attribute)
        found = [each for each in self._outside() if each.name == name]
        if not found:
            raise ExtensionError(f'there is no {self.kind} "{name}" (there are: {", ".join(self.names())})')
        if len(found) > 1:
            packages = " and ".join(sorted(_package(each) for each in found))
            raise ExtensionError(f'{self.kind} "{name}" is in more than one package, {packages} (uninstall one)')
        try:
            return found[0].load()
        except Exception as error:  # whatever somebody else's module raises while it is imported
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ExtensionError(
                f'{self.kind} "{name}" of {_package(found[0])} cannot be loaded ({found[0].value}): {reason}'
            ) from None

    def _outside(self) -> list[EntryPoint]:
        return [each for each in entry_points(group=self.group) if each.name not in self.built_in]


def _package(part: EntryPoint) -> str:
    return f"package {part.dist.name}" if part.dist is not None else part.module
