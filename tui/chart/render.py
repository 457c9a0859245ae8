"""A chart as characters and inks: axes, lines, smoothing, ghosts, stage borders, marks and crosshair. No Textual.

What is drawn later covers what lies beneath: stage borders, ghosts, raw lines, smoothed lines, letters, crosshair. A
cell in which several lines meet shows the dots of all of them in the ink of the last.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from midwatch.metrics.m4_columns import Columns, Grid, smoothed
from tui.chart.braille import DOTS_ACROSS, DOTS_DOWN, Dots, cells, characters, dot_rows, draw
from tui.chart.scale import Scale, compact, duration, nice_step, scale, value_range
from tui.chart.styles import Ink, line_ink, raw_ink
from tui.chart.text import plain

GUTTER = 8  # cells for labels and axis; fixed, so that the columns to ask for depend on the size alone
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

MarkKind = Literal["checkpoint", "golden", "rollback", "spike", "nan"]
MARKS: dict[MarkKind, tuple[str, str, Ink]] = {  # with Unicode, without; the later ones cover the earlier
    "checkpoint": ("◇", "o", Ink.MARK),
    "golden": ("◆", "*", Ink.GOLD),
    "rollback": ("↶", "<", Ink.MARK),
    "spike": ("▲", "^", Ink.ALARM),
    "nan": ("×", "x", Ink.ALARM),
}


@dataclass(frozen=True)
class Series:
    """A line: its columns, the name in the legend, and the steps of its smoothing window (0: none)."""

    columns: Columns
    label: str = ""
    window: int = 0

    @property
    def name(self) -> str:
        return self.label or self.columns.series


class Border(NamedTuple):
    """A stage's first step."""

    step: int
    name: str


class ChartMark(NamedTuple):
    """Something that happened, on the x axis."""

    step: int
    kind: MarkKind


@dataclass(frozen=True)
class Picture:
    """All that a chart shows. `grid` fixes the x axis; columns on an older grid are drawn where their steps lie."""

    title: str
    grid: Grid
    series: tuple[Series, ...] = ()
    ghosts: tuple[Series, ...] = ()  # rolled-back lineages, beneath
    borders: tuple[Border, ...] = ()
    marks: tuple[ChartMark, ...] = ()
    crosshair: int | None = None  # a step
    log: bool = False
    y_range: tuple[float, float] | None = None  # else from the series; ghosts never stretch it
    x_axis: Literal["step", "tokens", "time"] = "step"
    empty: str = "no data yet"


class ChartLayout(NamedTuple):
    """How a chart of some size is laid out: rows and columns of cells."""

    width: int
    height: int
    gutter: int
    top: int  # rows above the plot
    legend: bool
    axis: bool
    labels: bool

    @property
    def plot_rows(self) -> int:
        return max(0, self.height - self.top - self.axis - self.labels)

    @property
    def plot_columns(self) -> int:
        return max(0, self.width - self.gutter)


def frame(width: int, height: int, series: int = 1) -> ChartLayout:
    """The layout; what there is no room for is left out, the plot last."""
    legend = series > 1 and height >= 8
    top = (1 if height >= 3 else 0) + (1 if legend else 0)
    return ChartLayout(width, height, GUTTER if width >= 3 * GUTTER else 0, top, legend, height >= 5, height >= 7)


def dot_columns(width: int) -> int:
    """How many columns to ask for, for a chart `width` cells wide."""
    return frame(width, 1).plot_columns * DOTS_ACROSS


