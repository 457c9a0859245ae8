"""What steering costs training: CPU time and wall time of the boundary and the link, over the step's.

Two ranks under torchrun train the demo's model on the demo's batches. Rank 0 is connected by a real link to a real WebSocket
server on a unix socket in this process, which acknowledges everything. Blocks of steps with boundary and link alternate with
blocks without either. CPU time is that of the main thread in the boundary and in what it hands to the link, and of all threads
of the link; gloo has threads of its own, so the CPU time of the whole process during boundaries is told beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, unix_serve

from bench._ranks import leave_after
from midwatch import protocol as p
from midwatch.recipe import Recipe, dump_recipe, load_recipe
from midwatch.run_directory import Address, read_address, write_address
from midwatch.transport.rank_client import RankLink
from shards.build.build import build
from shards.spec import Build

PAIRS = 10
STEPS = 15
"""In a block."""
WARM = 10
RECIPE = Path(__file__).parents[1] / "recipes" / "demo.toml"


class Acknowledger:
    """A controller's end that welcomes every rank, acknowledges and commits everything, and never asks for anything."""

    def __init__(self, root: Path, socket: Path) -> None:
        """Listens on `socket` and says so in the run directory's control/address."""
        self._checkpoints = root / "checkpoints"
        self._server = unix_serve(self._serve, str(socket), compression=None)
        self._thread = threading.Thread(target=self._server.serve_forever, name="acknowledger", daemon=True)
        self._thread.start()
        (root / "control").mkdir(parents=True, exist_ok=True)
        write_address(root / "control" / "address", Address(term=1, url=f"unix:{socket}", host="here", pid=os.getpid()))

    def _serve(self, connection: ServerConnection) -> None:
        p.decode(connection.recv())
        connection.send(p.encode(p.RankWelcome(term=1, acknowledged=0)))
        with contextlib.suppress(ConnectionClosed):
            for frame in connection:
                message = p.decode(frame)
                assert isinstance(message, p.Numbered)
                if isinstance(message.body, p.CheckpointReady):
                    os.rename(self._checkpoints / message.body.directory, self._checkpoints / message.body.id)
                    connection.send(p.encode(p.Committed(id=message.body.id)))
                connection.send(p.encode(p.Ack(number=message.number)))

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()


class Measured:
    """A link that counts the CPU time of what the main thread hands to it, and waits for data as they are reported."""

    def __init__(self, link: Any) -> None:
        self._link = link
        self.seconds = 0.0
        self.waits: list[float] = []
        self.next_order, self.next_answer = link.next_order, link.next_answer
        self.flush, self.close = link.flush, link.close

    def send(self, body: p.RankBody) -> None:
        began = time.thread_time()
        self._link.send(body)
        self.seconds += time.thread_time() - began
        if isinstance(body, p.Metrics) and "perf/data_wait_seconds" in body.values:
            self.waits.append(body.values["perf/data_wait_seconds"] / body.values["perf/step_seconds"])


def link_cpu() -> float:
    """CPU seconds of the link's threads so far."""
    names = ("link-", "recv_events", "keepalive")
    threads = [t for t in threading.enumerate() if t.ident is not None and any(name in t.name for name in names)]
    return sum(time.clock_gettime(time.pthread_getcpuclockid(t.ident)) for t in threads if t.ident is not None)


