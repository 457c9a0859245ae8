"""Text on the line API: lines of inked runs, of which only those that changed are sent to the terminal.

`Panel` shows lines; `LineWindow` shows a window onto any number of them, with a cursor if wanted, and its text can be selected.
"""

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Generic, TypeVar, overload

from rich.segment import Segment
from rich.style import Style
from textual.events import Click, MouseScrollDown, MouseScrollUp, Resize
from textual.geometry import Region
from textual.message import Message
from textual.selection import Selection
from textual.strip import Strip
from textual.widget import Widget

from midwatch.terminal import safe
from tui.chart.formatting import UNICODE
from tui.chart.styles import STYLES, Ink
from tui.chart.text import SECOND, plain

Run = tuple[str, Ink]
Line = Sequence[Run]
Item = TypeVar("Item")

CHOSEN = Style(bold=True, bgcolor="#26303e")


def text(line: Line) -> str:
    return "".join(part for part, _ in line)


def width(line: Line) -> int:
    return sum(len(part) for part, _ in line)


def cut(line: Line, cells: int) -> list[Run]:
    """The line in at most `cells` cells, ended by an ellipsis where something is left out."""
    if width(line) <= cells:
        return list(line)
    kept: list[Run] = []
    room = cells - 1
    for part, ink in line:
        if room <= 0:
            break
        kept.append((part[:room], ink))
        room -= len(part)
    return [*kept, ("…" if UNICODE else "~", Ink.FAINT)] if cells > 0 else []


def fit(line: Line, cells: int) -> list[Run]:
    """The line in exactly `cells` cells."""
    short = cut(line, cells)
    return [*short, (" " * (cells - width(short)), Ink.BLANK)]


def spread(left: Line, right: Line, cells: int) -> list[Run]:
    """One line flush left, the other flush right; the right one gives way."""
    room = cells - width(left)
    if room <= width(right):
        return fit(left, cells)
    return [*left, (" " * (room - width(right)), Ink.BLANK), *right]


def joined(parts: Sequence[Line], between: str = "  ") -> list[Run]:
    """Lines behind one another, the empty ones left out."""
    runs: list[Run] = []
    for part in parts:
        if width(part):
            runs += [(between, Ink.BLANK)] if runs else []
            runs += part
    return runs


def wrapped(words: str, cells: int, ink: Ink = Ink.TEXT) -> list[list[Run]]:
    """Text broken at spaces into lines of at most `cells`."""
    lines: list[list[Run]] = []
    for paragraph in words.split("\n"):
        line = ""
        for word in paragraph.split(" "):
            while len(word) > cells > 0:
                lines += [[(line, ink)]] if line else []
                line, (head, word) = "", (word[:cells], word[cells:])
                lines.append([(head, ink)])
            if line and len(line) + 1 + len(word) > cells:
                lines.append([(line, ink)])
                line = word
            else:
                line = f"{line} {word}" if line else word
        lines.append([(line, ink)])
    return lines


def broken(line: Line, cells: int, most: int) -> list[list[Run]]:
    """A line in at most so many rows, broken at spaces where there are any; the last row is cut where that is not enough."""
    rows: list[list[Run]] = []
    rest = list(line)
    while len(rows) < most - 1 and width(rest) > cells > 0:
        words = text(rest)
        at = words.rfind(" ", 1, cells + 1)
        at = at if at > cells // 2 else cells
        row: list[Run] = []
        left: list[Run] = []
        seen = 0
        for part, ink in rest:
            head = part[: max(0, at - seen)]
            row += [(head, ink)] if head else []
            left += [(part[len(head) :], ink)] if part[len(head) :] else []
            seen += len(part)
        rows.append(row)
        rest = [(" ", Ink.BLANK), (left[0][0].lstrip(" "), left[0][1]), *left[1:]] if left else []
    return [*rows, cut(rest, cells)]


