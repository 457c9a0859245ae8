"""A controller's parts with only the processes left out: a backend that starts nothing, ranks and an agent that are played here.

Journal, ledger, metrics, checkpoints on disk, commands, generations: all real.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash

from launcher.backends.base import Started
from launcher.controller import __main__ as controller
from launcher.controller.core import recovery
from launcher.controller.core.context import ControllerContext
from launcher.metrics.store import MetricStore
from midwatch import protocol as p
from midwatch.checkpoint_format.manifest import FILE_NAME
from midwatch.directory_identity import DirectoryId
from midwatch.journal import entries as j
from midwatch.journal.journal import Journal
from midwatch.journal.run_identity import RunRecord
from midwatch.recipe import Recipe, Watch, dump_recipe, parse_recipe
from midwatch.run_directory import RunPaths

RECIPE = """
[run]
name = "desk"
restarts = 1
[model]
num_layers = 1
hidden_size = 8
num_heads = 2
[[data.source]]
name = "text"
kind = "text"
origin = "stdlib-topics"
[checkpoint]
keep = 3
[[stage]]
name = "first"
objective = "pretrain"
steps = 50
context = 8
global_batch = 1
mixture = { text = 1.0 }
[[stage]]
name = "second"
objective = "pretrain"
steps = 50
context = 8
global_batch = 1
mixture = { text = 1.0 }
"""
NODE = "node"
RUN = "desk"
"""The run's id, here the same as its name."""


def write_checkpoint(root: Path, directory: str, id: str, generation: int = 1, **state: object) -> str:
    """A small checkpoint as ranks leave it; its digest."""
    place = root / directory
    place.mkdir(parents=True)
    data = id.encode() * 100
    (place / "data.bin").write_bytes(data)
    manifest = {
        "format": 3,
        "id": id,
        "generation": generation,
        "files": {"data.bin": {"bytes": len(data), "xxh3": xxhash.xxh3_128_hexdigest(data)}},
        "tensors": {},
        "state": {"lineage": 1, "step": 0, "stage_name": "first", "stage_step": 0, "ended": False, **state},
    }
    content = msgspec.msgpack.encode(manifest)
    (place / FILE_NAME).write_bytes(content)
    return xxhash.xxh3_128_hexdigest(content)


class NoProcesses:
    """A backend whose agent is played by the desk."""

    nodes: tuple[str, ...] = (NODE,)
    patience = 60.0
    lacking = ""

    def __init__(self, *_: object) -> None:
        self.living = True
        self.started = 0
        self.came: Callable[[], None] = lambda: None

    async def start(self, node: str) -> Started:
        self.started += 1
        self.living = True
        asyncio.get_running_loop().call_soon(self.came)
        return Started(4242, "birth")

    def alive(self, agent: j.AgentStarted) -> bool | None:
        return self.living


class InstantData:
    """The building of the data: done when the test says so."""

    done: asyncio.Event

    def __init__(self, context: ControllerContext) -> None:
        self._context = context

    async def ensure(self) -> None:
        await self.done.wait()
        if self._context.ledger.data_seconds is None:
            self._context.record(j.DataBuilt(time=1.0, directory="d", seconds=1.0))


