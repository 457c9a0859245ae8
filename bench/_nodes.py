"""Simulated nodes for `bench.fleet`: what an agent says over the network, with the run's keys, and nothing behind it.

Each has a WebSocket with TLS of its own to the controller, says hello as an agent does, answers Gather as one whose ranks come up
at once, and tells each second of 8 GPUs and 8 ranks. Node 0 plays rank 0, too: over two more connections it says that the ranks
train, and a row of metrics each second.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
import resource
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from websockets.asyncio.client import ClientConnection, connect

from launcher.agent.environment import presentable, rank_environment
from launcher.agent.reachability import ProbePort
from midwatch import protocol as p
from midwatch.journal.run_identity import run_id
from midwatch.recipe import load_recipe
from midwatch.run_directory import RunPaths, read_address
from midwatch.transport.tls_identity import CONTROLLER_NAME, RunKeys, client_context

GPUS = 8
HANDSHAKES = 28
"""TLS handshakes that a process has under way."""
SECONDS = 1.0
"""Between two words of a node."""
TURNS = 7
METRICS = tuple(f"{group}/metric_{i}" for group in ("perf", "data", "eval") for i in range(6))


def node_name(number: int) -> str:
    return f"gpu-{number:04d}"


class Nodes:
    """Some of the nodes."""

    def __init__(self, paths: RunPaths, numbers: range) -> None:
        address = read_address(paths.address)
        assert address is not None and address.remotes
        self._paths, self._numbers, self._way = paths, numbers, address.remotes[0]
        place = urlsplit(self._way)
        self._place = (place.hostname, place.port)
        self._keys = RunKeys.ensure(paths)
        self._probe = ProbePort(place.hostname or "")
        self._handshakes = asyncio.Semaphore(HANDSHAKES)
        self._environment = presentable({**os.environ, **rank_environment(1, "eth0")})
        self._began = time.time()
        self._turns = [_figures(random.Random(turn)) for turn in range(TURNS)]

    async def run(self) -> None:
        """For ever; a connection that breaks is made anew."""
        await asyncio.gather(*(self._keep(number) for number in self._numbers))

    async def _keep(self, number: int) -> None:
        while True:
            try:
                await self._live(number)
            except Exception as error:
                print(f"{node_name(number)}: {error!r}", file=sys.stderr, flush=True)
            await asyncio.sleep(1.0)

    async def _connect(self, number: int) -> ClientConnection:
        async with self._handshakes:
            tls = client_context(self._keys.issue("agent", node_name(number)))
            return await connect(
                self._way,
                ssl=tls,
                server_hostname=CONTROLLER_NAME,
                host=self._place[0],
                port=self._place[1],
                proxy=None,
                compression=None,
                open_timeout=60,
                ping_interval=5,
                ping_timeout=30,
            )

    async def _live(self, number: int) -> None:
        async with await self._connect(number) as connection:
            hello = p.AgentHello(
                version=p.VERSION,
                run=run_id(self._paths),
                node=node_name(number),
                pid=os.getpid(),
                generation=0,
                address=self._place[0] or "",
                probe_port=self._probe.port,
            )
            await connection.send(p.encode(hello))
            p.decode(await connection.recv())
            gathered: list[p.Gather] = []
            talking = asyncio.create_task(self._talk(number, connection, gathered))
            leading: asyncio.Task[None] | None = None
            try:
                async for frame in connection:
                    order = p.decode(frame)
                    if not isinstance(order, p.Gather):
                        continue
                    gathered[:] = [order]
                    told = p.Gathered(generation=order.start.generation, store_port=29400, environment=self._environment)
                    await connection.send(p.encode(told))
                    if order.node_rank == 0:
                        leading = asyncio.create_task(self._lead_on(order, number))
            finally:
                talking.cancel()
                if leading is not None:
                    leading.cancel()

    async def _talk(self, number: int, connection: ClientConnection, gathered: list[p.Gather]) -> None:
        due = time.monotonic() + random.random() * SECONDS
        for turn in itertools.count():
            await asyncio.sleep(max(0.0, due - time.monotonic()))
            due += SECONDS
            await connection.send(p.encode(self._stats(number, turn, gathered[0] if gathered else None)))

    def _stats(self, number: int, turn: int, gather: p.Gather | None) -> p.NodeStats:
        """What costs the fleet most is made beforehand: the figures of one turn in a few, the same for all nodes."""
        now = time.time()
        cpus, gpus, resident = self._turns[(turn + number) % TURNS]
        step, first = int(now - self._began), gather.node_rank * GPUS if gather is not None else 0
        ranks = tuple(p.RankBeat(first + i, 4000 + i, step, now - 0.1 * i, "training", 0.9 + 0.01 * i) for i in range(GPUS))
        return p.NodeStats(
            node=node_name(number),
            time=now,
            cpus=cpus,
            memory_used=400_000_000_000 + turn,
            memory_total=2_000_000_000_000,
            gpus=gpus,
            rank_rss=resident if gather is not None else (),
            disk_free=3_000_000_000_000,
            generation=gather.start.generation if gather is not None else 0,
            ranks=ranks if gather is not None else (),
        )

    async def _lead_on(self, gather: p.Gather, number: int) -> None:
        while True:
            try:
                await self._lead(gather, number)
            except Exception as error:
                print(f"rank 0: {error!r}", file=sys.stderr, flush=True)
            await asyncio.sleep(1.0)

    async def _lead(self, gather: p.Gather, number: int) -> None:
        """What rank 0 says of a run that trains."""
        recipe = load_recipe(self._paths.recipe)
        start, stage = gather.start, recipe.stage[0]
        hello = p.RankHello(
            version=p.VERSION,
            run=run_id(self._paths),
            generation=start.generation,
            term=start.term,
            pid=os.getpid(),
            world=gather.nodes * gather.ranks_per_node,
        )
        control = await self._connect(number)
        await control.send(p.encode(hello))
        telemetry = await self._connect(number)
        await telemetry.send(p.encode(msgspec.structs.replace(hello, channel="telemetry")))
        line = start.lineage.id
        border = p.StageBorder(stage=stage.name, event="begin", step=0, stage_step=0, lineage=line)
        phase = p.Phase(phase="training", step=0, stage=stage.name, stage_step=0, lineage=line, settings={"lr": 3e-4})
        await control.send(p.encode(p.Numbered(number=1, body=border)))
        await control.send(p.encode(p.Numbered(number=2, body=phase)))
        drains = [asyncio.create_task(_drain(wire)) for wire in (control, telemetry)]
        try:
            for step in range(1, 1_000_000):
                values = dict.fromkeys(METRICS, 0.5) | {"train/loss": 8.0 / step, "perf/step_seconds": SECONDS}
                row = p.Metrics(lineage=line, step=step, tokens=step * 4_000_000, time=time.time(), values=values)
                await telemetry.send(p.encode(p.Numbered(number=step, body=row)))
                await asyncio.sleep(SECONDS)
        finally:
            for task in drains:
                task.cancel()


def _figures(dice: random.Random) -> tuple[tuple[float, ...], tuple[p.Gpu, ...], tuple[int, ...]]:
    """Of CPUs, of GPUs, and what the ranks hold."""
    gpus = tuple(
        p.Gpu(
            index=i,
            name="NVIDIA H100 80GB HBM3",
            utilisation=dice.random(),
            memory_used=70_000_000_000 + dice.randrange(10**9),
            memory_total=85_520_809_984,
            temperature=55.0 + dice.randrange(20),
            power=600.0 + 90 * dice.random(),
            power_limit=700.0,
            slowdown=90.0,
            clock=1980 - dice.randrange(200),
            clock_most=1980,
            links=(18, 18),
            bus=f"00000000:{i:02X}:00.0",
            processes=(p.GpuProcess(4000 + i, 70_000_000_000, i),),
        )
        for i in range(GPUS)
    )
    cpus = tuple(round(dice.random(), 3) for _ in range(64))
    return cpus, gpus, tuple(9_000_000_000 + dice.randrange(10**9) for _ in range(GPUS))


async def _drain(connection: ClientConnection) -> None:
    async for _ in connection:
        pass


def main() -> None:
    """`python -m bench._nodes RUN FIRST STOP`."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 65536)), hard))
    root, first, stop = sys.argv[1:]
    nodes = Nodes(RunPaths(Path(root)), range(int(first), int(stop)))
    asyncio.run(nodes.run())


if __name__ == "__main__":
    main()
