"""The widget on a real Textual app: only changed rows are drawn again, and no size breaks it."""

import numpy as np
import pytest
from textual.app import App, ComposeResult

from midwatch.metrics.m4_columns import columns_of
from midwatch.metrics.m4_nodes import ROW
from tui.chart.render import Picture, Series
from tui.chart.widget import Chart


def picture(steps: int, width: int, last: float = 1.0) -> Picture:
    rows = np.zeros(steps, ROW)
    rows["step"] = np.arange(steps)
    rows["value"] = 1.0
    rows["value"][0], rows["value"][-1] = 4.0, last
    columns = columns_of("loss", rows, 0, 1_000, width)
    return Picture("loss", columns.grid, (Series(columns),))


class Counting(Chart):
    drawn: list[int]

    def render_line(self, y: int):  # type: ignore[no-untyped-def]
        self.drawn.append(y)
        return super().render_line(y)


class Board(App[None]):
    def __init__(self) -> None:
        super().__init__()
        self.chart = Counting()
        self.chart.drawn = []
        self.resized = 0

    def compose(self) -> ComposeResult:
        yield self.chart

    def on_chart_resized(self, event: Chart.Resized) -> None:
        self.resized += 1


async def test_only_the_rows_that_changed_are_drawn_again() -> None:
    app = Board()
    async with app.run_test(size=(80, 24)) as pilot:
        app.chart.show(picture(500, app.chart.dots))
        await pilot.pause()
        app.chart.drawn.clear()
        app.chart.show(picture(500, app.chart.dots))
        await pilot.pause()
        assert app.chart.drawn == []
        app.chart.show(picture(500, app.chart.dots, last=1.01))  # less than a dot: only the value in the title
        await pilot.pause()
        assert app.chart.drawn == [0]
        app.chart.drawn.clear()
        app.chart.show(picture(520, app.chart.dots, last=1.01))
        await pilot.pause()
        assert 1 <= len(set(app.chart.drawn)) <= 2


async def test_down_to_one_cell_and_back() -> None:
    app = Board()
    async with app.run_test(size=(80, 24)) as pilot:
        app.chart.show(picture(500, app.chart.dots))
        await pilot.pause()
        before = [app.chart.render_line(y).text for y in range(24)]
        for size in ((1, 1), (2, 1), (1, 30), (200, 1), (200, 50), (80, 24)):
            await pilot.resize_terminal(*size)
            await pilot.pause()
            app.chart.show(picture(500, app.chart.dots))
            await pilot.pause()
            assert [len(app.chart.render_line(y).text) for y in range(size[1])] == [size[0]] * size[1]
        assert [app.chart.render_line(y).text for y in range(24)] == before
        assert app.resized >= 6


async def test_no_rows_at_all() -> None:
    app = Board()
    async with app.run_test(size=(80, 24)) as pilot:
        app.chart.styles.height = 0
        await pilot.pause()
        app.chart.show(picture(500, 10))
        app.chart.styles.height = "1fr"
        for _ in range(100):  # the layout comes when the machine has time for it
            await pilot.pause(0.01)
            if "loss" in app.chart.render_line(0).text:
                break
        assert "loss" in app.chart.render_line(0).text


async def test_the_mouse_points_at_steps() -> None:
    app = Board()
    async with app.run_test(size=(80, 24)) as pilot:
        app.chart.show(picture(500, app.chart.dots))
        await pilot.pause()
        grid = app.chart.picture.grid  # type: ignore[union-attr]
        assert app.chart.step_at(7) is None
        assert app.chart.step_at(8) == 0 and app.chart.step_at(9) == 2 * grid.column_width
        assert app.chart.step_at(10_000) is None


async def test_it_draws_with_no_color(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    app = Board()
    async with app.run_test(size=(80, 24)) as pilot:
        assert app.no_color
        app.chart.show(picture(500, app.chart.dots))
        await pilot.pause()
        strip = app.chart.render_lines(app.chart.size.region)[3]
        colours = {segment.style.color.triplet for segment in strip if segment.style and segment.style.color}
        assert all(red == green == blue for red, green, blue in filter(None, colours))
