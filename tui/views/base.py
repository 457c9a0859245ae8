"""What every view is: a widget that shows a scene, and does what its keys ask."""

from __future__ import annotations

from typing import cast

from textual.containers import Vertical

from tui.core.operator_app import OperatorApp
from tui.core.scene import Scene
from tui.core.text_panel import Line, LineWindow


class View(Vertical):
    """`show` is called when the view opens, and when the scene changes while it is open. A key's action `a:b` calls `do_a("b")`."""

    DEFAULT_CSS = "View { width: 1fr; height: 1fr; }"

    rows: LineWindow | None = None
    """What the arrows move, where there is such a list."""
    filterable = False
    asked: list[str]
    """What was typed at its own prompt, where it has one (the sign `>`)."""

    @property
    def midwatch(self) -> OperatorApp:
        return cast(OperatorApp, self.app)

    def show(self, scene: Scene) -> None:
        raise NotImplementedError

    def learn(self, scene: Scene) -> None:
        """Every new snapshot, also while the view is out of sight: for those that remember."""

    def on_resize(self) -> None:
        """Drawn at once for the size it has got; what is out of sight is drawn when opened."""
        if self.display:
            self.show(self.midwatch.scene)
            self.call_after_refresh(self.midwatch.draw_foot)

    def opened(self) -> None:
        """The view has come into sight."""

    def settled(self) -> bool:
        """Whether all that the scene calls for is drawn: a picture may be taken."""
        return True

    def set_filter(self, pattern: str) -> str:
        """Shows only what matches; returns why the pattern is wrong, or nothing."""
        return ""

    def take_prompt(self, text: str) -> None:
        """What was typed at its own prompt."""

    def status(self) -> Line:
        """What the status line says while there is nothing newer."""
        return ()

    def back(self) -> bool:
        """Esc: whether there was something of the view's own to leave."""
        return False

    def moved(self) -> None:
        """The cursor or the window has moved."""

    def do_move(self, by: str) -> None:
        if self.rows is not None:
            self.rows.move(int(by))
            self.moved()

    def do_page(self, by: str) -> None:
        if self.rows is not None:
            self.rows.page(int(by))
            self.moved()

    def do_end(self, which: str) -> None:
        if self.rows is not None:
            self.rows.to_end(int(which))
            self.moved()
