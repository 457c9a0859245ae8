"""One controller and 1,024 nodes of 8 GPUs that speak each second: its CPU time, its memory, how late what a screen shows is.

    python -m bench.fleet [--nodes 1024] [--seconds 25] [--profile FILE]

The controller is a real one, with the run's keys; the nodes are simulated in processes of their own (bench._nodes), which compete
with it for the machine, so CPU time is what counts. First they all come, are gathered and train, nobody watching; then a screen is
attached, as from `midwatch attach` on the controller's machine. What a snapshot costs is told from the difference.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
from rich.console import Console
from rich.table import Table

from midwatch import protocol as p
from midwatch.journal import entries as j
from midwatch.journal.journal import read_journal
from midwatch.recipe import dump_recipe, load_recipe
from midwatch.run_directory import RunPaths, read_address
from midwatch.transport.client import Client
from tests.system.harness import recipe_text

PROCESSES = 2
START_SECONDS = 300.0


class Figures(NamedTuple):
    """Of the controller, over a while."""

    cpu: float
    """Cores."""
    rss: float
    """Bytes, the most there were."""


class Watched(NamedTuple):
    """What came to a screen."""

    late: list[float]
    """Seconds from a node's word until the screen had it, for each word that it got."""
    times: list[float]
    """Of the snapshots."""
    size: int
    """Bytes of the last one."""


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=1024)
    parser.add_argument("--seconds", type=float, default=25.0)
    parser.add_argument("--profile", help="where to leave a profile of the controller, by cProfile: its own cost counts, too")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(prefix="mwb-"))
    (place / "run").mkdir(mode=0o700)
    os.environ.update(XDG_RUNTIME_DIR=str(place / "run"), XDG_CACHE_HOME=str(place / "cache"))
    started: list[subprocess.Popen[bytes]] = []
    try:
        table = _measure(place, options.nodes, options.seconds, options.profile, started)
    finally:
        for process in started[:1]:
            process.send_signal(signal.SIGTERM)  # the controller; in order, for its profile
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
        for process in started:
            process.kill()
            process.wait()
        shutil.rmtree(place, ignore_errors=True)
    Console().print(table)


def _measure(place: Path, count: int, seconds: float, profile: str | None, started: list[subprocess.Popen[bytes]]) -> Table:
    root = place / "fleet"
    process = _start_controller(place, root, count, profile, started)
    began, used = time.monotonic(), _cpu(process)
    _start_nodes(root, count, started)
    _until(lambda: any(isinstance(e, j.StateChanged) and e.state == "training" for e in _entries(root)), root)
    came, came_cpu = time.monotonic() - began, _cpu(process) - used
    time.sleep(3.0)
    alone = _watch(process, seconds)
    watched, screen = asyncio.run(_attach(root, process, seconds))

    entries = _entries(root)
    gathered = next(e.time for e in entries if isinstance(e, j.GenerationBegan))
    told = max((e.time for e in entries if isinstance(e, j.RanksEnvironment)), default=gathered) - gathered
    ended = sum(isinstance(e, j.GenerationEnded) for e in entries)
    broken = sum(file.read_text().count("\n") for file in (root / "logs").glob("nodes-*.log"))
    rate = len(watched.times) / seconds
    gap = max((b - a for a, b in itertools.pairwise(watched.times)), default=math.nan)
    late = sorted(watched.late) or [math.nan]

    table = Table("what", "figure", "to reach", title=f"one controller, {count:,} nodes of 8 GPUs at 1 Hz, {seconds:g} s each")
    table.add_row("controller's CPU, a screen attached", f"{screen.cpu:.2f} cores", "≤ 1 core")
    table.add_row("  nobody watching", f"{alone.cpu:.2f} cores", "")
    table.add_row("controller's memory, the most", f"{screen.rss / 1e6:.0f} MB", "≤ 500 MB")
    words = f"{statistics.median(late):.2f}, {late[int(0.99 * len(late))]:.2f}, {late[-1]:.2f} s"
    table.add_row("from a node's word to the screen: median, 99 %, longest", words, "")
    table.add_row(
        "a snapshot: size; drawn and sent, CPU", f"{watched.size / 1e6:.2f} MB; {(screen.cpu - alone.cpu) / rate * 1e3:.0f} ms", ""
    )
    table.add_row("  a second; longest between two", f"{rate:.1f}; {gap:.2f} s", "")
    table.add_row("from the first agent to training: wall, controller's CPU", f"{came:.1f} s, {came_cpu:.1f} s", "")
    table.add_row("  from Gather to the last node's word", f"{told:.1f} s", "")
    table.add_row("connections that broke; generations that ended", f"{broken}; {ended}", "0; 0")
    table.add_row("load of the machine, over 1 and 5 minutes", "{:.1f}, {:.1f}".format(*os.getloadavg()[:2]), "")
    return table