def shifted(line: Line, by: int) -> list[Run]:
    """The line without its first cells, for a window that was moved to the right."""
    runs: list[Run] = []
    for part, ink in line:
        runs += [(part[by:], ink)] if part[by:] else []
        by = max(0, by - len(part))
    return runs


class Lazy(Sequence[Line], Generic[Item]):
    """Lines made from items when they are drawn."""

    def __init__(self, items: Sequence[Item], draw: Callable[[Item], Line]) -> None:
        self._items, self._draw = items, draw

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, at: int) -> Line: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Line]: ...
    def __getitem__(self, at: int | slice) -> Line | Sequence[Line]:
        if isinstance(at, slice):
            return [self._draw(item) for item in self._items[at]]
        return self._draw(self._items[at])


class Panel(Widget):
    """Shows lines; those beyond its height are not drawn."""

    DEFAULT_CSS = "Panel { width: 1fr; height: 1fr; }"
    ALLOW_SELECT = True

    def __init__(self, *, id: str | None = None, classes: str | None = None) -> None:
        super().__init__(id=id, classes=classes)
        self.lines: Sequence[Line] = ()
        self._drawn: list[tuple[Run, ...]] = []

    def show(self, lines: Sequence[Line]) -> None:
        """Shows other lines; redraws those that differ."""
        self.lines = lines
        self._redraw()

    def show_all(self, lines: Sequence[Line]) -> None:
        """Shows lines and takes just the height they need."""
        if self.styles.height is None or self.styles.height.value != len(lines):
            self.styles.height = len(lines)
        self.show(lines)

    def _at(self, y: int) -> int:
        """The line on a row of the screen."""
        return y

    def _line(self, number: int) -> Line:
        """A line as it is drawn."""
        return self.lines[number]

    def _visible(self) -> list[tuple[Run, ...]]:
        last = min(len(self.lines), self._at(self.size.height))
        return [tuple(self._line(number)) for number in range(self._at(0), last)]

    def _redraw(self) -> None:
        old, self._drawn = self._drawn, self._visible()
        blank: tuple[Run, ...] = ()
        changed = [
            Region(start, y, stop - start, 1)
            for y, (before, after) in enumerate(zip_longest(old, self._drawn, fillvalue=blank))
            if before != after
            for start, stop in [self._difference(before, after)]
            if stop > start
        ]
        if changed:
            self.refresh(*changed)

    def _difference(self, before: Line, after: Line) -> tuple[int, int]:
        """The columns in which two lines differ: from the first such cell to the last."""
        indent = len(self._sign(-1))
        cells = max(0, self.size.width - indent)
        old = [(char, ink) for part, ink in fit(before, cells) for char in part]
        new = [(char, ink) for part, ink in fit(after, cells) for char in part]
        differ = [column for column, (one, other) in enumerate(zip(old, new, strict=True)) if one != other]
        return (differ[0] + indent, differ[-1] + indent + 1) if differ else (0, 0)

    def on_resize(self, event: Resize) -> None:
        self._drawn = self._visible()
        self.refresh()

    def _row_style(self, number: int) -> Style:
        return Style()

    def _sign(self, number: int) -> str:
        """What stands before a line."""
        return ""

    def render_line(self, y: int) -> Strip:
        cells = self.size.width
        base = self.rich_style
        number = self._at(y)
        if number >= len(self.lines):
            return Strip.blank(cells, base)
        base += self._row_style(number)
        signed = [(self._sign(number), Ink.TITLE), *self._line(number)]
        segments = [Segment(plain(part, UNICODE), base + STYLES[ink]) for part, ink in cut(signed, cells)]
        strip = Strip(segments).extend_cell_length(cells, base)
        selection = self.text_selection
        if selection is not None and (span := selection.get_span(number)) is not None:
            start, end = span
            end = cells if end == -1 else min(end, cells)
            style = self.screen.get_component_rich_style("screen--selection")
            before, chosen, after = strip.crop(0, start), strip.crop(start, end), strip.crop(end, cells)
            strip = Strip.join([before, chosen.apply_style(style), after])
        return strip.apply_offsets(0, number)

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        return safe(selection.extract("\n".join(text(line) for line in self.lines)).replace(SECOND, ""), lines=True), "\n"

    def selection_updated(self, selection: Selection | None) -> None:
        self.refresh()


