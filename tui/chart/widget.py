"""The chart widget: paints a picture, and sends the terminal only what changed of the rows that did."""

from rich.segment import Segment
from textual.events import Click, MouseMove, Resize
from textual.geometry import Region
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from tui.chart.braille import DOTS_ACROSS
from tui.chart.render import Canvas, Picture, dot_columns, frame, paint
from tui.chart.styles import STYLES


class Chart(Widget):
    """Shows a picture. Ask the index for `dots` columns, again whenever `Resized` comes."""

    DEFAULT_CSS = "Chart { width: 1fr; height: 1fr; }"
    ALLOW_SELECT = False

    class Resized(Message):
        """The chart has room for another number of columns."""

        def __init__(self, chart: "Chart") -> None:
            super().__init__()
            self.chart = chart

        @property
        def control(self) -> "Chart":
            return self.chart

    class Pointed(Message):
        """The mouse pointed at a step, or left the plot (None)."""

        def __init__(self, chart: "Chart", step: int | None, clicked: bool) -> None:
            super().__init__()
            self.chart, self.step, self.clicked = chart, step, clicked

        @property
        def control(self) -> "Chart":
            return self.chart

    def __init__(
        self,
        picture: Picture | None = None,
        *,
        unicode: bool = True,
        id: str | None = None,
        classes: str | None = None,
    ) -> None:
        super().__init__(id=id, classes=classes)
        self._picture = picture
        self._unicode = unicode
        self._canvas = Canvas.blank(0, 0)

    @property
    def dots(self) -> int:
        """Dot columns of the plot at its present size."""
        return dot_columns(self.size.width)

    @property
    def picture(self) -> Picture | None:
        return self._picture

    def show(self, picture: Picture) -> None:
        """Shows another picture; repaints the rows in which it differs."""
        self._picture = picture
        self._repaint()

    def step_at(self, x: int) -> int | None:
        """The step under a column of cells; None outside the plot."""
        if self._picture is None:
            return None
        cell = x - frame(self.size.width, self.size.height).gutter
        grid = self._picture.grid
        step = grid.start + cell * DOTS_ACROSS * grid.column_width
        return step if cell >= 0 and step < grid.stop else None

    def render_line(self, y: int) -> Strip:
        if y >= len(self._canvas.chars):
            return Strip.blank(self.size.width, self.rich_style)
        background = self.rich_style
        segments = [Segment(text, background + STYLES[ink]) for text, ink in self._canvas.row(y)]
        return Strip(segments, self._canvas.chars.shape[1])

    def _repaint(self) -> None:
        width, height = self.size
        old = self._canvas
        if self._picture is not None:
            self._canvas = paint(self._picture, width, height, self._unicode)
        regions = [Region(left, row, right - left, 1) for row, left, right in self._canvas.changes(old)]
        if regions:
            self.refresh(*regions)

    def on_resize(self, event: Resize) -> None:
        self._repaint()
        self.post_message(self.Resized(self))

    def on_mouse_move(self, event: MouseMove) -> None:
        self.post_message(self.Pointed(self, self.step_at(event.x), clicked=False))

    def on_leave(self) -> None:
        self.post_message(self.Pointed(self, None, clicked=False))

    def on_click(self, event: Click) -> None:
        self.post_message(self.Pointed(self, self.step_at(event.x), clicked=True))
