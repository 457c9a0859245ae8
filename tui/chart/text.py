"""Text that takes one cell a character, whatever a recipe or a metric is called."""

from rich.cells import cell_len


def plain(text: str, unicode: bool = True) -> str:
    """The text with `?` for what is not exactly one cell: wide and combining characters, controls and escapes.

    Without `unicode`, for what is not ASCII too.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if _fits(char, unicode) else "?" for char in text)


def _fits(char: str, unicode: bool) -> bool:
    return char.isprintable() and cell_len(char) == 1 and (unicode or char.isascii())
