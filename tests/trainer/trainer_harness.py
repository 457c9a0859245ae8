"""Real ranks for the tests: processes of their own, joined by gloo, with a controller's end that does as a script says.

Ranks are forked from a server that has imported torch already, which saves three seconds each; what runs in them is the
trainer's own start, loop and end. Some tests use torchrun itself instead.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.process
import os
import queue
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from midwatch.protocol import (
    CheckpointFailed,
    CheckpointReady,
    CommitRefused,
    Committed,
    Lineage,
    Metrics,
    Op,
    Order,
    Outcome,
    Phase,
    RankBody,
    Start,
)
from midwatch.recipe import Recipe, load_recipe

MakeRun = Callable[..., Path]

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch._dynamo", "trainer.process.rank", "trainer_harness"])


@dataclass(frozen=True)
class Step:
    """One line of a script: an order, and when to give it.

    after: step that must have been reported (they are reported one step late). looks: how often rank 0 must have looked for
    orders since the line before was answered. phase: what must have been told last. again: send it
    twice. wait: the next line may be given only when this one is answered. moves: a file to rename before it.
    """

    op: Op
    arguments: dict[str, Any] = field(default_factory=dict)
    after: int = 0
    looks: int = 0
    phase: str = ""
    again: bool = False
    number: int | None = None
    wait: bool = True
    moves: tuple[Path, Path] | None = None


class ScriptedLink:
    """The controller's end of the link, in process: gives orders by a script, commits checkpoints, writes down what it is told."""

    def __init__(self, root: Path, script: list[Step], refuse: str = "", lag: int = 0) -> None:
        """refuse: a checkpoint that is not committed the first time. lag: looks for answers before one is given."""
        self._root, self._script, self._refuse, self._lag = root, list(script), refuse, lag
        self._step, self._looks, self._given = 0, 0, 0
        self._phase: str = ""
        self._open: int | None = None
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._answers: list[Committed | CommitRefused] = []
        self._asked = 0
        self._log = (root / "told.jsonl").open("a")

    def send(self, body: RankBody) -> None:
        self._log.write(msgspec.json.encode(body).decode() + "\n")
        self._log.flush()
        if isinstance(body, Metrics):
            self._step = max(self._step, body.step) if "train/loss" in body.values else self._step
        if isinstance(body, Phase):
            self._phase = body.phase
        if isinstance(body, Outcome) and body.number == self._open:
            self._answered()
            self._step = body.step
        if isinstance(body, CheckpointFailed) and self._open in body.numbers:
            self._answered()
        if isinstance(body, CheckpointReady) and body.id == self._refuse:
            self._refuse = ""
            self._answers.append(CommitRefused(id=body.id, reason="the test says so"))
        elif isinstance(body, CheckpointReady):
            if not (self._root / "checkpoints" / body.id).exists():
                os.rename(self._root / "checkpoints" / body.directory, self._root / "checkpoints" / body.id)
            self._answers.append(Committed(id=body.id))
            if self._open in body.numbers:
                self._answered()

    def _answered(self) -> None:
        self._open, self._looks = None, 0

    def next_order(self) -> Order | None:
        self._looks += 1
        if self._script:
            line = self._script[0]
            ready = self._step >= line.after and self._looks > line.looks and line.phase in ("", self._phase)
            if ready and self._open is None:
                self._script.pop(0)
                self._given = line.number or self._given + 1
                self._open = self._given if line.wait else None
                if line.moves:
                    os.rename(*line.moves)
                order = Order(number=self._given, op=line.op, arguments=line.arguments)
                self._orders.put(order)
                if line.again:
                    self._orders.put(order)
        with contextlib.suppress(queue.Empty):
            return self._orders.get_nowait()
        return None

    def next_answer(self) -> Committed | CommitRefused | None:
        if not self._answers:
            return None
        self._asked += 1
        if self._asked <= self._lag:
            return None
        self._asked = 0
        return self._answers.pop(0)

    def flush(self, timeout: float) -> bool:
        return True

    def close(self) -> None:
        self._log.close()


