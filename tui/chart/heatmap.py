"""The heat map: thousands of cells as one widget; of its rows those that changed are sent to the terminal.

A map is a list of lines, each a label and some cells (a node and its GPUs, a rack and its nodes). Lines fill the height and then
go on in further blocks to the right. A cell is a digit (tens of per cent), a pair of digits (mean and worst), or the number
itself; a letter marks what is wrong. Colour says nothing that the characters do not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.segment import Segment
from textual.events import Click, MouseScrollDown, MouseScrollUp, Resize
from textual.geometry import Region
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from tui.chart.render import Canvas
from tui.chart.styles import STYLES, Ink
from tui.chart.text import plain

Style = Literal["digit", "pair", "number"]
CELL = {"digit": 1, "pair": 3, "number": 5}
LEAST_WORD = 8
"""Cells that a line has at least, so that a node's state fits."""
NONE = {True: "·", False: "."}


class HeatLine(NamedTuple):
    """A label, the letter of its state, and its cells [first, first + cells); a word in their place where they mean nothing."""

    label: str
    sign: str
    first: int
    cells: int
    word: str = ""
    dim: bool = False  # it takes no part


@dataclass(frozen=True)
class HeatMap:
    """What is shown. `heat` and `worst` are [cells], parts of the scale, NaN where there is no figure."""

    lines: Sequence[HeatLine]
    style: Style
    heat: NDArray[np.float64]
    worst: NDArray[np.float64]
    marks: NDArray[np.str_]
    numbers: Sequence[str] = ()
    """Of each cell, for the style `number`."""
    grave: str = ""
    """The marks that are alarms."""


class HeatmapLayout(NamedTuple):
    """Where things are: blocks side by side, each of `rows` lines."""

    label: int
    cells: int  # of the longest line
    block: int  # its width, with the gap
    blocks: int
    rows: int


