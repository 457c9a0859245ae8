"""Checkpoints of 400 MB and more on two ranks: what an asynchronous save costs, and a rollback in place beside a restart.

Excess of an asynchronous save: the wall time of the steps from the save until its commit, less that of as many steps without
one; over the wall time of a synchronous save of the same state. Rollback: verifying every byte from the disk (as the controller
does first), loading, one step; the restart it is held against is two fresh processes that load the same checkpoint and take one
step.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import queue
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from bench._ranks import leave_after
from midwatch.protocol import CheckpointReady, CommitRefused, Committed, Lineage, Order, RankBody, Start
from midwatch.recipe import dump_recipe, parse_recipe
from shards.build.build import build
from shards.spec import Build

ROUNDS = 5
SAVES = 20
"""Of each kind, one after the other: a step takes a tenth of a second more or less by itself, as much as is to be measured."""
RECIPE = """
[run]
name = "checkpoints"
[model]
num_layers = 8
hidden_size = 640
num_heads = 10
intermediate_size = 1728
[tokenizer]
vocab = 1024
sample_bytes = 200000
[data]
[[data.source]]
name = "topics"
kind = "text"
origin = "stdlib-topics"
max_tokens = 100000
[[stage]]
name = "pretrain"
objective = "pretrain"
steps = 100000
context = 32
global_batch = 2
micro_batch = 1
warmup_steps = 10
mixture = {topics = 1}
"""


class Committer:
    """A link that commits at once and remembers when."""

    def __init__(self, checkpoints: Path) -> None:
        self._checkpoints = checkpoints
        self._answers: queue.SimpleQueue[Committed | CommitRefused] = queue.SimpleQueue()
        self.ready: CheckpointReady | None = None
        self.committed: set[str] = set()

    def send(self, body: RankBody) -> None:
        if isinstance(body, CheckpointReady):
            self.ready = body
            os.rename(self._checkpoints / body.directory, self._checkpoints / body.id)
            self.committed.add(body.id)
            self._answers.put(Committed(id=body.id))

    def next_order(self) -> Order | None:
        return None

    def next_answer(self) -> Committed | CommitRefused | None:
        with contextlib.suppress(queue.Empty):
            return self._answers.get_nowait()
        return None

    def flush(self, timeout: float) -> bool:
        return True

    def close(self) -> None:
        pass


def rank(root: Path, task: str) -> None:
    """One rank: `measure` fills results.json, `restart` takes one step from the checkpoint that measuring left."""
    from midwatch.recipe import load_recipe
    from trainer.control.reporting import NoLink
    from trainer.distributed.mesh import join, open_store, reduce, settle
    from trainer.loop.loop import step
    from trainer.stage.training import Training

    recipe = load_recipe(root / "recipe.toml")
    settle(recipe.cluster)
    world = join(open_store(), "bench", recipe.cluster, recipe.parallel)
    committer = Committer(root / "checkpoints")
    link = committer if world.is_rank_zero else NoLink()
    kept = "8-1" if task == "restart" else None
    start = Start(generation=1, term=1, lineage=Lineage(id=1), checkpoint=kept)
    training = Training(recipe, root, root / "data", world, link, start)
    training.open(start)

    def steps(count: int) -> None:
        for _ in range(count):
            step(training)
            training.reporter.flush()
            training.boundary.next()

    def timed(action: Callable[[], object]) -> float:
        reduce([0], world.control)
        began = time.monotonic()
        action()
        reduce([0], world.control)
        return time.monotonic() - began

    def committed(id: str) -> bool:
        return bool(reduce([int(id in committer.committed)], world.control)[0])

    def synchronous() -> None:
        training.checkpointer._asynchronous = False
        training.save_and_wait()
        training.checkpointer._asynchronous = True

    def asynchronous() -> int:
        id, _ = training.save()
        taken = 0
        while not committed(id):
            steps(1)
            taken += 1
        return taken

    gc.collect()
    gc.freeze()
    if task == "restart":
        steps(1)
        (root / f"stepped-{world.rank}").write_text(str(time.time()))
        training.close()
        return
    steps(2)
    asynchronous()  # makes the buffers
    results: dict[str, Any] = {"plain": [], "async": [], "sync": [], "stall": [], "steps": [], "load": [], "first step": []}
    while training.progress.step < 8:
        steps(1)
    synchronous()
    steps(1)
    for _ in range(SAVES):
        taken: list[int] = []
        results["async"].append(timed(lambda taken=taken: taken.append(asynchronous())))  # type: ignore[misc]  # mypy cannot type a lambda's default
        results["stall"].append(committer.ready.stall_seconds if committer.ready else 0.0)
        results["steps"].append(taken[0])
        results["plain"].append(timed(lambda taken=taken: steps(taken[0])))  # type: ignore[misc]  # mypy cannot type a lambda's default
        steps(1)
        results["sync"].append(timed(synchronous))
        results["bytes"] = committer.ready.bytes if committer.ready else 0
        for directory in (root / "checkpoints").glob("*-1") if world.is_rank_zero else ():
            if directory.name != "8-1":
                shutil.rmtree(directory)
        steps(1)
    for number in range(ROUNDS):
        results["load"].append(timed(lambda lineage=number + 2: training.resume_from("8-1", lineage, 0, 1.0)))  # type: ignore[misc]  # mypy cannot type a lambda's default
        results["first step"].append(timed(lambda: steps(1)))
    if world.is_rank_zero:
        (root / "results.json").write_text(json.dumps(results))
    training.close()


def run_ranks(root: Path, task: str, world: int = 2) -> float:
    """Starts ranks as an agent would and waits; the seconds until all had taken their last step."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.time()
    processes = []
    for number in range(world):
        environment = os.environ | {
            "RANK": str(number),
            "WORLD_SIZE": str(world),
            "LOCAL_RANK": str(number),
            "OMP_NUM_THREADS": "1",
        }
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, "-m", "bench.checkpoints", "rank", str(root), task]
        processes.append(subprocess.Popen(command, env=environment))
    if any(process.wait() for process in processes):
        raise SystemExit(f"bench: a rank failed ({task})")
    return max((float(file.read_text()) for file in root.glob("stepped-*")), default=began) - began