def free_port() -> int:
    """Not one of those that the system gives to outgoing connections, of which another may take it in the meantime."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@dataclass
class Ranks:
    """Running ranks."""

    processes: list[multiprocessing.process.BaseProcess]

    def kill(self) -> None:
        """SIGKILL to all at once."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                if process.pid is not None:
                    os.kill(process.pid, signal.SIGKILL)
        self.wait()

    def alive(self) -> bool:
        return any(process.is_alive() for process in self.processes)

    def wait(self, timeout: float = 60.0) -> list[int | None]:
        """Exit statuses; the processes are killed, and TimeoutError raised, where they do not end."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        if any(process.is_alive() for process in self.processes):
            for process in self.processes:
                process.kill()
            raise TimeoutError("ranks do not end")
        return [process.exitcode for process in self.processes]


def start_ranks(root: Path, size: int, target: Callable[..., None], *arguments: Any, limit: int | None = None) -> Ranks:
    """Starts ranks that call `target(root, *arguments)`; `limit` is the largest file, in bytes, that they may write."""
    port = free_port()
    processes: list[multiprocessing.process.BaseProcess] = [
        _CONTEXT.Process(target=_rank, args=(root, rank, size, port, limit, target, arguments), daemon=True) for rank in range(size)
    ]
    for process in processes:
        process.start()
    return Ranks(processes)


def _rank(
    root: Path, rank: int, size: int, port: int, limit: int | None, target: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    log = os.open(root / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    target(root, *arguments)


def plain(root: Path) -> None:
    """As torchrun would start it: no controller, from the newest checkpoint."""
    from trainer.process.rank import main

    sys.exit(main([str(root)]))


def steered(root: Path, script: list[Step], start: Start, refuse: str = "", lag: int = 0) -> None:
    """With a controller that follows a script."""
    from trainer.control.rank_log import Logged, begin
    from trainer.control.reporting import ControllerLink, NoLink
    from trainer.distributed.mesh import join, open_store, settle
    from trainer.process.rank import run_rank

    begin()
    recipe = load_recipe(root / "recipe.toml")
    settle(recipe.cluster)
    world = join(open_store(), "test", recipe.cluster, recipe.parallel)
    link: ControllerLink = Logged(ScriptedLink(root, script, refuse, lag)) if world.is_rank_zero else NoLink()
    assert recipe.data.dir is not None
    run_rank(recipe, root, Path(recipe.data.dir), world, link, start)


def fresh(lineage: int = 1, **more: Any) -> Start:
    return Start(generation=more.pop("generation", 1), term=1, lineage=Lineage(id=lineage), **more)


def steer(
    root: Path,
    *script: Step,
    size: int = 2,
    start: Start | None = None,
    refuse: str = "",
    lag: int = 0,
    limit: int | None = None,
) -> Told:
    """Runs to the end under a script; what rank 0 told. Fails with the ranks' logs if one of them failed."""
    before = len(Told.read(root).bodies)
    ranks = start_ranks(root, size, steered, list(script), start or fresh(), refuse, lag, limit=limit)
    statuses = ranks.wait()
    assert statuses == [0] * size, f"{statuses}\n{logs(root)}"
    return Told(Told.read(root).bodies[before:])


def train_plain(root: Path, size: int = 2) -> None:
    statuses = start_ranks(root, size, plain).wait()
    assert statuses == [0] * size, f"{statuses}\n{logs(root)}"


def torchrun(root: Path, *arguments: str) -> subprocess.Popen[str]:
    """The trainer as anybody would start it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", *arguments, "-m", "trainer", str(root)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def logs(root: Path) -> str:
    return "\n".join(f"--- {file.name}\n{file.read_text()[-3000:]}" for file in sorted(root.glob("rank-*.log")))


@dataclass(frozen=True)
class Told:
    """What rank 0 told, as plain values, in order."""

    bodies: list[dict[str, Any]]

    @classmethod
    def read(cls, root: Path) -> Told:
        file = root / "told.jsonl"
        return cls([json.loads(line) for line in file.read_text().splitlines()] if file.exists() else [])

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [body for body in self.bodies if body["type"] == kind]

    def outcome(self, number: int) -> dict[str, Any]:
        """The one outcome of a command."""
        found = [body for body in self.all("Outcome") if body["number"] == number]
        assert len({json.dumps(body, sort_keys=True) for body in found}) == 1, found
        return found[0]

    def losses(self) -> dict[tuple[int, int], float]:
        """By lineage and step."""
        return losses(self.bodies)


def losses(bodies: list[dict[str, Any]]) -> dict[tuple[int, int], float]:
    found = {}
    for body in bodies:
        if body["type"] == "Metrics" and "train/loss" in body["values"]:
            found[body["lineage"], body["step"]] = body["values"]["train/loss"]
    return found


def logged(root: Path) -> list[dict[str, Any]]:
    """Metrics of a run without a controller."""
    return [json.loads(line) for line in (root / "logs" / "metrics.jsonl").read_text().splitlines()]


def tensors(directory: Path) -> dict[str, np.ndarray[Any, Any]]:
    """A checkpoint's tensors, read by what its format's description says and by nothing of the trainer's."""
    manifest = msgspec.msgpack.decode((directory / "manifest.msgpack").read_bytes())
    found = {}
    for name, entry in manifest["tensors"].items():
        whole = np.full(entry["shape"], np.nan, np.dtype(entry["dtype"]).newbyteorder("<"))
        for chunk in entry["chunks"]:
            raw = (directory / chunk["file"]).read_bytes()[chunk["start"] : chunk["start"] + chunk["bytes"]]
            box = tuple(slice(o, o + s) for o, s in zip(chunk["offsets"], chunk["sizes"], strict=True))
            whole[box] = np.frombuffer(raw, whole.dtype).reshape(chunk["sizes"])
        found[name] = whole
    return found


def same_bits(one: Path, other: Path) -> bool:
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(first[name].tobytes() == second[name].tobytes() for name in first)


def state(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.msgpack.decode((directory / "manifest.msgpack").read_bytes())["state"]
    return found


def write_recipe(root: Path, recipe: Recipe) -> Path:
    from midwatch.recipe import dump_recipe

    root.mkdir(parents=True, exist_ok=True)
    (root / "recipe.toml").write_text(dump_recipe(recipe))
    return root


def build_small(recipe: Recipe, data: Path) -> Recipe:
    """Two stages, each on a source of its own, in shards so small that no step reads them all."""
    import msgspec.structs

    from shards.build.build import build
    from shards.spec import Build

    changed = msgspec.structs.replace(recipe.data, dir=str(data), source=recipe.data.source[:2], frame_tokens=512, shard_tokens=512)
    stages = [
        msgspec.structs.replace(stage, mixture={source.name: 1.0}, eval_every=100, prompts=())
        for stage, source in zip(recipe.stage, changed.source, strict=False)
    ]
    build(Build(data=changed, tokenizer=recipe.tokenizer, out=str(data), seed=0), workers=0)
    return msgspec.structs.replace(recipe, data=changed, stage=tuple(stages))
