"""Hidden files, which programs put next to data: not read from directories, archives and globs unless they are named."""

from __future__ import annotations

from collections.abc import Iterable

from shards.readers.base import SPECIAL

_FILES = frozenset(("_success", "_metadata", "_common_metadata", "thumbs.db", "desktop.ini", ".ds_store"))
_DIRECTORIES = frozenset(("__macosx", "_temporary", "_delta_log", ".ipynb_checkpoints"))


def is_hidden(parts: Iterable[str], *, dotted: bool = True) -> bool:
    """Whether a path has a hidden part: macOS's copies of attributes (`._NAME`), notebooks' checkpoints, Spark's and Delta's marks.

    parts: the names along the path, below what the user has named. dotted: names that begin with a dot are hidden, all of them.
    """
    return any(
        part.startswith("._") or part.lower() in _FILES or part.lower() in _DIRECTORIES or (dotted and part.startswith("."))
        for part in parts
    )


def is_hidden_match(path: str, pattern: str, *, dotted: bool = True) -> bool:
    """The same for a match of a glob: a part that the pattern spells out, or whose leading dot it has, counts as named."""
    named = pattern.split("/")
    asks = any(part.startswith(".") and SPECIAL.search(part) for part in named)
    parts = [part for part in path.split("/") if part not in named and not (asks and part.startswith("."))]
    return is_hidden(parts, dotted=dotted)
