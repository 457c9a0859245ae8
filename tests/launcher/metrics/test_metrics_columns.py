"""The index answers with exactly the M4 that brute force finds over the raw rows of the surviving line."""

import math
import random
from pathlib import Path

import numpy as np
import pytest

from launcher.metrics.chunks import MetricFrame, StepMetrics
from launcher.metrics.store import MetricStore
from midwatch.metrics.m4_columns import NODES_A_COLUMN, Columns, LineageSegment, columns_of, grid, smoothed
from midwatch.metrics.m4_nodes import ROW

Raw = dict[int, dict[int, float]]  # lineage -> step -> value


def brute_force(raw: Raw, path: list[LineageSegment], columns: Columns) -> None:
    """Asserts every field of every column against the rows themselves."""
    line = [
        (step, value)
        for lineage, after, last in path
        for step, value in sorted(raw.get(lineage, {}).items())
        if step > after and (last is None or step <= last)
    ]
    lattice = columns.grid
    previous: int | None = None
    for column in range(lattice.length):
        low = lattice.start + column * lattice.column_width
        rows = [(step, value) for step, value in line if low <= step < low + lattice.column_width]
        finite = [value for _, value in rows if math.isfinite(value)]
        got = columns.table[column]
        assert (got["count"], got["nans"]) == (len(finite), len(rows) - len(finite))
        assert columns.step_start[column] == low
        if not finite:
            assert math.isnan(got["min"]) and math.isnan(got["last"])
            assert columns.gap_before[column]
            continue
        assert (got["first"], got["min"], got["max"], got["last"]) == (finite[0], min(finite), max(finite), finite[-1])
        assert got["sum"] == pytest.approx(sum(finite))
        assert (got["first_tokens"], got["last_tokens"]) == (rows[0][0] * 7, rows[-1][0] * 7)
        assert (got["first_time"], got["last_time"]) == (rows[0][0] / 2, rows[-1][0] / 2)
        first_step = next(step for step, value in rows if math.isfinite(value))
        broken = previous is None or any(previous < step < first_step and not math.isfinite(value) for step, value in line)
        assert columns.gap_before[column] == broken
        previous = [step for step, value in rows if math.isfinite(value)][-1]


def noisy(rng: random.Random, steps: range) -> dict[int, float]:
    """A random walk with spikes, runs of NaN and infinities."""
    values, level, gap = {}, 3.0, 0
    for step in steps:
        level += rng.gauss(0, 0.1)
        gap = gap - 1 if gap else (rng.randrange(40) if rng.random() < 0.01 else 0)
        spike = rng.choice([1e3, -1e3, math.inf]) if rng.random() < 0.003 else 0
        values[step] = math.nan if gap else level + spike
    return values


def fill(store: MetricStore, raw: Raw, name: str = "loss", source: str = "rank0", batch: int = 100) -> None:
    number = 0
    for lineage, values in raw.items():
        steps = list(values)
        for begin in range(0, len(steps), batch):
            rows = [StepMetrics(lineage, s, s * 7, s / 2, {name: values[s]}) for s in steps[begin : begin + batch]]
            number += 1
            assert store.add(MetricFrame(source, number, rows))


@pytest.fixture
def store(tmp_path: Path) -> MetricStore:
    return MetricStore.open(tmp_path / "metrics", tmp_path / "index.sqlite", term=1)


@pytest.mark.parametrize("seed", range(8))
def test_columns_equal_brute_force_over_lineages_and_zooms(store: MetricStore, seed: int) -> None:
    rng = random.Random(seed)
    raw: Raw = {
        0: noisy(rng, range(3_000)),
        1: noisy(rng, range(2_001, 5_017)),
        2: noisy(rng, range(4_503, 9_000)),
    }
    path = [LineageSegment(0, -1, 2_000), LineageSegment(1, 2_000, 4_502), LineageSegment(2, 4_502, None)]
    fill(store, raw)
    flush_late = rng.random() < 0.5
    if flush_late:
        store.flush()
    for _ in range(12):
        start = rng.randrange(9_000)
        stop = rng.randrange(start + 1, 9_500)
        columns = store.columns("loss", path, start, stop, rng.randrange(1, 200))
        brute_force(raw, path, columns)
    brute_force(raw, path, store.columns("loss", path, 0, 9_000, 1))
    brute_force(raw, [LineageSegment(1, -1, None)], store.columns("loss", [LineageSegment(1, -1, None)], 0, 9_000, 37))


def test_flushed_and_pending_rows_read_as_one(store: MetricStore) -> None:
    rng = random.Random(1)
    raw = {0: noisy(rng, range(2_500))}
    path = [LineageSegment(0, -1, None)]
    steps = list(raw[0])
    for number, begin in enumerate(range(0, 2_500, 50)):
        store.add(
            MetricFrame("rank0", number, [StepMetrics(0, s, s * 7, s / 2, {"loss": raw[0][s]}) for s in steps[begin : begin + 50]])
        )
        if number % 7 == 0:
            store.flush()
        if number % 10 == 9:
            seen = {0: {s: raw[0][s] for s in steps[: begin + 50]}}
            brute_force(seen, path, store.columns("loss", path, 0, begin + 50, 21))