def rank(root: Path) -> None:
    """One rank: alternates blocks and leaves its figures."""
    import gc

    from trainer.control.rank_log import Logged
    from trainer.control.reporting import NoLink
    from trainer.distributed.mesh import join, open_store, reduce, settle
    from trainer.loop.loop import boundary, step
    from trainer.stage.training import Training

    recipe = load_recipe(root / "recipe.toml")
    settle(recipe.cluster)
    world = join(open_store(), "bench", recipe.cluster, recipe.parallel)
    hello = p.RankHello(version=p.VERSION, run="bench", generation=1, term=1, pid=os.getpid(), world=world.size)
    link = Measured(Logged(RankLink(root / "control" / "address", hello)) if world.is_rank_zero else NoLink())
    start = p.Start(generation=1, term=1, lineage=p.Lineage(id=1))
    training = Training(recipe, root, root / "data", world, link, start)
    training.open(start)
    gc.collect()
    gc.freeze()
    for _ in range(WARM):
        boundary(training)
        step(training)
    found: dict[str, list[float]] = {"with": [], "without": [], "boundary": [], "process": [], "send": [], "link": [], "cpu": []}

    def connected() -> None:
        training.reporter._link = link
        sent, linked, cpu = link.seconds, link_cpu(), time.process_time()
        main = whole = 0.0
        for _ in range(STEPS):
            began, before = time.thread_time(), time.process_time()
            boundary(training)
            main += time.thread_time() - began
            whole += time.process_time() - before
            step(training)
        for name, value in (
            ("boundary", main),
            ("process", whole),
            ("send", link.seconds - sent),
            ("link", link_cpu() - linked),
            ("cpu", time.process_time() - cpu),
        ):
            found[name].append(value)

    def alone() -> None:
        training.reporter._link = NoLink()
        for _ in range(STEPS):
            step(training)

    for pair in range(PAIRS):
        for name, block in (("with", connected), ("without", alone))[:: 1 if pair % 2 else -1]:
            training.reporter.flush()
            link.flush(10.0)
            reduce([0], world.control)
            began = time.monotonic()
            block()
            reduce([0], world.control)
            found[name].append(time.monotonic() - began)
    if world.is_rank_zero:
        found["waits"] = link.waits
    (root / f"figures-{world.rank}.json").write_text(json.dumps(found))
    training.close()
    link.close()


def small(recipe: Recipe, data: Path) -> Recipe:
    """The recipe's first stage alone, without end, evaluations or checkpoints."""
    stage = msgspec.structs.replace(recipe.stage[0], steps=1_000_000, eval_every=1_000_000, warmup_steps=100)
    return msgspec.structs.replace(
        recipe,
        stage=(stage,),
        data=msgspec.structs.replace(recipe.data, dir=str(data)),
        checkpoint=msgspec.structs.replace(recipe.checkpoint, every=1_000_000),
    )


def measure(root: Path) -> list[dict[str, list[float]]]:
    """Figures of each rank, a value a block, in seconds."""
    recipe = small(load_recipe(RECIPE), root / "data")
    (root / "recipe.toml").write_text(dump_recipe(recipe))
    build(Build(data=recipe.data, tokenizer=recipe.tokenizer, out=str(root / "data"), seed=recipe.run.seed))
    server = Acknowledger(root, root / "socket")
    assert read_address(root / "control" / "address") is not None
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "bench.boundary", "rank", str(root)]
    try:
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    finally:
        server.close()
    return [json.loads((root / f"figures-{number}.json").read_text()) for number in range(2)]


def main() -> None:
    """Prints the table."""
    with tempfile.TemporaryDirectory(prefix="mwb-") as place:
        ranks = measure(Path(place))

    def total(*names: str) -> float:
        return sum(sum(figures[name]) for figures in ranks for name in names)

    steps = 2 * PAIRS * STEPS
    cpu, both = total("cpu"), total("boundary", "send", "link")
    ratios = [a / b for a, b in zip(ranks[0]["with"], ranks[0]["without"], strict=True)]
    table = Table(
        "what",
        "a step and rank",
        "over the step's",
        "to reach",
        title=f"Boundary and link: the demo's model, 2 ranks, {PAIRS} pairs",
    )
    table.add_row("the step: CPU", f"{cpu / steps * 1e3:.1f} ms", "1", "")
    for title, name in (
        ("boundary, main thread", "boundary"),
        ("reports handed to the link, main thread", "send"),
        ("threads of the link", "link"),
    ):
        table.add_row(f"{title}: CPU", f"{total(name) / steps * 1e3:.3f} ms", f"{total(name) / cpu:.2%}", "")
    table.add_row("boundary and link: CPU", f"{both / steps * 1e3:.3f} ms", f"{both / cpu:.2%}", "≤ 0.5 %")
    table.add_row(
        "whole process during boundaries, gloo's and reading ahead included: CPU",
        f"{total('process') / steps * 1e3:.3f} ms",
        f"{total('process') / cpu:.2%}",
        "",
    )
    wall = statistics.median(ranks[0]["with"]) / STEPS
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    table.add_row("wall, with over without: median of the pairs", f"{wall * 1e3:.1f} ms", f"{statistics.median(ratios):.3f}", "")
    table.add_row("  least and most of the pairs", "", spread, "")
    table.add_row("waiting for data: median, over the step's wall", "", f"{statistics.median(ranks[0]['waits']):.2%}", "≤ 1 %")
    Console().print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["rank"]:
        leave_after(lambda: rank(Path(sys.argv[2])))
    else:
        main()
