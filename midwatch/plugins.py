"""What other packages bring to Midwatch: entry points of theirs, found by name and imported only when something asks for them."""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points


class PluginError(Exception):
    """There is no such plugin, or it is broken; the message names it and its package."""


def plugin_names(group: str) -> list[str]:
    """Names that are there, whether they work or not."""
    return sorted({entry.name for entry in entry_points(group=group)})


def load_plugin(group: str, name: str, known: tuple[str, ...] = ()) -> object:
    """What the entry point of this name refers to. Raises PluginError.

    known: names that Midwatch has itself, for the message.
    """
    found = {_origin(entry): entry for entry in entry_points(group=group) if entry.name == name}
    if not found:
        names = ", ".join([*known, *plugin_names(group)])
        raise PluginError(f"there is no {name!r} (there are: {names}; other packages bring more as entry points of {group})")
    if len(found) > 1:
        raise PluginError(f"{name!r} is brought by several packages, {' and '.join(sorted(found))}; uninstall all but one")
    ((origin, entry),) = found.items()
    try:
        return entry.load()
    except Exception as error:  # whatever another's module raises while it is imported
        raise PluginError(f"{name!r} of {origin} cannot be imported: {type(error).__name__}: {error}") from error


def _origin(entry: EntryPoint) -> str:
    return f"package {entry.dist.name}" if entry.dist is not None else entry.value
