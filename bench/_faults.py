"""A run over three hosts for `bench.faults`, under Midwatch and under stock torchrun, and what a fault costs it, in parts."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import psutil

from midwatch import protocol as p
from midwatch.journal import entries as j
from tests.system.chaos.faults import Fault, Theatre
from tests.system.harness import Run, recipe_text
from tests.system.hosts import Hosts

NEVER_SECONDS = 120.0
NAMES = ("n1", "n2", "n3")
USED = NAMES[:2]
"""Under torchrun."""
STAMP = "%Y-%m-%d %H:%M:%S,%f"
_UP = re.compile(r"^(\S+ \S+) INFO +generation (\d+): rank \d+ of (\d+)", re.MULTILINE)
_LOADED = re.compile(r"^(\S+ \S+) INFO +from (?:checkpoint|the beginning)", re.MULTILINE)


class Cost(NamedTuple):
    """Seconds, one part after the other; `seen` and `agreed` are None where nothing tells them apart from `up`."""

    seen: float | None
    """From the fault until the generation was over."""
    agreed: float | None
    """Until the next one began."""
    up: float
    """Until all ranks have imported torch and joined."""
    loaded: float
    """Until the checkpoint is loaded."""
    stepped: float
    """Until the first step is done."""
    steps: int
    """Taken again."""
    repeated: float
    """What these took."""

    @property
    def total(self) -> float:
        """From the fault to the first step."""
        return (self.seen or 0.0) + (self.agreed or 0.0) + self.up + self.loaded + self.stepped


class Watch(NamedTuple):
    """What a controller's death cost."""

    gone: float
    taken: int
    """Steps while it was gone."""
    repeated: int
    pause: float
    """Longest time between two steps, over the median before."""


def ranks_again(logs: Iterable[Path], since: float) -> tuple[float, float]:
    """When the ranks of the newest generation had all joined, and had loaded, by their logs; NaN where they have not."""
    ups: dict[int, list[float]] = {}
    loads: list[float] = []
    for file in logs:
        text = file.read_text(errors="replace")
        for stamp, generation, _ in _UP.findall(text):
            if _seconds(stamp) > since:
                ups.setdefault(int(generation), []).append(_seconds(stamp))
        loads += [_seconds(stamp) for stamp in _LOADED.findall(text) if _seconds(stamp) > since]
    up = max(ups[max(ups)]) if ups else float("nan")
    return up, max(loads, default=float("nan"))


def _seconds(stamp: str) -> float:
    return datetime.datetime.strptime(stamp, STAMP).timestamp()


