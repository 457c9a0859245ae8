"""Every metric as small charts on one time line: filter, zoom, pan, smoothing, log y, crosshair; rolled-back lineages as ghosts."""

import re
from dataclasses import replace
from typing import Literal, NamedTuple

from textual.app import ComposeResult
from textual.containers import Grid as Grating

from midwatch.metrics.m4_columns import Columns
from midwatch.protocol import MetricsQuery, MetricsReply, Snapshot
from tui.chart.formatting import UNICODE, plural
from tui.chart.render import Picture, Series
from tui.chart.styles import Ink
from tui.chart.widget import Chart
from tui.core.keys import FILTER, MOVE, Key, register
from tui.core.scene import Scene
from tui.core.text_panel import Line
from tui.views.base import View
from tui.views.chart_data import Fetcher, borders, ghosts, marks, newest_step

SMOOTHINGS = (0, 10, 50, 200, 1000)
AXES: tuple[Literal["step", "tokens", "time"], ...] = ("step", "tokens", "time")
LEAST = 8
"""Steps of the narrowest zoom."""


class StepWindow(NamedTuple):
    """What part of the run is in sight: `length` steps up to `stop`; None: all of them, and up to the newest."""

    length: int | None = None
    stop: int | None = None

    def steps(self, newest: int) -> tuple[int, int]:
        """[start, stop) while the newest step is `newest`."""
        end = newest + 1
        stop = min(self.stop, end) if self.stop is not None else end
        length = min(self.length, end) if self.length is not None else end
        return max(0, stop - length), max(1, stop)

    def zoomed(self, factor: float, newest: int, around: int | None) -> "StepWindow":
        """Narrower (factor < 1) or wider, about a step where there is one."""
        start, stop = self.steps(newest)
        length = int((stop - start) * factor)
        if length > newest:
            return StepWindow()
        length = max(LEAST, length)
        if around is not None and start <= around < stop:
            first = around - int((around - start) / (stop - start) * length)
            return StepWindow(length, max(length, first + length))
        return StepWindow(length, self.stop)

    def panned(self, by: int, newest: int) -> "StepWindow":
        """A quarter of what is in sight to the left or the right; at the end it follows the run again."""
        start, stop = self.steps(newest)
        length = stop - start
        moved = max(length, stop + by * max(1, length // 4))
        return StepWindow(self.length, None if moved > newest else moved)


@register(
    "m",
    "metrics",
    "every metric on one time line, with stage borders and rolled-back lineages",
    place=2,
    keys=(
        FILTER,
        Key(("plus", "equals_sign"), "+", "zoom in", "zoom:in", "zoom in"),
        Key(("minus",), "-", "zoom out", "zoom:out", "out"),
        Key(("0",), "0", "the whole run again", "zoom:all", "all"),
        Key(("left",), "←", "pan to earlier steps", "pan:-1"),
        Key(("right",), "→", "pan to later steps", "pan:1"),
        Key(("left_square_bracket",), "[", "crosshair to the left", "cross:-1", "crosshair"),
        Key(("right_square_bracket",), "]", "crosshair to the right", "cross:1"),
        Key(("enter",), "Enter", "one chart alone, and all again", "maximise", "one"),
        Key(("s",), "s", "smoothing: none, then wider", "smooth", "smooth"),
        Key(("L",), "L", "logarithmic y axis", "log", "log"),
        Key(("x",), "x", "x-axis labels: steps, tokens or time (columns are always steps)", "axis", "axis"),
        *MOVE,
    ),
)
class MetricsView(View):
    DEFAULT_CSS = "MetricsView #board { height: 1fr; grid-gutter: 0 1; }"
    filterable = True

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._scene: Scene | None = None
        self._board = Grating(id="board")
        self._charts: list[Chart] = []
        self._known: tuple[str, ...] = ()
        self._pattern: re.Pattern[str] | None = None
        self._at = 0  # the chosen chart, among those that pass the filter
        self._alone = False
        self._span = StepWindow()
        self._cross: int | None = None
        self._smoothing = 0
        self._log_y = False
        self._axis = 0
        self._fetcher = Fetcher(self, self._fetch)
        self._drawn_for: object = None
        self._arranged: tuple[int, int] = (0, 0)

    def compose(self) -> ComposeResult:
        yield self._board

    @property
    def crosshair(self) -> int | None:
        """The step that the operator points at."""
        return self._cross

    def settled(self) -> bool:
        return self._drawn_for is not None and self._drawn_for == self._needs() and not self._fetcher.busy

    def opened(self) -> None:
        self._drawn_for = None
        self._fetcher.want()

    def on_chart_resized(self, event: Chart.Resized) -> None:
        self._drawn_for = None
        if self.display:
            self._fetcher.hurry()

    def on_chart_pointed(self, event: Chart.Pointed) -> None:
        if event.clicked and event.chart in self._charts:
            self._at = min(self._first() + self._charts.index(event.chart), max(0, len(self._names()) - 1))
        self._point(event.step)

    def show(self, scene: Scene) -> None:
        self._scene = scene
        if scene.snapshot is None or not self.size.width:
            return
        self._arrange()
        if self._needs() != self._drawn_for:
            self._fetcher.want()

    def status(self) -> Line:
        snapshot = self._scene.snapshot if self._scene is not None else None
        if snapshot is None:
            return ()
        start, stop = self._span.steps(newest_step(snapshot))
        names = self._names()
        page, pages = self._first() // max(1, self._fitting()) + 1, -(-len(names) // max(1, self._fitting())) or 1
        parts = [
            f"{plural(len(names), 'metric')}" + (f" matching /{self._pattern.pattern}/" if self._pattern is not None else ""),
            f"{'chart' if self._alone else 'page'} {page} of {pages}" if pages > 1 else "",
            f"steps {start:,} to {stop - 1:,}" + ("" if self._span.length is None else " (0: all)"),
            f"crosshair at step {self._cross:,}" if self._cross is not None else "",
            f"ticks by {AXES[self._axis]}" if self._axis else "",
            f"smoothed over {self._window()}" if self._window() else "",
            "log y" if self._log_y else "",
        ]
        return [(", ".join(part for part in parts if part), Ink.FAINT)]

    def set_filter(self, pattern: str) -> str:
        try:
            self._pattern = re.compile(pattern, re.IGNORECASE) if pattern else None
        except re.error as error:
            return f"/{pattern}: {error}"
        self._at = 0
        self._changed()
        return ""

    def back(self) -> bool:
        """Leaves, one after the other: the chart alone, the crosshair, the zoom."""
        if self._alone:
            self._alone = False
        elif self._cross is not None:
            self._point(None)
            return True
        elif self._span != StepWindow():
            self._span = StepWindow()
        else:
            return False
        self._changed()
        return True

    # Keys

    def do_move(self, by: str) -> None:
        count = len(self._names())
        if count:
            self._at = (self._at + int(by)) % count
            self._changed()

    def do_page(self, by: str) -> None:
        self._at = min(max(0, self._at + int(by) * max(1, self._fitting())), max(0, len(self._names()) - 1))
        self._changed()

    def do_end(self, which: str) -> None:
        self._at = 0 if which == "-1" else max(0, len(self._names()) - 1)
        self._changed()

    def do_zoom(self, how: str) -> None:
        newest = self._newest()
        self._span = StepWindow() if how == "all" else self._span.zoomed(0.5 if how == "in" else 2.0, newest, self._cross)
        self._changed()

    def do_pan(self, by: str) -> None:
        self._span = self._span.panned(int(by), self._newest())
        self._changed()

    def do_cross(self, by: str) -> None:
        start, stop = self._span.steps(self._newest())
        shown = next((chart.picture for chart in self._charts if chart.display and chart.picture is not None), None)
        cell = 2 * shown.grid.column_width if shown is not None else 1
        at = self._cross if self._cross is not None else stop - 1 if by == "-1" else start - cell
        self._point(min(max(start, at + int(by) * cell), stop - 1))

    def do_maximise(self) -> None:
        self._alone = not self._alone
        self._changed()

    def do_smooth(self) -> None:
        self._smoothing = (self._smoothing + 1) % len(SMOOTHINGS)
        self._changed()

    def do_log(self) -> None:
        self._log_y = not self._log_y
        self._changed()

    def do_axis(self) -> None:
        self._axis = (self._axis + 1) % len(AXES)
        self._changed()

    # Drawing

    def _changed(self) -> None:
        self._drawn_for = None
        self._arrange()
        self._fetcher.hurry()
        self.midwatch.draw_foot()

    def _newest(self) -> int:
        return newest_step(self._scene.snapshot) if self._scene is not None and self._scene.snapshot is not None else 0

    def _window(self) -> int:
        return SMOOTHINGS[self._smoothing]

    def _names(self) -> list[str]:
        snapshot = self._scene.snapshot if self._scene is not None else None
        names = sorted({*self._known, *(snapshot.latest if snapshot is not None else ())}, key=_order)
        return [name for name in names if self._pattern is None or self._pattern.search(name)]

    def _lattice(self) -> tuple[int, int]:
        """Charts across and down."""
        if self._alone:
            return 1, 1
        width, height = self.size
        count = max(1, len(self._names()))
        across = max(1, min(4, width // 38, count))
        return across, max(1, min(height // 7, -(-count // across)))

    def _fitting(self) -> int:
        across, down = self._lattice()
        return across * down

    def _first(self) -> int:
        return self._at // max(1, self._fitting()) * self._fitting()

    def _arrange(self) -> None:
        across, down = self._lattice()
        here = min(across * down, max(1, len(self._names()) - self._first()))
        if len(self._charts) < across * down:
            more = [Chart(unicode=UNICODE) for _ in range(across * down - len(self._charts))]
            self._charts += more
            self._board.mount(*more)
        if (across, down) != self._arranged:
            self._arranged = (across, down)
            self._board.styles.grid_size_columns = across
            self._board.styles.grid_size_rows = down
        for number, chart in enumerate(self._charts):
            if chart.display != (number < here):
                chart.display = number < here

    def _needs(self) -> object:
        snapshot = self._scene.snapshot if self._scene is not None else None
        if snapshot is None or self._scene is None:
            return None
        golden = tuple(c.id for c in snapshot.checkpoints if c.golden)
        return (snapshot.step, snapshot.lineage, snapshot.stage, len(snapshot.checkpoints), golden, len(snapshot.latest),
                self._scene.link.up)  # fmt: skip

    async def _fetch(self) -> None:
        scene = self._scene
        if scene is None or scene.snapshot is None or not self.display:
            return
        snapshot, needs = scene.snapshot, self._needs()
        if not set(snapshot.latest) <= set(self._known) or not self._known:
            reply = await self.midwatch.feed.ask(MetricsQuery(id=0), MetricsReply)
            self._known = reply.names if reply is not None else self._known
            self._arrange()
        first = self._first()
        names = self._names()[first : first + self._fitting()]
        start, stop = self._span.steps(newest_step(snapshot))
        shown = [chart for chart in self._charts if chart.display and chart.dots > 0]
        if shown and names:
            await self._fetch_page(names, shown, snapshot, start, stop)
        if scene.link.up:
            self._drawn_for = needs
        self.midwatch.draw_foot()

    async def _fetch_page(self, names: list[str], charts: list[Chart], snapshot: Snapshot, start: int, stop: int) -> None:
        """The charts of one page: all of one width, so that they share a grid and a crosshair."""
        feed = self.midwatch.feed
        dots = min(chart.dots for chart in charts)
        found = await feed.all_columns(names, start, stop, dots)
        past: dict[str, list[Columns]] = {}
        for lineage in ghosts(snapshot):
            for name, columns in zip(names, await feed.all_columns(names, start, stop, dots, lineage), strict=True):
                if columns is not None:
                    past.setdefault(name, []).append(columns)
        chosen = self._names()[self._at] if self._at < len(self._names()) else ""
        for name, columns, chart in zip(names, found, charts, strict=False):
            if columns is None:
                continue
            sign = ("▸ " if UNICODE else "> ") if name == chosen and not self._alone else ""
            chart.show(
                Picture(
                    f"{sign}{name}",
                    columns.grid,
                    (Series(columns, window=self._window()),),
                    ghosts=tuple(Series(ghost) for ghost in past.get(name, [])),
                    borders=borders(snapshot),
                    marks=marks(snapshot),
                    crosshair=self._cross,
                    log=self._log_y,
                    x_axis=AXES[self._axis],
                    empty="none in sight",
                )
            )

    def _point(self, step: int | None) -> None:
        """Moves the crosshair; what is drawn stays."""
        if step == self._cross:
            return
        self._cross = step
        for chart in self._charts:
            if chart.display and chart.picture is not None:
                chart.show(replace(chart.picture, crosshair=step))
        self.midwatch.draw_foot()


_HEADS = re.compile(
    "|".join(
        f"({head})"
        for head in (
            "train/loss$", "policy/reward$", "eval/.+/reward$", "policy/kl_sequence", "eval/.+/kl_sequence$", "policy/entropy",
            "policy/response_length|eval/.+/response_length$", "policy/truncated_fraction", "policy/kl", "policy/reward",
            "policy/(ratio|clip|approximate)", "policy/", "value/", "preference/", "eval/", "train/",
            "perf/(generate|score|update)_seconds", "perf/",
        )
    )
)  # fmt: skip


def _order(name: str) -> tuple[int, bool, str]:
    """The loss first, then what tells most: of a policy its reward, held-out beside it, its distance, its entropy and lengths.

    Single points, of stages' beginnings, come behind courses.
    """
    found = _HEADS.match(name)
    place = _HEADS.groups if found is None else next(n for n, part in enumerate(found.groups()) if part is not None)
    return place, name.endswith("_before"), name
