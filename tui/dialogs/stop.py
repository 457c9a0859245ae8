"""Stopping the run: with a checkpoint, or at once."""

from __future__ import annotations

from collections.abc import Sequence

from textual.widget import Widget

from tui.chart.styles import Ink
from tui.core.formatting import age, plural
from tui.core.scene import Scene, newest_checkpoint
from tui.core.text_panel import Line, LineWindow, wrapped
from tui.dialogs.base import Answer, Dialog


class StopDialog(Dialog):
    heading = "Stop the run"
    deed = "Stop"

    def __init__(self, scene: Scene, *, now: bool = False) -> None:
        super().__init__(scene)
        self._now = now
        self._list = LineWindow(choosing=True, id="choices")

    def parts(self) -> Sequence[Widget]:
        self._list.styles.height = 2
        return (self._list,)

    def begin(self) -> None:
        self._list.show(
            [
                [("with a checkpoint   ", Ink.TEXT), ("after the current step; nothing is lost", Ink.FAINT)],
                [("now                 ", Ink.TEXT), ("without a checkpoint", Ink.FAINT)],
            ]
        )
        self._list.choose(int(self._now))
        self.tell()

    def move(self, by: int) -> None:
        self._list.move(by)
        self.tell()

    def on_line_window_chosen(self, event: LineWindow.Chosen) -> None:
        self.tell()

    def words(self, cells: int) -> list[Line]:
        snapshot = self.scene.snapshot
        lines: list[Line] = [[]]
        if snapshot is not None and self._list.cursor == 1:
            newest = newest_checkpoint(snapshot)
            since = snapshot.step - (newest.step if newest is not None else 0)
            ago = f" ({age(self.scene.now - self.scene.skew - newest.time)})" if newest is not None else ""
            after = f"after {newest.id}{ago}" if newest is not None else "taken so far: there is no checkpoint"
            lines += wrapped(f"Loses {plural(since, 'step')} {after}.", cells, Ink.ALARM if since else Ink.TITLE)
        else:
            lines += wrapped("Writes a checkpoint, then ends the ranks.", cells, Ink.TITLE)
        lines += wrapped("The run can be resumed: midwatch resume. To leave it running, cancel and press q.", cells, Ink.FAINT)
        return [*lines, []]

    def answer(self) -> Answer | str:
        return ("stop-now" if self._list.cursor == 1 else "stop"), {}