class Desk:
    """One controller at work, and the hands that play everybody else."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self.paths = RunPaths(root)
        self.paths.create()
        self.paths.recipe.write_text(dump_recipe(recipe))
        if not self.paths.record.exists():
            record = RunRecord(id=RUN, directory=DirectoryId.of(root), path=str(root))
            self.paths.record.write_bytes(msgspec.json.encode(record))
        self.now = 1000.0
        self.journal = Journal(self.paths.journal, self.now, "host", 1, None, recovery.floors(self.paths))
        self.metrics = MetricStore.open(self.paths.metrics, root / "index.sqlite", self.journal.term)
        self.context = ControllerContext(self.paths, recipe, self.journal, self.metrics, clock=self._clock)
        if not self.context.ledger.started:
            self.context.record(j.RunBegan(time=self.now, name=recipe.run.name, recipe=recipe.digest()))
        self.term = controller.Term(self.context)
        self.dispatch, self.generations = self.term.dispatch, self.term.generations
        self.reports = self.term.door._reports
        self.backend: NoProcesses = self.generations._pool._backend  # type: ignore[assignment]
        self.backend.came = self.agent_comes
        self._agent_send: Callable[[p.Message], None] = self._tell_agent
        self.agents_leave = True
        """Whether agents that are sent away leave at once."""
        self.agent: list[p.Message] = []
        """What the agent was told."""
        self.rank: list[p.Message] = []
        """What rank 0 was told."""
        self.acknowledged: list[p.Message] = []
        self._reported = 0
        self._commands = 0
        self._work: asyncio.Task[None] | None = None

    def _clock(self) -> float:
        self.now += 0.001
        return self.now

    @property
    def ledger(self) -> Any:
        return self.context.ledger

    @property
    def starts(self) -> list[p.Start]:
        return [m.start for m in self.agent if isinstance(m, p.Gather)]

    @property
    def orders(self) -> list[p.Order]:
        return [m for m in self.rank if isinstance(m, p.Order)]

    async def open(self) -> None:
        recovery.report_losses(self.context)
        if not await recovery.look_for(self.context):
            await recovery.adopt(self.context)
        self.generations.take_over()
        self._work = asyncio.create_task(self.dispatch.run())

    async def close(self) -> None:
        """As a kill would: nothing more is written."""
        assert self._work is not None
        for task in (self._work, self.generations._work, self.generations._parting):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
        self.metrics.close()
        self.journal.close()

    # The agent

    def agent_comes(self, generation: int | None = None, node: str = NODE) -> None:
        held = self.ledger.generation if self.ledger.generation_live else 0
        hello = p.AgentHello(
            version=p.VERSION,
            run=self.context.run,
            node=node,
            pid=4242,
            generation=held if generation is None else generation,
        )
        self.generations.agent_came(hello, self._agent_send)

    def _tell_agent(self, message: p.Message) -> None:
        """Takes what the agent is told; one that is sent away leaves."""
        self.agent.append(message)
        if isinstance(message, p.Leave):
            asyncio.get_running_loop().call_soon(self._agent_leaves)

    def _agent_leaves(self) -> None:
        if self.agents_leave:
            self.backend.living = False
            for node in list(self.context.live.nodes):
                self.generations.agent_went(node, self._agent_send)

    def ranks_die(self, reason: str = "killed") -> None:
        self.generations.ranks_ended(NODE, p.RanksEnded(generation=self.ledger.generation, ok=False, reason=reason))

    # Rank 0

    def rank_comes(self) -> None:
        self._reported = self.reports.acknowledged()
        self.dispatch.rank_came(self.rank.append)

    def says(self, body: p.RankBody) -> None:
        self._reported += 1
        self.reports.control(p.Numbered(number=self._reported, body=body), self._rank_hears)

    def _rank_hears(self, message: p.Message) -> None:
        (self.acknowledged if isinstance(message, p.Ack) else self.rank).append(message)

    def phase(self, phase: str, step: int = 0, stage: str = "first") -> None:
        self.says(
            p.Phase(
                phase=phase,  # type: ignore[arg-type]
                step=step,
                stage=stage,
                stage_step=step,
                lineage=self.ledger.lineage,
                settings={"lr": 3e-4},
            )
        )

    def row(self, step: int, lineage: int | None = None, **values: float) -> None:
        number = self.__dict__.setdefault("_rows", 0) + 1
        self.__dict__["_rows"] = number
        body = p.Metrics(
            lineage=self.ledger.lineage if lineage is None else lineage,
            step=step,
            tokens=step * 8,
            time=float(step),
            values={"train/loss": 1.0, "train/grad_norm": 1.0} | values,
        )
        source = f"{self.ledger.generation}/telemetry/{self.context.term}"
        self.reports.metrics(source, p.Numbered(number=number, body=body))

    def answers(self, order: p.Order, ok: bool = True, step: int = 0, reason: str = "", **detail: Any) -> None:
        self.says(p.Outcome(number=order.number, ok=ok, step=step, detail=detail, reason=reason))

    def saves(self, id: str, step: int, *, ended: bool = False, suspect: bool = False, numbers: tuple[int, ...] = ()) -> p.Message:
        state = {"lineage": self.ledger.lineage, "step": step, "stage_step": step, "ended": ended}
        digest = write_checkpoint(self.paths.checkpoints, f".writing-{id}", id, self.ledger.generation, **state)
        self.says(self.ready(id, step, digest, ended=ended, suspect=suspect, numbers=numbers))
        return self.rank[-1]

    def ready(self, id: str, step: int, digest: str, **changes: Any) -> p.CheckpointReady:
        return p.CheckpointReady(
            **{  # type: ignore[arg-type]
                "id": id,
                "directory": f".writing-{id}",
                "digest": digest,
                "step": step,
                "lineage": self.ledger.lineage,
                "stage": "first",
                "stage_step": step,
                "ended": False,
                "generation": self.ledger.generation,
                "bytes": 1,
                "suspect": False,
                "seconds": 0.1,
                "stall_seconds": 0.0,
                **changes,
            }
        )

    # Operators

    def give(self, verb: str, command_id: str | None = None, author: str = "ann", **arguments: Any) -> p.CommandView:
        self._commands += 1
        command = p.Command(id=command_id or f"{self.context.term}-{self._commands}", verb=verb, arguments=arguments)  # type: ignore[arg-type]
        return self.dispatch.accept(command, author)

    def view(self, command: p.CommandView) -> p.CommandView:
        found: p.CommandView = self.ledger.commands[command.number]
        return found

    async def until(self, holds: Callable[[], Any], seconds: float = 5.0) -> None:
        """Waits for something that is to come about by itself."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, f"in vain; the run is {self.ledger.state}: {self.ledger.reason}"
            await asyncio.sleep(0.002)

    # States

    async def to(self, state: p.State) -> None:
        """Brings a fresh run into a state, with two checkpoints (`a` at step 10, `b` at 20) where it has trained."""
        if state == "building":
            await self.until(lambda: self.ledger.state == "building")
            return
        InstantData.done.set()
        await self.until(lambda: self.starts)
        if state == "starting":
            assert self.ledger.state == "starting"
            return
        self.rank_comes()
        self.phase("training")
        for step in range(1, 26):
            self.row(step)
            if step in (10, 20):
                self.saves("a" if step == 10 else "b", step)
        assert self.ledger.state == "training"
        await self._from_training(state)
        assert self.ledger.state == state

    async def _from_training(self, state: p.State) -> None:
        if state == "paused":
            view = self.give("pause")
            await self.until(lambda: self.orders)
            self.answers(self.orders[-1], step=25)
            self.phase("paused", 25)
            assert self.view(view).state == "done"
        elif state == "recovering":
            self.ranks_die()
            await self.until(lambda: len(self.starts) == 2)
            self.rank.clear()
        elif state == "released":
            self.give("release")
            await self.until(lambda: self.orders)
            self.saves("r", 25)
            self.answers(self.orders[-1], step=25, checkpoint="r")
            self.says(p.Ended(cause="released", step=25, checkpoint="r"))
        elif state == "failed":
            self.ranks_die()
            await self.until(lambda: len(self.starts) == 2)
            self.ranks_die()
            await self.until(lambda: self.ledger.state == "failed")
        elif state == "finished":
            self.says(p.Ended(cause="finished", step=100))

    async def trains(self) -> None:
        """The ranks last asked for come up and train."""
        self.rank_comes()
        self.phase("training", self.context.live.step)


def make_recipe(watch: tuple[Watch, ...] = (), **run: Any) -> Recipe:
    recipe = parse_recipe(RECIPE)
    return msgspec.structs.replace(recipe, watch=watch, run=msgspec.structs.replace(recipe.run, **run))


@contextlib.asynccontextmanager
async def desk_at(
    root: Path, monkeypatch: pytest.MonkeyPatch, state: p.State | None = None, recipe: Recipe | None = None
) -> AsyncIterator[Desk]:
    """A controller of a run in a state; of a run as its journal has it, for None."""
    monkeypatch.setattr(controller, "backend_of", NoProcesses)
    monkeypatch.setattr(controller, "Building", InstantData)
    InstantData.done = asyncio.Event()
    if state is None:
        InstantData.done.set()
    desk = Desk(root, recipe or make_recipe())
    await desk.open()
    try:
        if state is not None:
            await desk.to(state)
        yield desk
    finally:
        await desk.close()
