"""What a chart costs as the run grows: the same query over 10,000 and 10,000,000 steps; and how fast values come in.

python -m bench.metrics
"""

import argparse
import resource
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table as RichTable

from launcher.metrics.chunks import MetricFrame, StepMetrics
from launcher.metrics.store import MetricStore
from midwatch.metrics.m4_columns import LineageSegment
from midwatch.metrics.m4_nodes import ROW, Table

DOT_COLUMNS = 380  # a chart across a terminal of 200 columns
LENGTHS = (10_000, 100_000, 1_000_000, 10_000_000)
PATH = [LineageSegment(0, -1, None)]


def loss(start: int, stop: int) -> Table:
    """A noisy, falling loss with spikes and a few NaNs, [stop - start] of ROW."""
    random = np.random.default_rng(start)
    rows = np.empty(stop - start, ROW)
    steps = np.arange(start, stop)
    rows["step"] = steps
    rows["value"] = 2 + 8 / np.sqrt(1 + steps / 100) + random.normal(0, 0.05, len(steps))
    rows["value"][random.random(len(steps)) < 1e-4] *= 3
    rows["value"][random.random(len(steps)) < 1e-5] = np.nan
    rows["tokens"] = steps * 524_288
    rows["time"] = 1.7e9 + steps * 0.8 + random.normal(0, 0.01, len(steps))
    return rows


def build(folder: Path, length: int) -> MetricStore:
    """An index of one series of `length` steps."""
    store = MetricStore.open(folder / "metrics", folder / "index.sqlite")
    for start in range(0, length, 1_000_000):
        store.load_rows("train/loss", 0, loss(start, min(length, start + 1_000_000)))
    return store


def query_seconds(stores: list[MetricStore], rounds: int) -> list[float]:
    """Median seconds of a chart's query for each store, taken in turn so that other load hits all alike."""
    spent: list[list[float]] = [[] for _ in stores]
    for _ in range(rounds):
        for store, times, length in zip(stores, spent, LENGTHS, strict=True):
            begin = time.perf_counter()
            store.columns("train/loss", PATH, 0, length, DOT_COLUMNS)
            times.append(time.perf_counter() - begin)
    return [statistics.median(times) for times in spent]


def ingest_rate(folder: Path, series: int, steps: int) -> float:
    """Values a second through chunk, fsync and index, in frames of 100 rows."""
    store = MetricStore.open(folder / "metrics", folder / "index.sqlite", term=1)
    names = [f"gpu/{number}/utilisation" for number in range(series)]
    frames = [
        MetricFrame("rank0", number, [StepMetrics(0, step, step, float(step), dict.fromkeys(names, step * 0.5)) for step in block])
        for number, block in enumerate(np.arange(steps).reshape(-1, 100).tolist())
    ]
    begin = time.perf_counter()
    for frame in frames:
        store.add(frame)
        store.sync()
    store.flush()
    seconds = time.perf_counter() - begin
    store.close()
    return series * steps / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=50)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stores = [build(folder / str(length), length) for length in LENGTHS]
        seconds = query_seconds(stores, rounds)
        table = RichTable(title=f"A chart of {DOT_COLUMNS} dot columns over a whole run")
        for heading in ("steps", "query, ms", f"over {LENGTHS[0]:,} steps", "index, bytes a step"):
            table.add_column(heading, justify="right")
        for length, spent in zip(LENGTHS, seconds, strict=True):
            size = sum(file.stat().st_size for file in (folder / str(length)).glob("index.sqlite*"))
            table.add_row(f"{length:,}", f"{spent * 1e3:.2f}", f"{spent / seconds[0]:.2f}", f"{size / length:.0f}")
        for store in stores:
            store.close()
        intake = RichTable(title="Taking values in: chunk, fsync, index")
        for heading in ("series", "values a second", "of 50,000"):
            intake.add_column(heading, justify="right")
        for series, steps in ((20, 20_000), (2_000, 200)):
            rate = ingest_rate(folder / f"intake{series}", series, steps)
            intake.add_row(f"{series:,}", f"{rate:,.0f}", f"{rate / 50_000:.1f}x")
        console = Console()
        console.print(table)
        console.print(intake)
        console.print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")


if __name__ == "__main__":
    main()
