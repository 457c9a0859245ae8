"""What the nodes view costs: 4,096 GPUs (512 nodes of 8) drawn on 200x50, and their figures changing once a second.

    python -m bench.heat

The view's parts are timed in this process: taking a snapshot's figures up, choosing the map that fits, painting it, and telling
which rows changed; then a whole second's work, decoding included. Milliseconds of CPU, the median of several.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from midwatch import protocol as p
from tests.tui.machines import machines
from tui.chart import heatmap
from tui.views.nodes.faults import History, troubles
from tui.views.nodes.map import arrange
from tui.views.nodes.table import fleet_of

WIDTH, HEIGHT, NODES = 200, 44, 512
TARGET = 20.0
"""Milliseconds a second for all of it: 2 % of a core."""


def timed(work: Callable[[], object], times: int = 15) -> float:
    """Median milliseconds of CPU."""
    spent = []
    for _ in range(times):
        began = time.process_time()
        work()
        spent.append(1000 * (time.process_time() - began))
    return statistics.median(spent)


def main() -> None:
    snapshot, later = machines(NODES), machines(NODES, shift=3)
    frame = p.encode(snapshot)
    fleet = fleet_of(snapshot, "utilisation")
    table = Table(title=f"{fleet.units:,} GPUs on {NODES} nodes, {WIDTH}x{HEIGHT + 6}")
    table.add_column("part")
    table.add_column("ms of CPU", justify="right")
    parts = {
        "figures and marks of all GPUs": lambda: fleet_of(snapshot, "utilisation"),
        "the worst 40": lambda: troubles(fleet, 40),
        "the last minutes (every 3 s)": lambda: History().record(snapshot),
    }
    total = 0.0
    for name, work in parts.items():
        table.add_row(name, f"{timed(work):.1f}")
        total += timed(work) if "3 s" not in name else timed(work) / 3
    for level in ("GPUs", "nodes", "racks"):
        made = arrange(fleet, level, WIDTH, HEIGHT)
        drawing = timed(lambda level=level: _draw(arrange(fleet, level, WIDTH, HEIGHT)))  # type: ignore[misc]  # mypy cannot type a lambda's default
        after = arrange(fleet_of(later, "utilisation"), level, WIDTH, HEIGHT)
        changed = len(_draw(after).changes(_draw(made)))
        table.add_row(f"the map by {level}: arranged and painted", f"{drawing:.1f}")
        table.add_row("  rows sent when one node's figures change", f"{changed} of {HEIGHT}")
        total += drawing if level == "GPUs" else 0.0
    table.add_row("decoding a snapshot", f"{timed(lambda: p.decode(frame)):.1f}")
    table.add_row(f"a second's work without decoding (target {TARGET:g}, ratio {total / TARGET:.2f})", f"{total:.1f}")
    table.add_row("bytes of a snapshot", f"{len(frame):,}")
    Console().print(table)


def _draw(made: object) -> heatmap.Canvas:
    from tui.views.nodes.map import NodeMap

    assert isinstance(made, NodeMap)
    return heatmap.paint(made.heat, made.shape, WIDTH, HEIGHT, 0, (0, 0))


if __name__ == "__main__":
    main()
