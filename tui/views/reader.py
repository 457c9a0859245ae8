"""A list of lines to read: followed at its end, moved sideways, wrapped, or one line whole on a page of its own."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult

from tui.core.text_panel import Line, LineWindow, broken, text, wrapped
from tui.views.base import View

SHIFT = 20
"""Cells that the window is moved sideways at a time."""
WRAPPED = 2_000
"""Newest lines that are shown where they are wrapped."""
MOST_ROWS = 200
"""Rows of one wrapped line."""


class ReaderView(View):
    """Subclasses call `show_lines` whenever their lines change, and yield `_list` and `_page`."""

    DEFAULT_CSS = "ReaderView #whole { display: none; background: $surface; }"
    filterable = True

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.rows = self._list = LineWindow(choosing=True, following=True)
        self._page = LineWindow(id="whole")
        self._lines: Sequence[Line] = ()
        self._wraps = False
        self._line_of_row: list[int] = []
        """While lines are wrapped: which of them each row is of."""

    def compose(self) -> ComposeResult:
        yield self._list
        yield self._page

    def show_lines(self, lines: Sequence[Line]) -> None:
        self._lines = lines
        if self._wraps and self._list.size.width > 4:
            cells = self._list.size.width - 2
            first = max(0, len(lines) - WRAPPED)
            rows = [(at, row) for at in range(first, len(lines)) for row in broken(lines[at], cells, MOST_ROWS)]
            self._line_of_row, lines = [at for at, _ in rows], [row for _, row in rows]
        self._list.show(lines)

    def place_words(self) -> str:
        """Where the window is, and how it shows lines that are longer."""
        place = "following" if self._list.following else f"held at {self._list.place()} (f follows)"
        place += f", from column {self._list.shift + 1}" if self._list.shift else ""
        return place + (", wrapped" if self._wraps else "")

    def do_follow(self) -> None:
        self._list.following = not self._list.following
        self._again()

    def do_shift(self, by: str) -> None:
        """Sideways, by a part of the width."""
        self._list.shift = max(0, self._list.shift + int(by) * SHIFT)
        self._again()

    def do_wrap(self) -> None:
        self._wraps, self._list.shift = not self._wraps, 0
        self._again()

    def do_whole(self) -> None:
        """The line at the cursor on a page of its own, and back."""
        if self._page.display:
            self.back()
            return
        at = self._list.cursor
        if not 0 <= at < len(self._list.lines):
            return
        if self._wraps and at < len(self._line_of_row):
            at = self._line_of_row[at]
        line = self._lines[at]
        self._page.top = 0
        self._page.show([*wrapped(text(line).strip(), max(20, self.size.width - 2)), [], *self.more(at)])
        self._turn(page=True)

    def more(self, at: int) -> list[Line]:
        """What is to be said beneath a line that is shown whole."""
        return []

    def back(self) -> bool:
        was = bool(self._page.display)
        self._turn(page=False)
        return was

    def _turn(self, *, page: bool) -> None:
        self._page.display, self._list.display = page, not page
        self.rows = self._page if page else self._list
        self.midwatch.draw_foot()

    def moved(self) -> None:
        self.midwatch.draw_foot()

    def _again(self) -> None:
        self.show_lines(self._lines)
        self.midwatch.draw_foot()
