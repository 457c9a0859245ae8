"""Bounds of numbers in a recipe: wide enough for any run, and narrow enough that what is reckoned from them fits in 64 bits."""

from __future__ import annotations

from collections.abc import Iterable

MOST_COUNT = 1_000_000
"""Of nodes, ranks, threads and the like."""
MOST_STEPS = 10**12
MOST_TOKENS = 1 << 40
"""Of a row, a batch or a file's part."""


def bounded(section: object, least: int, most: int, keys: Iterable[str]) -> list[tuple[str, str]]:
    """(key, what is wrong) for each of the keys whose value lies outside; None is a value that was left out."""
    found = []
    for key in keys:
        value = getattr(section, key)
        if value is None or least <= value <= most:
            continue
        small = "must not be negative" if least == 0 else f"must be at least {least}"
        found.append((key, small if value < least else f"must be at most {most:,}"))
    return found
