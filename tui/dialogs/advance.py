"""Advancing: to which stage, and what is cut short or passed over for it."""

from __future__ import annotations

from collections.abc import Sequence

from textual.widget import Widget

from tui.chart.styles import Ink
from tui.core.formatting import duration, plural
from tui.core.scene import Scene, StageSpan, running_span, stage_spans
from tui.core.text_panel import Line, LineWindow, wrapped
from tui.dialogs.base import Answer, Dialog


class AdvanceDialog(Dialog):
    heading = "Advance to a later stage"
    deed = "Advance"

    def __init__(self, scene: Scene, to: str = "") -> None:
        super().__init__(scene)
        self._later = later(scene)
        self._list = LineWindow(choosing=True, id="choices")
        self._to = to

    def parts(self) -> Sequence[Widget]:
        self._list.styles.height = max(1, min(8, len(self._later)))
        return (self._list,)

    def refresh_scene(self, scene: Scene) -> None:
        at = self._list.cursor
        chosen = self._later[at].stage.name if at < len(self._later) else ""
        self.scene, self._later = scene, later(scene)
        self._draw_list()
        names = [span.stage.name for span in self._later]
        self._list.choose(names.index(chosen) if chosen in names else 0)
        if chosen not in names and (chosen or names):
            self.lose_choice(f"{chosen or 'the last stage'} is no longer a later stage; choose again")
        self.tell()

    def _draw_list(self) -> None:
        self._list.show(
            [[(f"{s.stage.name:<16.16}", Ink.TEXT), (f"{s.stage.objective:<10} {plural(s.stage.steps, 'step')}", Ink.FAINT)]
             for s in self._later]
        )  # fmt: skip

    def begin(self) -> None:
        self._draw_list()
        names = [span.stage.name for span in self._later]
        self._list.choose(names.index(self._to) if self._to in names else 0)
        self.tell()

    def move(self, by: int) -> None:
        self._list.move(by)
        self.tell()

    def on_line_window_chosen(self, event: LineWindow.Chosen) -> None:
        self.tell()

    def words(self, cells: int) -> list[Line]:
        lines: list[Line] = [[]]
        running = running_span(self.scene.snapshot) if self.scene.snapshot is not None else None
        if running is not None:
            stage = running.stage
            left = max(0, stage.steps - stage.step)
            time_left = f" ({duration(stage.seconds_left)})" if stage.seconds_left is not None else ""
            what = f"Ends {stage.name} at step {stage.step:,} of {stage.steps:,}: {plural(left, 'step')}{time_left} are not taken."
            lines += wrapped(what, cells, Ink.TITLE)
        if not self._later:
            lines += wrapped("There is no later stage: this ends the last one, and with it the run.", cells, Ink.WARNING)
        passed = [span.stage.name for span in self._later[: self._list.cursor]]
        if passed:
            lines += wrapped(f"Skips {', '.join(passed)} entirely.", cells, Ink.WARNING)
        lines += wrapped("The ranks first write a checkpoint, from which the next stage starts.", cells, Ink.FAINT)
        return [*lines, []]

    def answer(self) -> Answer | str:
        if not self._later:
            return "advance", {}
        return "advance", {"to": self._later[self._list.cursor].stage.name}


def later(scene: Scene) -> list[StageSpan]:
    """The stages after the one that runs."""
    if scene.snapshot is None:
        return []
    spans = stage_spans(scene.snapshot)
    running = running_span(scene.snapshot)
    after = spans.index(running) + 1 if running in spans else 0
    return spans[after:]
