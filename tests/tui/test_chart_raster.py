"""What M4 columns draw is, dot for dot, what every row of the series draws one after the other."""

import math
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from launcher.metrics.chunks import MetricFrame, StepMetrics
from launcher.metrics.store import MetricStore
from midwatch.metrics.m4_columns import Columns, Grid, LineageSegment, columns_of
from midwatch.metrics.m4_nodes import ROW, Table
from tui.chart.braille import cells, characters, dot_rows
from tui.chart.render import line_dots
from tui.chart.scale import Scale, scale


def naive_line(x0: int, y0: int, x1: int, y1: int) -> set[tuple[int, int]]:
    """A line dot by dot: in each column the rows it passes from one edge of the column to the other."""
    down = 1 if y1 >= y0 else -1
    a, b = y0 * down, y1 * down
    edges = [a, *(math.floor(a + Fraction((b - a) * (2 * c + 1), 2 * (x1 - x0)) + Fraction(1, 2)) for c in range(x1 - x0))]
    dots = set()
    for c, enter in enumerate(edges):
        leave = b if c == x1 - x0 else max(enter, edges[c + 1] - 1)
        dots |= {(x0 + c, row * down) for row in range(enter, leave + 1)}
    return dots


def oracle(rows: Table, grid: Grid, y_scale: Scale, width: int, height: int) -> np.ndarray:
    """The whole series, row by row. A gap breaks the line, unless both its ends lie in one dot column."""
    dots: set[tuple[int, int]] = set()
    before: tuple[int, int] | None = None
    gap = False
    for step, value in zip(rows["step"].tolist(), rows["value"].tolist(), strict=True):
        if not math.isfinite(value):
            gap = True
            continue
        x = (step - grid.start) // grid.column_width
        y = int(dot_rows(np.array([value]), y_scale.low, y_scale.high, height, y_scale.log)[0])
        dots.add((x, y))
        if before and before[0] == x:
            dots |= {(x, row) for row in range(min(y, before[1]), max(y, before[1]) + 1)}
        elif before and not gap:
            dots |= naive_line(*before, x, y)
        before, gap = (x, y), False
    picture = np.zeros((height, width), bool)
    for x, y in dots:
        picture[y, x] = True
    return picture


def series(seed: int, length: int) -> Table:
    """A walk with spikes, single NaNs, runs of NaN, infinities, and missing steps."""
    rng = np.random.default_rng(seed)
    rows = np.zeros(length, ROW)
    sparse = rng.integers(1, [2, 2, 30, 300][seed % 4], length)
    rows["step"] = np.cumsum(sparse)
    rows["value"] = 3 + np.cumsum(rng.normal(0, 0.1, length))
    spikes = rng.random(length) < 0.004
    rows["value"][spikes] += rng.normal(0, 30, spikes.sum())
    for start in np.flatnonzero(rng.random(length) < 0.005):
        rows["value"][start : start + rng.integers(1, 60)] = np.nan
    rows["value"][rng.random(length) < 0.001] = np.inf
    return rows


def drawn(columns: Columns, y_scale: Scale, width: int, height: int) -> np.ndarray:
    table = columns.table
    values = np.stack([table["first"], table["min"], table["max"], table["last"]])
    return line_dots(columns, values, columns.grid, y_scale, width, height)


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("seed", range(24))
def test_m4_draws_the_very_dots_of_the_full_series(seed: int, log: bool) -> None:
    rng = random.Random(seed)
    rows = series(seed, rng.choice([1, 2, 50, 1_000, 4_000]))
    width, height = rng.randrange(1, 200), 4 * rng.randrange(1, 20)
    columns = columns_of("loss", rows, 0, int(rows["step"][-1]) + 1, width)
    finite = rows["value"][np.isfinite(rows["value"])]
    high = float(finite.max()) if len(finite) else 1.0
    y_scale = scale(float(finite.min()) if len(finite) else 0.0, max(high, 0.1) if log else high, 5, log)
    dots = drawn(columns, y_scale, width, height)
    expected = oracle(rows, columns.grid, y_scale, width, height)
    assert np.array_equal(dots, expected), f"{(dots != expected).sum()} dots differ"


def test_the_index_draws_the_very_dots_of_the_surviving_line(tmp_path: Path) -> None:
    store = MetricStore.open(tmp_path / "metrics", tmp_path / "index.sqlite", term=1)
    first, second = series(0, 3_000), series(1, 4_000)
    for number, (lineage, rows) in enumerate([(0, first), (1, second[second["step"] > 2_001])]):
        sent = [StepMetrics(lineage, step, 0, 0.0, {"loss": value}) for step, value, *_ in rows.tolist()]
        store.add(MetricFrame("rank0", number, sent))
    store.flush()
    path = [LineageSegment(0, -1, 2_001), LineageSegment(1, 2_001, None)]
    line = np.concatenate([first[first["step"] <= 2_001], second[second["step"] > 2_001]])
    finite = line["value"][np.isfinite(line["value"])]
    y_scale = scale(float(finite.min()), float(finite.max()), 5)
    columns = store.columns("loss", path, 0, int(line["step"][-1]) + 1, 61)
    assert np.array_equal(drawn(columns, y_scale, 61, 64), oracle(line, columns.grid, y_scale, 61, 64))


def test_a_diagonal_is_one_dot_thick() -> None:
    assert naive_line(0, 0, 3, 3) == {(0, 0), (1, 1), (2, 2), (3, 3)}
    assert naive_line(0, 3, 3, 0) == {(0, 3), (1, 2), (2, 1), (3, 0)}


def test_a_nan_between_two_columns_breaks_the_line_and_one_within_a_column_does_not() -> None:
    rows = np.zeros(8, ROW)
    rows["step"] = np.arange(8)
    rows["value"] = [0, math.nan, 1, 1, 1, math.nan, 0, 0]
    columns = columns_of("loss", rows, 0, 8, 2)
    assert columns.gap_before.tolist() == [True, False]
    rows["value"] = [0, 0, 0, math.nan, 1, 1, 1, 1]
    columns = columns_of("loss", rows, 0, 8, 2)
    assert columns.gap_before.tolist() == [True, True]


def test_braille_and_ascii_cells() -> None:
    dots = np.zeros((4, 6), bool)
    dots[0, 0] = dots[3, 1] = True
    dots[:, 2:4] = True
    assert "".join(characters(cells(dots))[0]) == "⢁⣿ "
    assert "".join(characters(cells(dots), unicode=False)[0]) == ":| "
    assert all(ord(char) < 128 for char in characters(np.arange(256, dtype=np.uint8), unicode=False))
