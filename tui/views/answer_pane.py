"""One checkpoint's side of a conversation: whose it is, and the text, whose tokens can be pointed at."""

from textual.app import ComposeResult
from textual.containers import Vertical
from textual.events import Click
from textual.message import Message

from tui.chart.styles import Ink
from tui.core import conversation
from tui.core.conversation import Exchange, TokenPosition
from tui.core.text_panel import Line, LineWindow, Panel

HINT = (
    "Enter     type a prompt; f: for the chat template, or to be continued",
    "1, 2      which checkpoint to ask, or two side by side",
    "arrows    select a token; its alternatives appear below",
)


class Column(Vertical):
    DEFAULT_CSS = """
    Column { width: 1fr; height: 1fr; }
    Column .probe-heading { height: 1; background: $panel; }
    """

    class Pointed(Message):
        """A token of the newest answer was clicked."""

        def __init__(self, column: "Column", token: int) -> None:
            super().__init__()
            self.column, self.token = column, token

    def __init__(self) -> None:
        super().__init__()
        self.heading = Panel(classes="probe-heading")
        self.rows = LineWindow(following=True)
        self.marks: dict[int, TokenPosition] = {}

    def compose(self) -> ComposeResult:
        yield self.heading
        yield self.rows

    def show(self, exchanges: list[Exchange], which: int, name: str, cursor: int | None, active: bool) -> None:
        """cursor: a token of the newest answer, kept in sight."""
        answer = exchanges[-1].answers[which] if exchanges else None
        self.heading.show([conversation.heading(answer, name, active)])
        page = conversation.page(exchanges, which, self.rows.size.width - 1, cursor)
        self.marks = page.marks
        lines: list[Line] = page.lines if exchanges else [[], *([(f" {words}", Ink.FAINT)] for words in HINT)]
        at = page.marks.get(cursor) if cursor is not None else None
        if at is not None:
            self.rows.following = False
            self.rows.top = min(max(self.rows.top, at.line - self.rows.size.height + 1), at.line)
        self.rows.show(lines)

    def on_click(self, event: Click) -> None:
        if event.widget is not self.rows:
            return
        line = self.rows.top + event.y
        before = [token for token, mark in self.marks.items() if mark.line == line and mark.column <= event.x]
        if before:
            self.post_message(self.Pointed(self, max(before)))