def shape(lines: int, label: int, cells: int, style: Style, width: int, height: int) -> HeatmapLayout:
    """The lines down and then to the right; more rows than `height` where they do not fit."""
    block = label + 2 + max(LEAST_WORD, cells * CELL[style]) + 1
    most = max(1, (width + 1) // block)
    needed = max(1, -(-lines // max(1, height)))
    blocks = min(most, needed)
    return HeatmapLayout(label, cells, block, blocks, max(1, -(-lines // blocks)))


def fits(made: HeatmapLayout, width: int, height: int) -> bool:
    return made.rows <= height and made.block - 1 <= width


def paint(
    heat: HeatMap,
    made: HeatmapLayout,
    width: int,
    height: int,
    top: int = 0,
    chosen: tuple[int, int] | None = None,
    unicode: bool = True,
) -> Canvas:
    """The rows from `top` on; `chosen` is the cursor's line and cell."""
    canvas = Canvas.blank(width, height, unicode)
    if not heat.lines or not width or not height:
        return canvas
    whole = Canvas.blank(made.block * made.blocks, height, unicode)
    number = np.arange(len(heat.lines))
    block, row = number // made.rows, number % made.rows - top
    seen = (row >= 0) & (row < height)
    _labels(heat, made, whole, block, row, seen)
    _cells(heat, made, whole, block, row, seen)
    if chosen is not None and seen[chosen[0]]:
        _cursor(heat, made, whole, (int(block[chosen[0]]), int(row[chosen[0]])), chosen)
    cut = min(width, whole.chars.shape[1])
    canvas.chars[:, :cut], canvas.inks[:, :cut] = whole.chars[:, :cut], whole.inks[:, :cut]
    return canvas


def _labels(heat: HeatMap, made: HeatmapLayout, canvas: Canvas, block: Any, row: Any, seen: Any) -> None:
    wide = made.label
    labels = [f"{plain(line.label, canvas.unicode):<{wide}.{wide}}{line.sign:1.1}" for line in heat.lines]
    chars = np.array(labels, f"<U{wide + 1}").view("<U1").reshape(len(labels), wide + 1)
    inks = np.array([Ink.FAINT if line.dim or line.word else Ink.TEXT for line in heat.lines], np.uint8)
    at = np.flatnonzero(seen)
    across = (block[at] * made.block)[:, None] + np.arange(wide + 1)
    canvas.chars[row[at][:, None], across] = chars[at]
    canvas.inks[row[at][:, None], across] = inks[at][:, None]
    for number in at.tolist():
        if heat.lines[number].word:
            word = heat.lines[number].word
            room = made.block - wide - 3
            word = word if len(word) <= room else word[: room - 1] + ("…" if canvas.unicode else "~")
            canvas.write(int(row[number]), int(block[number]) * made.block + wide + 2, word, Ink.WARNING)


def _cells(heat: HeatMap, made: HeatmapLayout, canvas: Canvas, block: Any, row: Any, seen: Any) -> None:
    shown = [number for number in np.flatnonzero(seen).tolist() if not heat.lines[number].word and heat.lines[number].cells]
    if not shown:
        return
    counts = np.array([heat.lines[number].cells for number in shown])
    cell = np.concatenate([np.arange(heat.lines[n].first, heat.lines[n].first + heat.lines[n].cells) for n in shown])
    place = np.arange(len(cell)) - np.repeat(np.cumsum(counts) - counts, counts)
    y = np.repeat(row[shown], counts)
    x = np.repeat(block[shown] * made.block, counts) + made.label + 2 + place * CELL[heat.style]
    dim = np.repeat([heat.lines[number].dim for number in shown], counts)
    digits, inks = _digits(heat.heat[cell], canvas.unicode)
    inks = np.where(dim, Ink.FAINT, inks)
    marks = heat.marks[cell]
    marked = marks != " "
    mark_inks = np.where(np.isin(marks, list(heat.grave)), Ink.ALARM, Ink.WARNING)
    if heat.style == "digit":
        canvas.chars[y, x] = np.where(marked, marks, digits)
        canvas.inks[y, x] = np.where(marked, mark_inks, inks)
        return
    last = CELL[heat.style] - 1
    canvas.chars[y, x + last] = marks
    canvas.inks[y, x + last] = mark_inks
    if heat.style == "pair":
        worst, worst_inks = _digits(heat.worst[cell], canvas.unicode)
        for offset, chars, ink in ((0, digits, inks), (1, worst, np.where(dim, Ink.FAINT, worst_inks))):
            canvas.chars[y, x + offset], canvas.inks[y, x + offset] = chars, ink
        return
    none = NONE[canvas.unicode]
    texts = [f"{heat.numbers[at] or none:>{last}.{last}}" for at in cell.tolist()]
    across = x[:, None] + np.arange(last)
    canvas.chars[y[:, None], across] = np.array(texts, f"<U{last}").view("<U1").reshape(len(texts), last)
    canvas.inks[y[:, None], across] = inks[:, None]


def _digits(parts: Any, unicode: bool) -> tuple[Any, Any]:
    known = np.isfinite(parts)
    level = np.clip(np.where(known, parts, 0.0) * 10 + 1e-9, 0, 9).astype(np.int64)
    chars = np.where(known, np.array(list("0123456789"))[level], NONE[unicode])
    inks = np.where(known, Ink.HEAT_0 + level // 2, Ink.FAINT)
    return chars, inks.astype(np.uint8)


def _cursor(heat: HeatMap, made: HeatmapLayout, canvas: Canvas, at: tuple[int, int], chosen: tuple[int, int]) -> None:
    """The chosen cell and its label stand out by reversal, which needs no colour."""
    block, row = at
    line = heat.lines[chosen[0]]
    left = block * made.block
    canvas.inks[row, left : left + len(plain(line.label, canvas.unicode)[: made.label])] = Ink.HERE
    start = left + made.label + 2
    if line.word or not line.cells:
        canvas.inks[row, start : start + LEAST_WORD] = Ink.HERE
    else:
        wide = CELL[heat.style]
        canvas.inks[row, start + chosen[1] * wide : start + (chosen[1] + 1) * wide] = Ink.HERE


class Heat(Widget):
    """Shows a heat map; keeps the cursor in sight."""

    DEFAULT_CSS = "Heat { width: 1fr; height: 1fr; margin: 0 0 0 1; }"
    ALLOW_SELECT = False

    class Pointed(Message):
        """A cell was clicked."""

        def __init__(self, line: int, cell: int) -> None:
            super().__init__()
            self.line, self.cell = line, cell

    class Scrolled(Message):
        def __init__(self, by: int) -> None:
            super().__init__()
            self.by = by

    def __init__(self, *, unicode: bool = True, id: str | None = None) -> None:
        super().__init__(id=id)
        self._unicode = unicode
        self._map: HeatMap | None = None
        self._shape = HeatmapLayout(1, 1, 1, 1, 1)
        self._chosen: tuple[int, int] | None = None
        self._canvas = Canvas.blank(0, 0)
        self.top = 0
        self.refreshed = 0
        """Rows that were drawn again, ever."""

    def show(self, heat: HeatMap, made: HeatmapLayout, chosen: tuple[int, int] | None) -> None:
        """Shows another map; repaints the rows in which it differs."""
        self._map, self._shape, self._chosen = heat, made, chosen
        self._repaint()

    def render_line(self, y: int) -> Strip:
        if y >= len(self._canvas.chars):
            return Strip.blank(self.size.width, self.rich_style)
        background = self.rich_style
        segments = [Segment(text, background + STYLES[ink]) for text, ink in self._canvas.row(y)]
        return Strip(segments, self._canvas.chars.shape[1])

    def _repaint(self) -> None:
        width, height = self.size
        old = self._canvas
        if self._map is None:
            return
        if self._chosen is not None:
            row = self._chosen[0] % self._shape.rows
            self.top = min(max(self.top, row - height + 1), row)
        self.top = max(0, min(self.top, self._shape.rows - height))
        self._canvas = paint(self._map, self._shape, width, height, self.top, self._chosen, self._unicode)
        regions = [Region(left, row, right - left, 1) for row, left, right in self._canvas.changes(old)]
        self.refreshed += len(regions)
        if regions:
            self.refresh(*regions)

    def on_resize(self, event: Resize) -> None:
        self._repaint()

    def on_click(self, event: Click) -> None:
        made, heat = self._shape, self._map
        line = event.x // made.block * made.rows + event.y + self.top
        if heat is not None and event.y + self.top < made.rows and line < len(heat.lines):
            cell = (event.x % made.block - made.label - 2) // CELL[heat.style]
            self.post_message(self.Pointed(line, max(0, min(cell, heat.lines[line].cells - 1))))

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        self.post_message(self.Scrolled(1))
        event.stop()

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        self.post_message(self.Scrolled(-1))
        event.stop()