def _start_controller(
    place: Path, root: Path, count: int, profile: str | None, started: list[subprocess.Popen[bytes]]
) -> psutil.Process:
    paths = RunPaths(root)
    paths.create()
    cluster = f'backend = "external"\nnodes = {count}\nranks_per_node = 8'
    text = recipe_text(place / "shards", steps=1_000_000, batch=8 * count).replace("ranks_per_node = 2", cluster)
    paths.recipe.write_text(text)
    paths.recipe.write_text(dump_recipe(load_recipe(paths.recipe)))
    words = ["-m", "cProfile", "-o", profile] if profile is not None else ["-P"]
    with (paths.logs / "controller.log").open("ab") as log:
        started.append(subprocess.Popen([sys.executable, *words, "-m", "launcher.controller", str(root)], stdout=log, stderr=log))
    _until(lambda: (found := read_address(paths.address)) is not None and bool(found.remotes), root)
    return psutil.Process(started[0].pid)


def _start_nodes(root: Path, count: int, started: list[subprocess.Popen[bytes]]) -> None:
    for number in range(PROCESSES):
        first, stop = count * number // PROCESSES, count * (number + 1) // PROCESSES
        words = [sys.executable, "-m", "bench._nodes", str(root), str(first), str(stop)]
        with (root / "logs" / f"nodes-{number}.log").open("ab") as log:
            started.append(subprocess.Popen(words, stdout=log, stderr=log))


def _entries(root: Path) -> list[j.Entry]:
    return [e for _, e in read_journal(root / "journal").entries]


def _until(holds: Callable[[], bool], root: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not holds():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{f}: {f.read_text()[-2000:]}" for f in (root / "logs").glob("*.log"))
            raise RuntimeError(f"waited {START_SECONDS:g} s in vain\n{logs}")
        time.sleep(1.0)


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _peak(process: psutil.Process) -> float:
    """The most memory that it ever had."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return float(line.split()[1]) * 1024
    return float(process.memory_info().rss)


def _watch(process: psutil.Process, seconds: float) -> Figures:
    began, used = time.monotonic(), _cpu(process)
    time.sleep(seconds)
    return Figures((_cpu(process) - used) / (time.monotonic() - began), _peak(process))


async def _attach(root: Path, process: psutil.Process, seconds: float) -> tuple[Watched, Figures]:
    seen: dict[str, float] = {}
    late: list[float] = []
    times: list[float] = []

    def arrived(snapshot: p.Snapshot) -> None:
        now = time.time()
        times.append(now)
        for node in snapshot.nodes:
            if node.stats is not None and seen.get(node.name) != node.stats.time:
                if node.name in seen:
                    late.append(now - node.stats.time)
                seen[node.name] = node.stats.time

    async with Client(root, subscribe=True, on_snapshot=arrived) as client:
        await asyncio.sleep(1.0)
        late.clear()
        times.clear()
        began, used = time.monotonic(), _cpu(process)
        await asyncio.sleep(seconds)
        figures = Figures((_cpu(process) - used) / (time.monotonic() - began), _peak(process))
        assert client.snapshot is not None
        return Watched(late, times, len(p.encode(client.snapshot))), figures


if __name__ == "__main__":
    main()