def forget(directory: Path) -> None:
    """Lets the page cache drop the files: writing leaves none of a checkpoint there, so that verifying one reads the disk."""
    for file in directory.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def _prepare(root: Path) -> None:
    recipe = parse_recipe(RECIPE)
    recipe = msgspec.structs.replace(recipe, data=msgspec.structs.replace(recipe.data, dir=str(root / "data")))
    (root / "recipe.toml").write_text(dump_recipe(recipe))
    build(Build(data=recipe.data, tokenizer=recipe.tokenizer, out=str(root / "data"), seed=0))


def measure_alone(root: Path) -> dict[str, Any]:
    """Saves by one rank, which leaves a core to the thread that writes."""
    _prepare(root)
    run_ranks(root, "measure", world=1)
    found: dict[str, Any] = json.loads((root / "results.json").read_text())
    return found


def measure(root: Path) -> dict[str, Any]:
    """All figures, in seconds."""
    from midwatch.checkpoint_format.manifest import verify

    _prepare(root)
    run_ranks(root, "measure")
    found: dict[str, Any] = json.loads((root / "results.json").read_text())
    found["restart"] = [run_ranks(root, "restart") for _ in range(3)]
    found["verify"] = []
    for _ in range(ROUNDS):
        forget(root / "checkpoints" / "8-1")
        began = time.monotonic()
        if problems := verify(root / "checkpoints" / "8-1"):
            raise SystemExit("; ".join(problems))
        found["verify"].append(time.monotonic() - began)
    return found


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory(prefix="midwatch-bench-") as place:
        found = measure(Path(place))
    with tempfile.TemporaryDirectory(prefix="midwatch-bench-") as place:
        alone = measure_alone(Path(place))
    middle = {name: statistics.median(values) for name, values in found.items() if isinstance(values, list)}
    rollback = middle["verify"] + middle["load"] + middle["first step"]
    table = Table("what", "seconds", "ratio", "to reach", title=f"Checkpoints: {found['bytes'] / 1e6:.0f} MB of state on 2 ranks")
    _saves(table, found, "0.25")
    table.add_row("restart of the ranks: processes, load, first step", f"{middle['restart']:.2f}", "1", "")
    for part in ("verify", "load", "first step"):
        table.add_row(f"rollback in place: {part}", f"{middle[part]:.2f}", f"{middle[part] / middle['restart']:.2f}", "")
    table.add_row("rollback in place: all of it", f"{rollback:.2f}", f"{rollback / middle['restart']:.2f}", "0.4")
    table.add_section()
    table.add_row("the same state on one rank, which leaves a core idle", "", "", "")
    _saves(table, alone, "")
    Console().print(table)


def _saves(table: Table, found: dict[str, Any], to_reach: str) -> None:
    sync, stall = statistics.median(found["sync"]), statistics.median(found["stall"])
    low, excess, high = statistics.quantiles((a - p for a, p in zip(found["async"], found["plain"], strict=True)), n=4)
    steps = statistics.median(found["steps"])
    table.add_row("synchronous save, to the commit", f"{sync:.2f}", "1", "")
    table.add_row("asynchronous save: training stood still", f"{stall:.3f}", f"{stall / sync:.2f}", "")
    what = f"asynchronous save: excess over {steps:.0f} plain steps, to the commit"
    table.add_row(what, f"{excess:.2f}", f"{excess / sync:.2f}", to_reach)
    table.add_row(f"the same, quartiles of {SAVES}", f"{low:.2f} to {high:.2f}", f"{low / sync:.2f} to {high / sync:.2f}", "")


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        leave_after(lambda: rank(Path(sys.argv[2]), sys.argv[3]))
    else:
        main()
