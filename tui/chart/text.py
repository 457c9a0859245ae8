"""Text that takes one cell a character, whatever a recipe or a metric is called."""

import re
from unicodedata import normalize

from rich.cells import cell_len

SECOND = "\u200b"
"""Stands behind a character of two cells, for the second: so a text has as many characters as it takes cells."""


def spaced(text: str) -> str:
    """The text with a character for each cell that it takes: composed where it can be, without what takes none."""
    if text.isascii():
        return text
    return "".join(_SPACED[min(2, cell_len(char))](char) if char != "\n" else char for char in normalize("NFC", text))


_SPACED = (lambda _: "", lambda char: char, lambda char: char + SECOND)


def plain(text: str, unicode: bool = True) -> str:
    """The text with `?` for what is not exactly one cell: wide and combining characters, controls and escapes.

    Without `unicode`, for what is not ASCII too; with it, a wide one that has its SECOND stays.
    """
    if text.isascii() and text.isprintable():
        return text
    parts = re.split(f"(.{SECOND})", text) if unicode else [text]
    return "".join(part[0] if _is_pair(part) else _signs(part, unicode) for part in parts)


def _signs(text: str, unicode: bool) -> str:
    return "".join(char if _fits(char, unicode) else "?" for char in text)


def _is_pair(part: str) -> bool:
    return len(part) == 2 and part[1] == SECOND and cell_len(part[0]) == 2


def _fits(char: str, unicode: bool) -> bool:
    return char.isprintable() and cell_len(char) == 1 and (unicode or char.isascii())