class Watched:
    """The run under Midwatch."""

    def __init__(self, place: Path, environment: dict[str, str], hosts: Hosts, nodes: str, names: tuple[str, ...]) -> None:
        self._hosts = hosts
        self._run = Run(place / f"midwatch-{nodes.replace(':', '-')}", environment)
        self._theatre = Theatre(self._run, hosts)
        options = ", ".join(f'"{o}"' for o in hosts.options)
        cluster = f'backend = "ssh"\nhosts = {json.dumps(names)}\nnodes = "{nodes}"\nranks_per_node = 1\n'
        cluster += f"quarantine_after = 1_000_000\nssh_options = [{options}]"
        text = recipe_text(place / "shards", steps=1_000_000, every=20, restarts=20)
        file = place / f"{self._run.root.name}.toml"
        file.write_text(text.replace("ranks_per_node = 2", cluster))
        done = self._run.midwatch("run", str(file), "--dir", str(self._run.root), "--detach", "--no-check", timeout=120)
        assert done.returncode == 0, done.stderr

    def close(self) -> None:
        self._run.clear()

    def strike(self, kind: str) -> Cost:
        """A fault on the host of rank 1; returns when the ranks step again, there is a spare again and all is mended."""
        before = self._settled(lambda s: _used(s, 2) and any(n.state == "spare" for n in s.nodes))
        fault = Fault(kind, _hosts_used(before)[1], 0.0)
        struck = time.time()
        self._theatre.inflict(fault)
        cost = self._cost(struck, before.generation)
        self._theatre.undo(fault)
        return cost

    def come_back(self) -> Cost:
        """The host of rank 1 loses power and comes back: what is measured begins when it does."""
        before = self._settled(lambda s: _used(s, 2))
        host = _hosts_used(before)[1]
        self._hosts.kill(host)
        alone = self._settled(lambda s: _used(s, 1))
        self._hosts.restart(host)
        return self._cost(time.time(), alone.generation)

    def lose_controller(self) -> Watch:
        """It dies and is missed three seconds later."""
        before = self._settled(lambda s: _used(s, 2))
        struck = time.time()
        self._run.kill(self._run.controller())
        time.sleep(3.0)
        after = self._run.wait(lambda s: s.term > before.term and _used(s, 2), NEVER_SECONDS)
        self._run.wait_step(after.step + 10, NEVER_SECONDS)
        began = next(e.time for _, e in self._run.entries() if isinstance(e, j.TermBegan) and e.term == after.term)
        rows = [row for row in self._run.rows("train/loss") if row.time > struck - 5.0]
        assert after.generation == before.generation, "the ranks were restarted"
        gaps = [b.time - a.time for a, b in itertools.pairwise(rows) if a.time < began + 2.0]
        undone = sum(e.undone for _, e in self._run.entries() if isinstance(e, j.LineageOpened) and e.time > struck)
        taken = sum(struck < row.time < began for row in rows)
        return Watch(began - struck, taken, undone, max(gaps) - statistics.median(gaps))

    def _settled(self, wanted: Callable[[p.Snapshot], bool]) -> p.Snapshot:
        there = self._run.wait(wanted, NEVER_SECONDS)
        self._run.wait_step(there.step + 10, NEVER_SECONDS)
        return self._run.snapshot()

    def _cost(self, struck: float, generation: int) -> Cost:
        again = self._run.wait(lambda s: s.generation > generation and s.state == "training" and s.step > 0, NEVER_SECONDS)
        self._run.wait_step(again.step + 5, NEVER_SECONDS)
        entries = [e for _, e in self._run.entries() if e.time >= struck]
        seen = next(e.time for e in entries if isinstance(e, j.GenerationEnded))
        agreed = max(e.time for e in entries if isinstance(e, j.GenerationBegan))
        up, loaded = ranks_again((self._run.root / "logs").glob("*/[0-9]*.log"), agreed)
        rows = self._run.rows("train/loss")
        stepped = min(row.time for row in rows if row.time > loaded)
        steps = sum(e.undone for e in entries if isinstance(e, j.LineageOpened))
        pace = statistics.median(row.value for row in self._run.rows("perf/step_seconds")[-50:])
        return Cost(seen - struck, agreed - seen, up - agreed, loaded - up, stepped - loaded, steps, steps * pace)


def _hosts_used(s: p.Snapshot) -> list[str]:
    return [n.name for n in sorted(s.nodes, key=lambda n: n.first_rank) if n.state == "up" and n.ranks]


def _used(s: p.Snapshot, count: int) -> bool:
    return s.state == "training" and s.step > 0 and s.world == len(_hosts_used(s)) == count


