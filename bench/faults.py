"""Faults on three hosts, and what they cost: under Midwatch and under stock torchrun, the same recipe, trainer and hosts.

python -m bench.faults [--tries 3] [--under midwatch|torchrun]

The hosts are network namespaces (tests/system/hosts.py), a rank on each of two; the host of rank 1 is hurt. Under Midwatch a
third is a spare, and the journal and the ranks' logs tell the parts. torchrun has one or two hosts (`--nnodes=1:2`) and no spare,
for with one waiting it restarts its workers without end; it has the c10d rendezvous with what makes it quickest, collectives with
a timeout of ten seconds (bench._stock), and its store on a host that nothing happens to, unless said. Beside it, arithmetic: what
these seconds make of the failures that Llama 3 was trained through.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import shutil
import signal
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from bench._faults import NAMES, NEVER_SECONDS, Cost, Stock, Watch, Watched
from tests.system.hosts import Hosts
from tests.system.namespaces import missing

KINDS = {"rank killed": "a rank is killed", "power lost": "a node loses power", "link cut": "a node is cut off"}
LLAMA_SECONDS = 54 * 86400.0
LLAMA = {"rank killed": 331, "power lost": 46, "link cut": 42}
"""Llama 3's 419 unexpected interruptions in 54 days on 16,384 GPUs (The Llama 3 Herd of Models, table 5), by the fault that they
are here: of a network 42 (35 switch or cable, 7 NIC), of a whole host 46 (32 host maintenance, 3 power supply, 2 chassis, 2 CPU,
2 system memory, 2 IO board, 3 SSD), of one rank the rest (148 GPU, 72 HBM, 54 software, and others)."""

T = TypeVar("T")


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--under", choices=("midwatch", "torchrun", "both"), default="both")
    options = parser.parse_args()
    if lacking := missing():
        print(f"bench.faults: {lacking}")
        return
    place = Path(tempfile.mkdtemp(prefix="mwb-"))
    (place / "run").mkdir(mode=0o700)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # what was started must end in any case
    places = {"HOME": str(place), "XDG_RUNTIME_DIR": str(place / "run"), "XDG_CACHE_HOME": str(place / "cache")}
    os.environ.update(places | {"OMP_NUM_THREADS": "1"})
    table = Table("fault", "under", "tries", title="seconds from a fault to the next step; parts are medians, one after the other")
    for part in ("seen", "agreed", "torch, join", "load", "1st step", "in all", "worst", "repeated"):
        table.add_column(part, justify="right")
    try:
        with Hosts(NAMES, place / "hosts") as hosts:
            ours, watches = _ours(place, hosts, options.tries) if options.under != "torchrun" else ({}, [])
            theirs = _theirs(place, hosts, options.tries) if options.under != "midwatch" else {}
    finally:
        shutil.rmtree(place, ignore_errors=True)
    for kind, title in (*KINDS.items(), ("node back", "a node is back: in the run again"), ("store", "what coordinates is killed")):
        if kind in ours:
            table.add_row(title, "Midwatch", *_row(ours[kind]))
        if kind in theirs:
            table.add_row(title if kind not in ours else "", "torchrun", *_row(theirs[kind]))
    console = Console(width=132)
    console.print(table)
    for watch in watches:
        console.print(
            f"controller killed, a new one after {watch.gone:.1f} s: {watch.taken} steps meanwhile, {watch.repeated} repeated, "
            f"longest gap between two steps {watch.pause * 1e3:+.0f} ms over the median"
        )
    console.print(_arithmetic({name: costs for name, costs in (("Midwatch", ours), ("torchrun", theirs)) if costs}))
    console.print("load of the machine, over 1 and 5 minutes: {:.1f}, {:.1f}".format(*os.getloadavg()[:2]))


def _ours(place: Path, hosts: Hosts, tries: int) -> tuple[dict[str, list[Cost | None]], list[Watch]]:
    found: dict[str, list[Cost | None]] = {}
    run = Watched(place, dict(os.environ), hosts, "2", NAMES)
    try:
        for kind in KINDS:
            found[kind] = _tries(tries, kind, functools.partial(run.strike, kind))
        watches = [w for w in _tries(tries, "controller killed", run.lose_controller) if w is not None]
    finally:
        run.close()
    run = Watched(place, dict(os.environ), hosts, "1:2", NAMES[:2])
    try:
        found["node back"] = _tries(tries, "node back", run.come_back)
    finally:
        run.close()
    return found, watches


def _theirs(place: Path, hosts: Hosts, tries: int) -> dict[str, list[Cost | None]]:
    """Begun anew for each try: torchrun does not take back a host that it has lost."""
    found: dict[str, list[Cost | None]] = {}

    def once(kind: str) -> Cost | None:
        stock = Stock(place, dict(os.environ), hosts)
        try:
            return stock.come_back() if kind == "node back" else stock.strike(kind)
        finally:
            stock.close()

    for kind in (*KINDS, "store", "node back"):
        found[kind] = _tries(tries, f"torchrun, {kind}", functools.partial(once, kind))
    return found


def _tries(count: int, what: str, act: Callable[[], T | None]) -> list[T | None]:
    """Up to the first that fails."""
    found: list[T | None] = []
    for _ in range(count):
        try:
            found.append(act())
        except Exception:
            traceback.print_exc()
            found.append(None)
        print(what, found[-1], file=sys.stderr, flush=True)
        if found[-1] is None:
            break
    return found


def _row(costs: Sequence[Cost | None]) -> list[str]:
    there = [c for c in costs if c is not None]
    count = f"{len(there)} of {len(costs)}"
    if not there:
        return [count, *[""] * 5, "never", f"> {NEVER_SECONDS:.0f}", ""]

    def median(part: Callable[[Cost], float | None]) -> str:
        values = [v for v in map(part, there) if v is not None]
        return f"{statistics.median(values):.2f}" if values else ""

    worst = f"{max(c.total for c in there):.1f}" if len(there) == len(costs) else "never"
    repeated = f"{statistics.median(c.steps for c in there):.0f} steps, {statistics.median(c.repeated for c in there):.1f}"
    parts = [median(part) for part in (_seen, _agreed, _up, _loaded, _stepped)]
    return [count, *parts, f"{statistics.median(c.total for c in there):.1f}", worst, repeated]


def _seen(c: Cost) -> float | None:
    return c.seen


def _agreed(c: Cost) -> float | None:
    return c.agreed


def _up(c: Cost) -> float:
    return c.up


def _loaded(c: Cost) -> float:
    return c.loaded


def _stepped(c: Cost) -> float:
    return c.stepped


def _arithmetic(found: dict[str, dict[str, list[Cost | None]]]) -> Table:
    title = "arithmetic, not measured: Llama 3's 419 interruptions in 54 days with these seconds"
    table = Table("cause", "times", *(f"{name}: time lost" for name in found), title=title)
    totals: dict[str, float] = dict.fromkeys(found, 0.0)
    for kind, times in LLAMA.items():
        words = []
        for name, costs in found.items():
            there = [c.total for c in costs[kind] if c is not None]
            lost = times * statistics.median(there) / LLAMA_SECONDS if len(there) == len(costs[kind]) else math.nan
            totals[name] += lost
            words.append("until somebody comes" if math.isnan(lost) else f"{lost:.4%}")
        table.add_row(KINDS[kind], str(times), *words)
    effective = ("" if math.isnan(t) else f"{1 - t:.3%}" for t in totals.values())
    table.add_row("effective training time", "419", *effective)
    more = f"{419 / LLAMA_SECONDS:.4%}"
    table.add_row("each second more, as of loading or repeating", "419", *[more] * len(found))
    return table


if __name__ == "__main__":
    main()
