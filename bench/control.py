"""Steering a real run: how soon a pause holds, how soon a killed rank's run steps again, and what `midwatch --help` costs.

A pause is asked for over a client's connection, as a key does, at ten random moments; it can hold only when the step under way has
ended, so that step's length is what it is compared with. A rank is killed ten times in a row; the journal tells the parts.
"""

from __future__ import annotations

import asyncio
import os
import random
import resource
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from midwatch import protocol as p
from midwatch.journal import entries as j
from midwatch.transport.client import Client
from tests.system.harness import MIDWATCH, Run, recipe_text

PAUSES, KILLS, HELPS = 10, 10, 10
SEED = 5


def main() -> None:
    """Prints the table."""
    random.seed(SEED)
    place = Path(tempfile.mkdtemp(prefix="mwb-"))
    (place / "run").mkdir(mode=0o700)
    environment = {
        **os.environ,
        "XDG_RUNTIME_DIR": str(place / "run"),
        "XDG_CACHE_HOME": str(place / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    run = Run(place / "bench", environment)
    table = Table(title="control, over a real run on two ranks")
    for column in ("what", "figure", "to reach"):
        table.add_column(column)
    try:
        run.start(recipe_text(place / "shards", steps=100_000, every=50, batch=128))
        run.wait_step(20, timeout=120)
        _pauses(run, table)
        _kills(run, table)
        _help(table)
    finally:
        run.clear()
        shutil.rmtree(place, ignore_errors=True)
    Console().print(table)


def _pauses(run: Run, table: Table) -> None:
    async def measure() -> list[tuple[float, float]]:
        found = []
        async with Client(run.root, subscribe=True) as client:
            for _ in range(PAUSES):
                await asyncio.sleep(0.5 + random.random())
                began = time.monotonic()
                view = await client.command("pause")
                held = time.monotonic() - began
                assert view.state == "done", view.reason
                query = p.MetricsQuery(id=0, names=("perf/step_seconds",), last=20)
                rows = (await client.ask(query, p.MetricsReply)).rows["perf/step_seconds"]
                found.append((held, max(row.value for row in rows)))
                await client.command("resume")
        return found

    found = asyncio.run(measure())
    excess = [held - step for held, step in found]
    table.add_row("pause, key to all ranks holding: median", f"{statistics.median(h for h, _ in found) * 1e3:.0f} ms", "")
    table.add_row("longest step of the twenty before: median", f"{statistics.median(s for _, s in found) * 1e3:.0f} ms", "")
    table.add_row(f"most over that step, of {PAUSES}", f"{max(excess) * 1e3:+.0f} ms", "≤ +50 ms")


def _kills(run: Run, table: Table) -> None:
    parts: dict[str, list[float]] = {"seen": [], "ranks connected": [], "first step": []}
    recovered = 0
    for _ in range(KILLS):
        generation = run.snapshot().generation
        killed = time.time()
        run.kill(random.choice(run.ranks()))
        again = run.wait(lambda s, g=generation: s.generation > g and s.state == "training", 60)
        run.wait_step(again.step + 2)
        recovered += 1
        since = [(e.time, e) for _, e in run.entries() if e.time >= killed]
        seen = next(t for t, e in since if isinstance(e, j.GenerationEnded))
        training = next(t for t, e in since if isinstance(e, j.StateChanged) and e.state == "training")
        stepped = min(row.time for row in run.rows("train/loss") if row.time > training - 0.5)
        parts["seen"].append(seen - killed)
        parts["ranks connected"].append(training - seen)
        parts["first step"].append(max(0.0, stepped - training))
    table.add_row("rank killed, in a row: recovered", f"{recovered} of {KILLS}", f"{KILLS} of {KILLS}")
    for name, seconds in parts.items():
        table.add_row(f"  {name}: median, longest", f"{statistics.median(seconds):.2f} s, {max(seconds):.2f} s", "")


def _help(table: Table) -> None:
    times = []
    for _ in range(HELPS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([MIDWATCH, "--help"], check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    table.add_row("midwatch --help: CPU, median", f"{statistics.median(times):.3f} s", "≤ 0.2 s")


if __name__ == "__main__":
    main()