class Stock:
    """The same recipe under torchrun, with what makes it quickest; the store of its rendezvous is on the first host."""

    CONF = "join_timeout=600,last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=3"

    def __init__(self, place: Path, environment: dict[str, str], hosts: Hosts) -> None:
        self._hosts, self._environment = hosts, environment
        self.root = place / f"torchrun-{time.monotonic_ns()}"
        self.root.mkdir()
        text = recipe_text(place / "shards", steps=1_000_000, every=20).replace("ranks_per_node = 2", "ranks_per_node = 1")
        (self.root / "recipe.toml").write_text(text)
        self._started: list[subprocess.Popen[bytes]] = []
        for name in USED:
            self._start(name)
        if self._await(time.time(), len(USED)) is None:
            self.close()
            raise RuntimeError(f"torchrun does not start: {(self.root / f'{NAMES[0]}.log').read_text()[-2000:]}")

    def _start(self, name: str) -> None:
        words = ["torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=bench"]
        words += [f"--rdzv-endpoint={self._hosts.address(NAMES[0])}:29400", f"--rdzv-conf={self.CONF}", "--max-restarts=1000"]
        words += ["--monitor-interval=0.1", f"--local-addr={self._hosts.address(name)}", "-m", "bench._stock", str(self.root)]
        environment = self._environment | {
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
            "GLOO_SOCKET_IFNAME": "eth0",
            "TP_SOCKET_IFNAME": "eth0",
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(Path(__file__).parents[1]),
        }
        with (self.root / f"{name}.log").open("ab") as log:
            inside = self._hosts.inside(name, sys.executable, "-m", *words)
            self._started.append(subprocess.Popen(inside, stdout=log, stderr=log, env=environment))

    def close(self) -> None:
        for name in USED:
            self._signal(name, str(self.root))
        for process in self._started:
            process.kill()
            process.wait()

    def strike(self, kind: str) -> Cost | None:
        """A fault on the host that has a rank and not the store, unless it is that one; None where no rank steps again."""
        self._steps(10)
        host = USED[1]
        struck = time.time()
        if kind == "rank killed":
            self._signal(host, "bench._stock", but="torch.distributed.run")
        elif kind == "power lost":
            self._hosts.kill(host)
        elif kind == "link cut":
            self._hosts.cut(host)
        else:  # what coordinates
            self._signal(USED[0], "torch.distributed.run")
        cost = self._await(struck, 2 if kind == "rank killed" else 1)
        if kind == "link cut":
            self._hosts.mend(host)
        if kind == "power lost":
            self._hosts.restart(host)
        return cost

    def come_back(self) -> Cost | None:
        self._steps(10)
        host = USED[1]
        killed = time.time()
        self._hosts.kill(host)
        alone = self._await(killed, 1)
        self._hosts.restart(host)
        if alone is None:
            return None
        self._steps(10)
        back = time.time()
        self._start(host)
        return self._await(back, 2)

    def _await(self, since: float, world: int) -> Cost | None:
        """Waits for ranks that began after that moment to step; as many as the world is to be."""
        deadline = time.monotonic() + NEVER_SECONDS
        while time.monotonic() < deadline:
            time.sleep(0.2)
            logs = [f for f in self.root.glob("n*.log") if any(int(w) == world for w in _worlds(f, since))]
            up, loaded = ranks_again(logs, since)
            rows = self._rows()
            after = [row for row in rows if row[0] > loaded >= up]
            if len(after) >= 3:
                before = [row for row in rows if row[0] < since]
                steps = max(0, before[-1][1] - after[0][1] + 1) if before else 0
                pace = statistics.median(row[2] for row in after)
                return Cost(None, None, up - since, loaded - up, after[0][0] - loaded, steps, steps * pace)
        return None

    def _rows(self) -> list[tuple[float, int, float]]:
        """Time, step and its seconds, in the order in which they were written."""
        found = []
        with contextlib.suppress(FileNotFoundError):
            for line in (self.root / "logs" / "metrics.jsonl").read_text().splitlines():
                with contextlib.suppress(ValueError, KeyError):
                    row = json.loads(line)
                    found.append((float(row["time"]), int(row["step"]), float(row["values"]["perf/step_seconds"])))
        return found

    def _steps(self, count: int) -> None:
        began = len(self._rows())
        deadline = time.monotonic() + NEVER_SECONDS
        while len(self._rows()) < began + count and time.monotonic() < deadline:
            time.sleep(0.1)

    def _words(self, name: str, word: str) -> dict[int, list[str]]:
        found = {}
        for pid in self._hosts.pids(name):
            with contextlib.suppress(psutil.Error):
                words = psutil.Process(pid).cmdline()
                if word in words and str(self.root) in words:
                    found[pid] = words
        return found

    def _signal(self, name: str, word: str, but: str = "") -> None:
        for pid, words in self._words(name, word).items():
            if not but or but not in words:
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


def _worlds(file: Path, since: float) -> list[str]:
    return [world for stamp, _, world in _UP.findall(file.read_text(errors="replace")) if _seconds(stamp) > since]