def test_rows_that_come_late_and_shuffled_read_in_order(store: MetricStore) -> None:
    rng = random.Random(2)
    raw = noisy(rng, range(3_000))
    shuffled = list(raw)
    rng.shuffle(shuffled)
    for number, begin in enumerate(range(0, 3_000, 100)):
        store.add(
            MetricFrame("rank0", number, [StepMetrics(0, s, s * 7, s / 2, {"loss": raw[s]}) for s in shuffled[begin : begin + 100]])
        )
        if number % 5 == 0:
            store.flush()
    path = [LineageSegment(0, -1, None)]
    brute_force({0: raw}, path, store.columns("loss", path, 0, 3_000, 40))
    assert store.rows("loss", path, 0, 3_000, 5_000)["step"].tolist() == list(range(3_000))


def test_a_sparse_series_has_its_few_rows_in_their_columns(store: MetricStore) -> None:
    raw = {0: {step: float(step) for step in range(0, 50_000, 100)}}
    fill(store, raw, "eval/web/loss")
    path = [LineageSegment(0, -1, None)]
    brute_force(raw, path, store.columns("eval/web/loss", path, 0, 50_000, 300))
    brute_force(raw, path, store.columns("eval/web/loss", path, 1_150, 1_950, 300))


def test_a_spike_of_one_step_in_a_million_is_in_its_column(store: MetricStore) -> None:
    rows = np.zeros(1_000_000, ROW)
    rows["step"] = np.arange(1_000_000)
    rows["value"][654_321] = 1e9
    store.load_rows("loss", 0, rows)
    columns = store.columns("loss", [LineageSegment(0, -1, None)], 0, 1_000_000, 200)
    assert np.flatnonzero(columns.max == 1e9).tolist() == [654_321 // columns.grid.column_width]
    reference = columns_of("loss", rows, 0, 1_000_000, 200)
    for field in ("first", "min", "max", "last", "count"):
        np.testing.assert_array_equal(columns.table[field], reference.table[field])


def test_a_grid_wastes_at_most_a_sixteenth_and_is_shared_by_all_series() -> None:
    rng = random.Random(3)
    for _ in range(2_000):
        start = rng.randrange(10**9)
        stop = start + rng.randrange(1, 10 ** rng.randrange(1, 9))
        width = rng.randrange(1, 500)
        lattice = grid(start, stop, width)
        node = 4**lattice.level
        assert lattice.start <= start < lattice.start + node
        assert lattice.stop >= stop and lattice.length <= width
        assert lattice.start % node == 0 and lattice.column_width % node == 0
        if lattice.level:
            assert node * NODES_A_COLUMN <= lattice.column_width
            assert lattice.length >= width * 15 // 17 - 1


def test_a_grid_stays_as_a_run_grows_within_its_last_column() -> None:
    grids = {grid(0, stop, 118)[:2] for stop in range(100_000, 101_000)}
    assert len(grids) <= 2


def test_the_window_mean_survives_a_spike_that_swamps_cumulative_sums() -> None:
    rows = np.zeros(100, ROW)
    rows["step"], rows["value"] = np.arange(100), 2.0
    rows["value"][10], rows["value"][50] = 1e30, np.nan
    columns = columns_of("loss", rows, 0, 100, 100)
    mean = smoothed(columns, 5)
    assert mean[9] == 2.0 and mean[15] == 2.0 and mean[14] > 1e29
    assert math.isnan(mean[50]) and mean[51] == 2.0


def test_columns_survive_the_wire() -> None:
    rows = np.zeros(50, ROW)
    rows["step"], rows["value"] = np.arange(50), np.arange(50) / 3
    columns = columns_of("eval/déjà/loss", rows, 0, 90, 30)
    again = Columns.decode(columns.encode())
    assert (again.series, again.grid) == (columns.series, columns.grid)
    assert again.table.tobytes() == columns.table.tobytes()
    with pytest.raises(ValueError, match="truncated"):
        Columns.decode(b"abc")


def test_the_nearest_row_the_last_rows_and_the_export_follow_the_path(store: MetricStore) -> None:
    fill(store, {0: {s: float(s) for s in range(0, 1_000, 10)}, 1: {s: -float(s) for s in range(505, 900, 10)}})
    path = [LineageSegment(0, -1, 500), LineageSegment(1, 500, None)]
    near = store.row_near("loss", path, 501)
    assert near is not None and (near.lineage, near.step, near.tokens) == (0, 500, 3_500)
    near = store.row_near("loss", path, 504)
    assert near is not None and (near.lineage, near.value) == (1, -505.0)
    assert store.row_near("absent", path, 3) is None
    assert [point.step for point in store.last("loss", 3, path)] == [875, 885, 895]
    assert [p.step for p in store.last("loss", 1_000, path)] == [*range(0, 501, 10), *range(505, 900, 10)]
    latest = store.latest("loss")
    assert latest is not None and (latest.lineage, latest.step) == (1, 895)
    assert store.rows("loss", path, 480, 530, 4)["step"].tolist() == [480, 490, 500, 505]
    assert [tuple(info) for info in store.names()] == [("loss", 0, 990, 140)]