class LineWindow(Panel):
    """A window onto many lines; draws, and asks for, those in sight alone.

    With `choosing` one row is the cursor's and the window keeps it in sight. While `following`, the window stays at the end.
    """

    class Chosen(Message):
        """A row was clicked."""

        def __init__(self, rows: "LineWindow", number: int) -> None:
            super().__init__()
            self.rows, self.number = rows, number

        @property
        def control(self) -> "LineWindow":
            return self.rows

    def __init__(
        self, *, choosing: bool = False, following: bool = False, id: str | None = None, classes: str | None = None
    ) -> None:
        super().__init__(id=id, classes=classes)
        self.choosing, self.following = choosing, following
        self.top = 0
        self.cursor = 0
        self.shift = 0
        """Cells that the window has been moved to the right."""

    def show(self, lines: Sequence[Line]) -> None:
        self.lines = lines
        self._settle()

    def _at(self, y: int) -> int:
        return self.top + y

    def _line(self, number: int) -> Line:
        return shifted(self.lines[number], self.shift) if self.shift else self.lines[number]

    def _settle(self) -> None:
        """Puts cursor and window where they may be, and redraws. While following, the cursor is at the end too."""
        last = max(0, len(self.lines) - 1)
        before = self.cursor
        if self.following:
            self.cursor = last
        self.cursor = min(max(0, self.cursor), last)
        end = max(0, len(self.lines) - self.size.height)
        if self.choosing:
            self.top = min(max(self.top, self.cursor - self.size.height + 1), self.cursor)
        self.top = end if self.following else min(max(0, self.top), end)
        self._redraw()
        if self.choosing and before != self.cursor:
            self._refresh_line(before)
            self._refresh_line(self.cursor)

    def move(self, by: int) -> None:
        """The cursor, or else the window, by so many lines."""
        if self.choosing:
            before, self.cursor = self.cursor, min(max(0, self.cursor + by), max(0, len(self.lines) - 1))
            self.following = self.following and by >= 0
            self._settle()
            self._refresh_line(before)
            self._refresh_line(self.cursor)
        else:
            end = max(0, len(self.lines) - self.size.height)
            self.top = min(max(0, self.top + by), end)
            self.following = self.following and self.top == end
            self._settle()

    def choose(self, number: int) -> None:
        self.move(number - self.cursor)

    def page(self, pages: int) -> None:
        self.move(pages * max(1, self.size.height - 1))

    def to_end(self, which: int) -> None:
        """To the first line (-1) or the last (1)."""
        self.move(which * len(self.lines))

    def place(self) -> str:
        """Where the window is: `all`, `top`, `41%`, `end`."""
        end = len(self.lines) - self.size.height
        if end <= 0:
            return "all"
        return "top" if self.top == 0 else "end" if self.top >= end else f"{int(100 * self.top / end)}%"

    def _refresh_line(self, number: int) -> None:
        if 0 <= number - self.top < self.size.height:
            self.refresh(Region(0, number - self.top, self.size.width, 1))

    def _row_style(self, number: int) -> Style:
        return CHOSEN if self.choosing and number == self.cursor else Style()

    def _sign(self, number: int) -> str:
        if not self.choosing:
            return ""
        return ("▸ " if UNICODE else "> ") if number == self.cursor else "  "

    def on_resize(self, event: Resize) -> None:
        self._settle()
        self.refresh()

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        self.move(1 if self.choosing else 3)
        event.stop()

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        self.move(-1 if self.choosing else -3)
        event.stop()

    def on_click(self, event: Click) -> None:
        number = self._at(event.y)
        if self.choosing and number < len(self.lines):
            self.choose(number)
            self.post_message(self.Chosen(self, number))
