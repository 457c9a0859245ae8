"""What watching costs: 12 charts of 100,000 points at 1 Hz on 200x50, in a real terminal.

    python -m bench.charts

The screen runs as its own process on a pseudo-terminal, as it does over SSH. Another process plays the controller: it
holds the metrics index, takes in a step a second, and answers the charts' queries through a pipe. Only the screen is
held to the targets; the controller's share is shown beside it.
"""

import argparse
import fcntl
import json
import os
import pty
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path
from typing import IO

import numpy as np
import psutil
from rich.console import Console
from rich.table import Table

CHARTS, POINTS, COLUMNS, ROWS = 12, 100_000, 200, 50
TARGETS = (4.0, 10.0, 120.0)  # per cent of a core, kB/s, MB


def controller() -> None:
    """Answers, for each line `WIDTH` on stdin, twelve length-prefixed columns; each answer is a step later."""
    from launcher.metrics.chunks import MetricFrame, StepMetrics
    from launcher.metrics.store import MetricStore
    from midwatch.metrics.m4_columns import LineageSegment
    from midwatch.metrics.m4_nodes import ROW

    folder = Path(sys.argv[2])
    store = MetricStore.open(folder / "metrics", folder / "index.sqlite", term=1)
    random = np.random.default_rng(0)
    names = [f"train/metric_{number}" for number in range(CHARTS)]
    for name in names:
        rows = np.zeros(POINTS, ROW)
        rows["step"] = np.arange(POINTS)
        rows["value"] = 2 + 8 / np.sqrt(1 + rows["step"] / 100) + random.normal(0, 0.05, POINTS)
        rows["value"][random.integers(0, POINTS, 6)] *= 2
        store.load_rows(name, 0, rows)
    path, step = [LineageSegment(0, -1, None)], POINTS
    for line in sys.stdin:
        row = StepMetrics(0, step, step, float(step), {name: 2 + float(random.normal(0, 0.05)) for name in names})
        store.add(MetricFrame("rank0", step, [row]))
        step += 1
        for name in names:
            data = store.columns(name, path, 0, step, int(line)).encode()
            sys.stdout.buffer.write(struct.pack("<I", len(data)) + data)
        sys.stdout.buffer.flush()


def screen() -> None:
    """The twelve charts; asks the controller for columns once a second."""
    from textual.app import App, ComposeResult
    from textual.containers import Grid

    from midwatch.metrics.m4_columns import Columns
    from tui.chart.render import Picture, Series
    from tui.chart.widget import Chart

    source = subprocess.Popen(
        [sys.executable, "-m", "bench.charts", "--controller", sys.argv[2]],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert source.stdin is not None and source.stdout is not None
    requests: IO[bytes] = source.stdin
    answers: IO[bytes] = source.stdout

    class Board(App[None]):
        CSS = f"Grid {{ grid-size: 3 {CHARTS // 3}; grid-gutter: 0 1; }}"

        def compose(self) -> ComposeResult:
            with Grid():
                for _ in range(CHARTS):
                    yield Chart()

        def on_mount(self) -> None:
            self.set_interval(1.0, self.tick)

        def tick(self) -> None:
            charts = list(self.query(Chart))
            requests.write(f"{min(chart.dots for chart in charts)}\n".encode())
            requests.flush()
            for chart in charts:
                (length,) = struct.unpack("<I", answers.read(4))
                columns = Columns.decode(answers.read(length))
                chart.show(Picture(columns.series, columns.grid, (Series(columns, window=2_000),)))

    Board().run()
    source.terminate()
    source.wait()


def watch(folder: str, warm_up: float, seconds: float) -> tuple[float, float, float, float]:
    """Runs the screen on a pty. Returns its per cent of a core, kB/s, MB, and the controller's per cent of a core."""
    process, terminal = pty.fork()
    if process == 0:
        os.environ.update(TERM="xterm-256color", COLORTERM="truecolor", TEXTUAL_FPS="15")
        os.execv(sys.executable, [sys.executable, "-m", "bench.charts", "--screen", folder])
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    try:
        _drain(terminal, warm_up)
        watched = psutil.Process(process)
        helper = watched.children()[0]
        before = [sum(one.cpu_times()[:2]) for one in (watched, helper)]
        begin = time.monotonic()
        sent = _drain(terminal, seconds)
        elapsed = time.monotonic() - begin
        spent = [sum(one.cpu_times()[:2]) - start for one, start in zip((watched, helper), before, strict=True)]
        memory = watched.memory_info().rss / 1e6
        return spent[0] / elapsed * 100, sent / elapsed / 1e3, memory, spent[1] / elapsed * 100
    finally:
        os.write(terminal, b"\x11")  # ctrl+q
        _drain(terminal, 1.0)
        os.close(terminal)
        os.waitpid(process, 0)


def _drain(terminal: int, seconds: float) -> int:
    """Reads what the screen sends for so long; returns its bytes."""
    total, end = 0, time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        if select.select([terminal], [], [], left)[0]:
            try:
                total += len(os.read(terminal, 1 << 16))
            except OSError:  # the screen has gone
                break
    return total


def main() -> None:
    if sys.argv[1:2] == ["--controller"]:
        return controller()
    if sys.argv[1:2] == ["--screen"]:
        return screen()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    folder = tempfile.mkdtemp()
    try:
        *figures, helper = watch(folder, 8.0, arguments.seconds)
    finally:
        shutil.rmtree(folder)
    if arguments.json:
        print(json.dumps(dict(zip(("cpu_percent", "kb_per_second", "rss_mb"), figures, strict=True))))
        return None
    table = Table(title=f"{CHARTS} charts of {POINTS:,} points at 1 Hz, {COLUMNS}x{ROWS}")
    for heading in ("screen", "measured", "target", "ratio"):
        table.add_column(heading, justify="left" if heading == "screen" else "right")
    names = ("% of a core", "kB/s to the terminal", "resident memory, MB")
    for name, figure, target in zip(names, figures, TARGETS, strict=True):
        table.add_row(name, f"{figure:.1f}", f"{target:.0f}", f"{figure / target:.2f}")
    table.add_row("beside it: the controller, % of a core", f"{helper:.1f}", "", "")
    Console().print(table)
    return None


if __name__ == "__main__":
    main()