@dataclass
class Canvas:
    """Characters and inks, [height, width] each."""

    chars: NDArray[Any]
    inks: NDArray[np.uint8]
    unicode: bool = True

    @classmethod
    def blank(cls, width: int, height: int, unicode: bool = True) -> "Canvas":
        return cls(np.full((height, width), " ", "<U1"), np.zeros((height, width), np.uint8), unicode)

    def write(self, row: int, column: int, text: str, ink: Ink) -> None:
        """Text on one row, cut at the canvas's edges."""
        height, width = self.chars.shape
        if not 0 <= row < height:
            return
        text = plain(text, self.unicode)
        if column < 0:
            text, column = text[-column:], 0
        text = text[: max(0, width - column)]
        if text:
            self.chars[row, column : column + len(text)] = list(text)
            self.inks[row, column : column + len(text)] = ink

    def row(self, row: int) -> list[tuple[str, int]]:
        """A row as runs of one ink."""
        inks = self.inks[row]
        if len(inks) == 0:
            return []
        edges = [0, *(np.flatnonzero(np.diff(inks)) + 1).tolist(), len(inks)]
        text = "".join(self.chars[row])
        return [(text[low:high], int(inks[low])) for low, high in pairwise(edges)]

    def changes(self, old: "Canvas") -> list[tuple[int, int, int]]:
        """The rows that differ, each with the columns [left, right) in which it does."""
        height, width = self.chars.shape
        if old.chars.shape != self.chars.shape:
            return [(row, 0, width) for row in range(height)]
        if width == 0:
            return []
        differs = (self.chars != old.chars) | (self.inks != old.inks)
        rows = np.flatnonzero(differs.any(axis=1))
        left, right = differs[rows].argmax(axis=1), width - differs[rows][:, ::-1].argmax(axis=1)
        return list(zip(rows.tolist(), left.tolist(), right.tolist(), strict=True))

    def changed_rows(self, old: "Canvas") -> list[int]:
        """The rows that differ; all of them when the size does."""
        if old.chars.shape != self.chars.shape:
            return list(range(len(self.chars)))
        differs = (self.chars != old.chars) | (self.inks != old.inks)
        rows: list[int] = np.flatnonzero(differs.any(axis=1)).tolist()
        return rows


@dataclass
class _Plot:
    """The picture being painted, its layout and its y scale."""

    picture: Picture
    frame: ChartLayout
    canvas: Canvas
    unicode: bool
    scale: Scale | None
    patterns: NDArray[np.uint8] = field(init=False)  # the dots of all lines so far, [plot_rows, plot_columns]

    def __post_init__(self) -> None:
        self.patterns = np.zeros((self.frame.plot_rows, self.frame.plot_columns), np.uint8)

    def column(self, step: int) -> int | None:
        """The canvas column of a step; None outside the plot."""
        grid = self.picture.grid
        cell = (step - grid.start) // grid.column_width // DOTS_ACROSS
        return self.frame.gutter + int(cell) if 0 <= cell < self.frame.plot_columns else None

    def sign(self, unicode: str, ascii: str) -> str:
        return unicode if self.unicode else ascii


