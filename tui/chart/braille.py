"""The braille canvas: M4 columns to dots, dots to characters. Pure numpy.

A cell of the terminal holds 2 dot columns and 4 dot rows (Unicode U+2800 block). Dot row 0 is at the top. A column of
the data is one dot column: a bar from its smallest to its largest value, joined to the column before it by a line from
that one's last value to its own first. All of it is vertical runs of dots, one or more a dot column, so the whole
canvas is one cumulative sum, whatever the number of columns.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Dots = NDArray[np.bool_]  # [4 * rows, 2 * columns of cells]
Chars = NDArray[np.str_]  # [rows, columns of cells], one character each

DOTS_ACROSS, DOTS_DOWN = 2, 4
_WEIGHTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])


def dot_rows(values: Floats, low: float, high: float, height: int, log: bool = False) -> Ints:
    """The dot row of each value: `high` at 0, `low` at height - 1; values beyond them at the edge they passed.

    Monotonic, so the smallest and largest of any set of values have the outermost rows of the set's. With `log`, what
    is not positive lies on the lower edge. NaN lies anywhere: leave it out first.
    """
    if log:
        low, high = np.log10(low), np.log10(high)
        values = np.log10(np.where(values > 0, values, np.nan))
    fraction = (np.clip(values, low, high) - low) / (high - low)
    fraction = np.where(np.isnan(fraction), 0.0, fraction)
    return height - 1 - np.rint(fraction * (height - 1)).astype(np.int64)


def draw(width: int, height: int, x: Ints, first: Ints, low: Ints, high: Ints, last: Ints, joined: Dots) -> Dots:
    """The dots of a line, [height, width].

    x, first, low, high, last, joined are [n], one for each column of data that has a value, x ascending: its dot
    column, the dot rows of its first, smallest, largest and last value, and whether a line comes from the one before.
    """
    ends = np.flatnonzero(joined[1:]) + 1 if len(x) else np.empty(0, np.int64)
    line_x, line_top, line_bottom = _lines(x[ends - 1], last[ends - 1], x[ends], first[ends])
    return _fill(
        width,
        height,
        np.concatenate([x, line_x]),
        np.concatenate([high, line_top]),
        np.concatenate([low, line_bottom]),
    )


def _lines(x0: Ints, y0: Ints, x1: Ints, y1: Ints) -> tuple[Ints, Ints, Ints]:
    """Lines from (x0, y0) to (x1, y1), x1 >= x0, as vertical runs: x, top row, bottom row of each run.

    In dot column c the line covers the rows that it passes between c - 1/2 and c + 1/2, half a column at its two ends;
    a row that it leaves at a column's edge belongs to the next column, so that a diagonal is one dot thick.
    """
    spans = x1 - x0
    line = np.repeat(np.arange(len(x0)), spans + 1)
    c = np.arange(len(line)) - np.repeat(np.cumsum(spans + 1) - spans - 1, spans + 1)
    dx, sign = spans[line], np.where(y1 < y0, -1, 1)[line]
    start, end = y0[line] * sign, y1[line] * sign  # mirrored where it rises on the screen: now every line goes down
    twice = 2 * np.maximum(dx, 1)

    def edge(column: Ints) -> Ints:
        """The row at the right edge of a column, rounded half down the screen."""
        rows: Ints = (2 * start * dx + (end - start) * (2 * column + 1) + dx) // twice
        return rows

    enter = np.where(c == 0, start, edge(c - 1))
    leave = np.where(c == dx, end + 1, edge(c))
    leave = np.maximum(leave - 1, enter)
    top, bottom = np.where(sign > 0, enter, -leave), np.where(sign > 0, leave, -enter)
    return x0[line] + c, top, bottom


def _fill(width: int, height: int, x: Ints, top: Ints, bottom: Ints) -> Dots:
    seen = (x >= 0) & (x < width)
    edges = np.zeros((height + 1, width), np.int32)
    np.add.at(edges, (top[seen], x[seen]), 1)
    np.add.at(edges, (bottom[seen] + 1, x[seen]), -1)
    filled: Dots = np.cumsum(edges[:height], axis=0) > 0
    return filled


def cells(dots: Dots) -> NDArray[np.uint8]:
    """Dots to braille patterns, [4 * rows, 2 * columns] to [rows, columns]; 0 where a cell is empty."""
    rows, columns = dots.shape[0] // DOTS_DOWN, dots.shape[1] // DOTS_ACROSS
    grid = dots.reshape(rows, DOTS_DOWN, columns, DOTS_ACROSS)
    patterns: NDArray[np.uint8] = np.einsum("rdca,da->rc", grid.astype(np.int64), _WEIGHTS).astype(np.uint8)
    return patterns


def characters(patterns: NDArray[np.uint8], unicode: bool = True) -> Chars:
    """Braille patterns to characters; without Unicode, to the ASCII character that fills about the same part of a cell."""
    table = _BRAILLE if unicode else _ASCII
    chars: Chars = table[patterns]
    return chars


def _ascii(pattern: int) -> str:
    """Top half ', middle -, bottom _ or ., several of them | or :."""
    rows = [bool(pattern & int(left | right)) for left, right in _WEIGHTS]
    if sum(rows) >= 3:
        return "|"
    upper, lower = rows[0] or rows[1], rows[2] or rows[3]
    if upper and lower:
        return "-" if rows[1] and rows[2] else ":"
    if upper:
        return "'" if rows[0] else "-"
    return ("." if rows[3] else "-") if lower else " "


def _table(character: Any) -> Chars:
    return np.array([character(pattern) for pattern in range(256)])


_BRAILLE = _table(lambda pattern: chr(0x2800 + pattern) if pattern else " ")
_ASCII = _table(_ascii)