def paint(picture: Picture, width: int, height: int, unicode: bool = True) -> Canvas:
    """The picture at a size of cells, any size. Without `unicode`, in ASCII alone."""
    canvas = Canvas.blank(max(0, width), max(0, height), unicode)
    if width <= 0 or height <= 0:
        return canvas
    layout = frame(width, height, len(picture.series))
    plot = _Plot(picture, layout, canvas, unicode, _y_scale(picture, layout))
    _paint_y_axis(plot)
    _paint_borders(plot)
    for ghost in picture.ghosts:
        _paint_line(plot, ghost.columns, _values(ghost.columns), Ink.GHOST)
    for number, series in enumerate(picture.series):
        raw = raw_ink(number) if series.window else line_ink(number)
        _paint_line(plot, series.columns, _values(series.columns), raw)
    for number, series in enumerate(picture.series):
        if series.window:
            _paint_line(plot, series.columns, _smooth_values(series), line_ink(number))
    if len(picture.series) > 1:
        for number, series in enumerate(picture.series):
            _paint_letters(plot, series, number)
    _paint_x_axis(plot)
    _paint_crosshair(plot)
    _paint_title(plot)
    if plot.scale is None:
        text = picture.empty[: layout.plot_columns]
        column = layout.gutter + (layout.plot_columns - len(text)) // 2
        canvas.write(layout.top + layout.plot_rows // 2, column, text, Ink.FAINT)
    return canvas


def _y_scale(picture: Picture, layout: ChartLayout) -> Scale | None:
    found = picture.y_range or _range_in_sight(picture)
    return found and scale(*found, ticks=max(2, layout.plot_rows // 3), log=picture.log)


def _range_in_sight(picture: Picture) -> tuple[float, float] | None:
    """What the lines span, and the ghosts: the spike that was rolled back stays in sight.

    The ghosts take no more than twice the height of the lines. What lies beyond that ends at the edge.
    """

    def spanned(lines: Sequence[Series]) -> tuple[float, float] | None:
        return value_range([(line.columns.min, line.columns.max) for line in lines], picture.log)

    own, past = spanned(picture.series), spanned(picture.ghosts)
    if own is None or past is None:
        return own or past
    low, high = own
    reach = high - low
    return (low if picture.log else min(low, max(past[0], low - reach)), max(high, min(past[1], high + reach)))


def _values(columns: Columns) -> NDArray[np.float64]:
    """First, min, max and last of each column: [4, n]."""
    table = columns.table
    return np.stack([table["first"], table["min"], table["max"], table["last"]])


def _smooth_values(series: Series) -> NDArray[np.float64]:
    return np.tile(smoothed(series.columns, series.window), (4, 1))


def line_dots(columns: Columns, values: NDArray[np.float64], grid: Grid, y_scale: Scale, width: int, height: int) -> Dots:
    """The dots of one line, [height, width]: `values` is [4, n], first, min, max and last of each column."""
    drawn = np.flatnonzero(columns.count > 0)
    x = (columns.step_start[drawn] - grid.start) // grid.column_width
    rows = dot_rows(values[:, drawn], y_scale.low, y_scale.high, height, y_scale.log)
    first, low, high, last = rows
    return draw(width, height, x, first, low, high, last, ~columns.gap_before[drawn])


def _paint_line(plot: _Plot, columns: Columns, values: NDArray[np.float64], ink: Ink) -> None:
    rows, width = plot.patterns.shape
    if plot.scale is None or rows == 0 or width == 0:
        return
    dots = line_dots(columns, values, plot.picture.grid, plot.scale, width * DOTS_ACROSS, rows * DOTS_DOWN)
    patterns = cells(dots)
    touched = patterns > 0
    plot.patterns |= patterns
    top, left = plot.frame.top, plot.frame.gutter
    area = (slice(top, top + rows), slice(left, left + width))
    plot.canvas.chars[area][touched] = characters(plot.patterns[touched], plot.unicode)
    plot.canvas.inks[area][touched] = ink


def _paint_letters(plot: _Plot, series: Series, number: int) -> None:
    """The line's letter on it, at its end and at places of its own along it, so that lines differ without colour."""
    rows, width = plot.patterns.shape
    drawn = np.flatnonzero(series.columns.count > 0)
    if plot.scale is None or rows == 0 or len(drawn) == 0:
        return
    lines = len(plot.picture.series)
    places = [(turn + (number + 0.5) / lines) / 3 for turn in range(3)]
    values = _smooth_values(series)[3] if series.window else series.columns.last
    for at in {int(drawn[int(place * len(drawn))]) for place in places if width >= 12 * lines} | {int(drawn[-1])}:
        column = plot.column(int(series.columns.step_start[at]))
        if column is not None:
            row = dot_rows(values[at : at + 1], plot.scale.low, plot.scale.high, rows * DOTS_DOWN, plot.scale.log)[0]
            letter = LETTERS[number % len(LETTERS)]
            plot.canvas.write(plot.frame.top + int(row) // DOTS_DOWN, column, letter, line_ink(number))


def _paint_y_axis(plot: _Plot) -> None:
    layout, canvas = plot.frame, plot.canvas
    if not layout.gutter:
        return
    for row in range(layout.top, layout.top + layout.plot_rows):
        canvas.write(row, layout.gutter - 1, plot.sign("│", "|"), Ink.AXIS)
    if plot.scale is None or layout.plot_rows == 0:
        return
    ticks = np.array(plot.scale.ticks)
    step = float(np.diff(ticks).min()) if len(ticks) > 1 and not plot.scale.log else 0.0
    rows = dot_rows(ticks, plot.scale.low, plot.scale.high, layout.plot_rows * DOTS_DOWN, plot.scale.log) // DOTS_DOWN
    for tick, row in zip(ticks, rows, strict=True):
        label = compact(float(tick), step)[: layout.gutter - 1]
        canvas.write(layout.top + int(row), layout.gutter - 1 - len(label), label, Ink.FAINT)
        canvas.write(layout.top + int(row), layout.gutter - 1, plot.sign("┤", "+"), Ink.AXIS)


def _paint_borders(plot: _Plot) -> None:
    layout = plot.frame
    for border in plot.picture.borders:
        column = plot.column(border.step)
        if column is None:
            continue
        for row in range(layout.top, layout.top + layout.plot_rows):
            plot.canvas.write(row, column, plot.sign("┊", ":"), Ink.BORDER)
        plot.canvas.write(layout.top, column + 1, border.name, Ink.BORDER)


def _paint_x_axis(plot: _Plot) -> None:
    layout, canvas, picture = plot.frame, plot.canvas, plot.picture
    if not layout.axis:
        return
    row = layout.top + layout.plot_rows
    canvas.write(row, layout.gutter, plot.sign("─", "-") * layout.plot_columns, Ink.AXIS)
    if layout.gutter:
        canvas.write(row, layout.gutter - 1, plot.sign("└", "+"), Ink.AXIS)
    if layout.labels:
        for column, label in _x_labels(plot):
            canvas.write(row, column, plot.sign("┬", "+"), Ink.AXIS)
            canvas.write(row + 1, column, label, Ink.FAINT)
    gaps = [series.columns.step_start[series.columns.nans > 0].tolist() for series in picture.series]
    marks = [*picture.marks, *(ChartMark(step, "nan") for steps in gaps for step in steps)]
    for kind, (unicode, ascii, ink) in MARKS.items():
        for mark in marks:
            at = plot.column(mark.step) if mark.kind == kind else None
            if at is not None:
                canvas.write(row, at, plot.sign(unicode, ascii), ink)


def _x_labels(plot: _Plot) -> list[tuple[int, str]]:
    """Canvas columns and labels, none touching another or cut by the edge."""
    picture, layout = plot.picture, plot.frame
    step = max(1, int(nice_step(picture.grid.column_width * DOTS_ACROSS * 14)))  # 14 cells a label
    ticks = [(tick, f"{tick:,}" if tick < 10_000_000 else compact(tick))
             for tick in range(-(-picture.grid.start // step) * step, picture.grid.stop, step)]  # fmt: skip
    known = _along(picture) if picture.x_axis != "step" else None
    if known is not None:
        ticks = _value_ticks(picture, *known, max(1, layout.plot_columns // 14))
    labels, free = [], 0
    for tick, text in ticks:
        column = plot.column(tick)
        if column is None or column < free:
            continue
        if column + len(text) <= layout.width:
            labels.append((column, text))
            free = column + len(text) + 2
    return labels


def _value_ticks(picture: Picture, steps: NDArray[Any], values: NDArray[Any], count: int) -> list[tuple[int, str]]:
    """Round tokens or seconds, each at the step where they were reached.

    Columns are steps: where steps took unequal times, the ticks stand at unequal distances and their values are true.
    """
    low, high = float(values[0]), float(values[-1])
    if not high > low:
        return []
    times = picture.x_axis == "time"
    each = _nice_seconds((high - low) / count) if times else nice_step((high - low) / count)
    numbers = np.arange(np.ceil(low / each), np.floor(high / each) + 1) * each
    at = np.interp(numbers, values, steps)
    words = [duration(number) if times else compact(number) for number in numbers.tolist()]
    return [(int(step), word) for step, word in zip(at.tolist(), words, strict=True)]


def _nice_seconds(least: float) -> float:
    """The shortest round span of time that is not below `least`."""
    round_ones = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 10_800, 21_600, 43_200, 86_400)
    found = next((float(span) for span in round_ones if span >= least), None)
    return found if found is not None else 86_400.0 * max(1.0, nice_step(least / 86_400))


def _along(picture: Picture) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Steps, and the tokens or the seconds since the first of them, of the series with the most to tell."""
    tables = [series.columns.table for series in picture.series]
    known = [table[(table["count"] > 0) | (table["nans"] > 0)] for table in tables]
    longest = max(known, key=len, default=None)
    if longest is None or len(longest) == 0:
        return None
    field = "tokens" if picture.x_axis == "tokens" else "time"
    steps = np.stack([longest["start"], longest["stop"]], axis=1).ravel()
    values = np.stack([longest[f"first_{field}"], longest[f"last_{field}"]], axis=1).ravel()
    return steps, values if field == "tokens" else values - values[0]


def _paint_crosshair(plot: _Plot) -> None:
    step, layout = plot.picture.crosshair, plot.frame
    column = None if step is None else plot.column(step)
    if column is None:
        return
    rows = range(layout.top, layout.top + layout.plot_rows)
    for row in rows:
        if plot.canvas.chars[row, column] in " ┊:":
            plot.canvas.write(row, column, plot.sign("│", "|"), Ink.CROSSHAIR)
        else:
            plot.canvas.inks[row, column] = Ink.CROSSHAIR


def _paint_title(plot: _Plot) -> None:
    """Title left; right, the current value, or what the crosshair stands on; names of several lines beneath, or there."""
    layout, picture, canvas = plot.frame, plot.picture, plot.canvas
    if layout.top == 0:
        return
    several = len(picture.series) > 1
    found = [reading(series.columns, picture.crosshair) for series in picture.series]
    parts: list[tuple[str, Ink]] = []
    if picture.crosshair is not None:
        parts.append((f"step {picture.crosshair:,}", Ink.CROSSHAIR))
    for number, text in enumerate(found):
        letter = f"{LETTERS[number % len(LETTERS)]} " if several else ""
        parts.append((letter + text, line_ink(number)))
    if layout.legend:  # the values stand beneath, with their names
        parts = parts[: len(parts) - len(found)]
    _write_right(canvas, 0, parts)
    used = sum(len(text) + 2 for text, _ in parts)
    canvas.write(0, 0, _cut(picture.title, max(8, layout.width - used), plot.unicode), Ink.TITLE)
    if layout.legend:
        column = layout.gutter
        for number, (series, text) in enumerate(zip(picture.series, found, strict=True)):
            label = f"{LETTERS[number % len(LETTERS)]} {series.name} {text}"
            canvas.write(1, column, label, line_ink(number))
            column += len(label) + 2


def _write_right(canvas: Canvas, row: int, parts: Sequence[tuple[str, Ink]]) -> None:
    column = canvas.chars.shape[1]
    for text, ink in reversed(parts):
        column -= len(text)
        canvas.write(row, column, text, ink)
        column -= 2


def _cut(text: str, width: int, unicode: bool) -> str:
    return text if len(text) <= width else text[: max(0, width - 1)] + ("…" if unicode else "~")


def reading(columns: Columns, step: int | None = None) -> str:
    """The series' value in the column of a step, or its last: one value, or the mean with smallest and largest."""
    table = columns.table
    drawn = np.flatnonzero((table["count"] > 0) | (table["nans"] > 0))
    if step is not None:
        drawn = drawn[columns.step_start[drawn] <= step]
    if len(drawn) == 0:
        return "-"
    column = table[drawn[-1]]
    if column["count"] == 0:
        return "nan"
    if step is None:
        return "nan" if column["trail"] else compact(float(column["last"]))
    if column["count"] == 1:
        return compact(float(column["last"]))
    mean = compact(float(column["sum"] / column["count"]))
    return f"{mean} ({compact(float(column['min']))}..{compact(float(column['max']))})"
