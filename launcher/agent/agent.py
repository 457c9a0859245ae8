"""One node's ranks, and the link to the controller.

An agent keeps its ranks while the controller is away, for as long as they step; ranks that neither step nor are watched are ended
after a minute, and an agent without ranks and without a controller leaves after one. Its own death ends its ranks at once: they
hold the other end of a pipe.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from launcher.agent import stacks
from launcher.agent.environment import presentable, rank_environment
from launcher.agent.forkserver import ForkServers
from launcher.agent.hangs import Hang, HangWatch
from launcher.agent.reachability import ProbePort
from launcher.agent.stats import NodeReader
from midwatch import protocol as p
from midwatch.directory_identity import DirectoryWatch
from midwatch.journal.run_identity import run_id
from midwatch.recipe import Recipe
from midwatch.run_directory import RunPaths, read_address, runtime_directory
from midwatch.transport.addresses import address_of, address_that_reaches, interface_of, interface_problem
from midwatch.transport.node_join import NodeJoin, ways_to
from midwatch.transport.rank_client import Connection

if TYPE_CHECKING:
    from launcher.agent.elastic import RankGroup

log = logging.getLogger("launcher.agent")

FORSAKEN_SECONDS = 60.0
PARTING_SECONDS = 4.0
"""That an agent which is told to leave gives a controller out of reach, which may only just have been followed by another."""
STATS_SECONDS = 1.0
LOOK_SECONDS = 1.0
"""Between two looks at the run directory."""
MISSING_SECONDS = 5.0
"""That it may be out of sight before it counts as moved or deleted."""
LOOPBACK = "127.0.0.1"


class Agent:
    """Obeys the controller, tells it how the node fares, and looks after the ranks when it is gone."""

    def __init__(
        self,
        paths: RunPaths,
        node: str,
        recipe: Recipe,
        identity: Path | None,
        joining: NodeJoin | None = None,
        leaves: Callable[[], object] = lambda: None,
    ) -> None:
        """`leaves` is called when it begins to leave. Raises NetworkError where this node has no address for the others."""
        self._paths, self._node, self._recipe, self._identity = paths, node, recipe, identity
        self._joining, self._leaves = joining, leaves
        self._run = joining.run_key if joining is not None else run_id(paths)
        self._directory = DirectoryWatch(paths.root, MISSING_SECONDS)
        self._told_to_leave = self._turned_away = False
        self._orders: queue.Queue[p.Message | None] = queue.Queue()
        self._leaving = threading.Event()
        self._ended: p.RanksEnded | None = None
        self._group: RankGroup | None = None
        runtime = runtime_directory()
        self._guard = runtime / f"{paths.key}.{os.getpid()}.guard"
        self._heartbeat = runtime / f"{paths.key}.{os.getpid()}.beat"
        os.mkfifo(self._guard, 0o600)
        self._guard_handle = os.open(self._guard, os.O_RDWR)
        self._address = self._find_address()
        self._probe = ProbePort(self._address) if self._address != LOOPBACK else None
        self._link = Connection(
            "agent-link", paths.address, self._hello, self._opened, self._orders.put, self._refused, identity, joining, self._run
        )
        interface = interface_of(self._address) if self._address != LOOPBACK else None
        self._rank_environment = {**rank_environment(recipe.cluster.threads, interface), **recipe.cluster.env}
        self._fork_servers = (
            ForkServers(paths.root, {**os.environ, **self._rank_environment}) if recipe.cluster.fork_ranks else None
        )
        self._reader = NodeReader(node, paths.root)
        self._hangs = HangWatch(recipe.cluster.hang_seconds, recipe.cluster.hang_first_seconds)
        self._hung = 0
        """The generation that was last reported as hung."""

    def _find_address(self) -> str:
        """Where the other nodes reach this one: on the recipe's interface, else on the way to the controller."""
        cluster = self._recipe.cluster
        if cluster.interface is not None:
            return address_of(cluster.interface)
        address = read_address(self._paths.address)
        ways = ways_to(address, self._joining)
        if cluster.backend == "local" or not ways:
            return LOOPBACK
        places = [urlsplit(way) for way in ways]
        return address_that_reaches([(place.hostname or "", place.port or 0) for place in places])

    def run(self) -> int:
        """Works until the controller sends it away, or nobody needs it any more."""
        if self._fork_servers is not None:
            self._fork_servers.prepare()
        self._link.start()
        threading.Thread(target=_import_torch, name="import-torch", daemon=True).start()
        stats = threading.Thread(target=self._report_stats, name="stats", daemon=True)
        stats.start()
        directory = threading.Thread(target=self._watch_directory, name="directory", daemon=True)
        directory.start()
        try:
            while not self._leaving.is_set():
                try:
                    order = self._orders.get(timeout=1.0)
                except queue.Empty:
                    self._check_forsaken()
                    continue
                if order is not None:
                    self._obey(order)
        finally:
            self._leaving.set()
            self._leaves()
            self._end_ranks()
            if self._fork_servers is not None:
                self._fork_servers.close()
            stats.join(timeout=5)
            directory.join(timeout=5)
            self._reader.close()
            self._directory.close()
            self._link.close()  # late: that it is closed tells the controller that this node has nothing left
            if self._probe is not None:
                self._probe.close()
            os.close(self._guard_handle)
            sockets = self._heartbeat.parent.glob(f"{self._heartbeat.stem}.w*")
            for file in [self._guard, *self._beats(), *sockets, *([self._identity] if self._identity is not None else [])]:
                file.unlink(missing_ok=True)
        return 1 if self._turned_away else 0

    def leave(self) -> None:
        self._leaving.set()
        self._orders.put(None)

    def leave_when_told(self) -> None:
        """Leaves when the controller says so, which may want a checkpoint first; soon where it is gone, at once if asked again."""
        if self._told_to_leave:
            self.leave()
        self._told_to_leave = True

    # The link

    def _hello(self) -> p.AgentHello:
        group = self._ranks()
        return p.AgentHello(
            version=p.VERSION,
            run=self._run,
            node=self._node,
            pid=os.getpid(),
            generation=group.generation if group is not None else self._ended.generation if self._ended is not None else 0,
            address=self._address,
            probe_port=self._probe.port if self._probe is not None else 0,
        )

    def _opened(self, answer: p.Message) -> None:
        if self._ended is not None:
            self._link.send(self._ended)

    def _refused(self, reason: str) -> None:
        log.error("the controller refuses this agent: %s", reason)
        self._turned_away = True
        self.leave()

    # Orders

    def _obey(self, order: p.Message) -> None:
        if isinstance(order, p.Gather):
            self._gather(order)
        elif isinstance(order, p.EndRanks):
            log.info("ending the ranks of generation %d: %s", order.generation, order.reason)
            group = self._ranks()
            if group is not None and group.generation == order.generation:
                group.end()
            elif self._ended is None or self._ended.generation != order.generation:
                self._tell_ended(order.generation, False, (), "there were none")
        elif isinstance(order, p.TakeStacks):
            taken = self._take_stacks(order.generation)
            self._link.send(p.StacksTaken(generation=order.generation, file=taken[0], stuck=taken[1]))
        elif isinstance(order, p.Leave):
            self._leaves()
            self._wait_for_ranks(10)
            self._leaving.set()

    def _gather(self, gather: p.Gather) -> None:
        from launcher.agent.elastic import RankGroup

        self._end_ranks()
        generation = gather.start.generation
        environment = {
            **self._rank_environment,
            **gather.environment,
            "MIDWATCH_GENERATION": str(generation),
            "MIDWATCH_GUARD": str(self._guard),
            "MIDWATCH_RUN": self._run,
        }
        if self._identity is not None:
            environment["MIDWATCH_IDENTITY"] = str(self._identity)
        nccl = self._recipe.cluster.device != "cpu" and Path("/dev/nvidiactl").exists()
        if problem := interface_problem({**os.environ, **environment}, nccl=nccl):
            self._tell_ended(generation, False, (), problem, certain=True)
            return
        logs = self._paths.logs / self._node
        logs.mkdir(exist_ok=True)
        for file in self._beats():
            file.unlink(missing_ok=True)
        shown = presentable({**os.environ, **environment})

        def opened(port: int) -> None:
            self._link.send(p.Gathered(generation=generation, store_port=port, environment=shown))

        self._ended = None
        self._group = group = RankGroup(
            gather,
            self._paths.root,
            self._run,
            logs,
            environment,
            self._heartbeat,
            opened,
            self._tell_ended,
            self._fork_servers,
        )
        group.start()

    def _tell_ended(self, generation: int, ok: bool, exits: tuple[p.RankExit, ...], reason: str, certain: bool = False) -> None:
        log.info("generation %d ended: ok=%s %s %s", generation, ok, exits, reason)
        self._ended = p.RanksEnded(generation=generation, ok=ok, exits=exits, reason=reason, certain=certain)
        self._group = None
        self._link.send(self._ended)

    def _ranks(self) -> RankGroup | None:
        return self._group

    def _end_ranks(self) -> None:
        group = self._ranks()
        if group is not None:
            group.end()
            group.join(15)

    def _wait_for_ranks(self, seconds: float) -> None:
        group = self._ranks()
        if group is not None:
            group.join(seconds)

    # Looking after

    def _watch_directory(self) -> None:
        """Leaves, and ends the ranks, when the run directory is no longer at its path: their work cannot be stored."""
        while not self._leaving.wait(LOOK_SECONDS):
            if lost := self._directory.lost():
                log.error("%s: ending the ranks and leaving", lost)
                self.leave()
                return

    def _check_forsaken(self) -> None:
        """Ends what neither the controller nor progress speaks for."""
        since = self._link.lost_since
        if self._told_to_leave and since is not None and time.monotonic() - since > PARTING_SECONDS:
            self._leaving.set()
            return
        if since is None or time.monotonic() - since < FORSAKEN_SECONDS:
            return
        if self._ranks() is None:
            if self._joining is not None and not self._told_to_leave:
                return  # nobody but the operator would start it again
            log.warning("no controller for %d s and no ranks: leaving", FORSAKEN_SECONDS)
            self._leaving.set()
        elif time.monotonic() - max((beat.moved for beat in map(_read_beat, self._beats())), default=0.0) > FORSAKEN_SECONDS:
            log.warning("no controller and no step for %d s: ending the ranks", FORSAKEN_SECONDS)
            self._end_ranks()

    def _beats(self) -> list[Path]:
        """The file of each rank that has passed a boundary."""
        return list(self._heartbeat.parent.glob(f"{self._heartbeat.name}.*"))

    def _report_stats(self) -> None:
        while not self._leaving.wait(STATS_SECONDS):
            group = self._ranks()
            generation = group.generation if group is not None else 0
            beats = tuple(
                p.RankBeat(rank, pid, *_read_beat(self._heartbeat.with_name(f"{self._heartbeat.name}.{rank}")))
                for rank, pid in (group.pids().items() if group is not None else ())
            )
            self._link.send(self._reader.read(tuple(map(_by_the_clock, beats)), generation))
            hang = self._hangs.see(generation, beats) if beats else None
            if hang is not None and generation != self._hung:
                self._hung = generation
                self._tell_hung(generation, hang)

    def _tell_hung(self, generation: int, hang: Hang) -> None:
        log.error("rank %s has made no progress in %s for %.0f s", ", ".join(map(str, hang.ranks)), hang.phase, hang.seconds)
        file, stuck = self._take_stacks(generation)
        told = p.Hung(generation=generation, phase=hang.phase, seconds=hang.seconds, limit=hang.limit, file=file, stuck=stuck)
        if not self._link.send(told):
            log.error("the controller is out of reach: ending the ranks that hang")
            group = self._ranks()
            if group is not None:
                group.end()

    def _take_stacks(self, generation: int) -> tuple[str, tuple[int, ...]]:
        """The file, below the run's directory, that says where this node's ranks are, and which of them did not answer."""
        group = self._ranks()
        if group is None or group.generation != generation:
            return "", ()
        try:
            taken = stacks.take(self._heartbeat, group.pids(), self._paths.logs / self._node, generation)
        except OSError as error:
            log.error("the stacks cannot be written: %s", error)
            return "", ()
        return str(taken.file.relative_to(self._paths.root)), taken.stuck


class Beat(NamedTuple):
    """What a rank's file says of its last move; zeros where it has not moved yet. Its fields are RankBeat's."""

    step: int = 0
    moved: float = 0.0
    """By the clock that only runs on, which all processes of a machine share and nobody sets."""
    phase: str = p.PHASES[0]
    own: float = 0.0
    """Its own seconds a step."""


def _by_the_clock(beat: p.RankBeat) -> p.RankBeat:
    """As the controller gets it: with the time of the move by the node's wall clock as that is set now."""
    when = time.time() - (time.monotonic() - beat.time) if beat.time else 0.0
    return p.RankBeat(beat.rank, beat.pid, beat.step, when, beat.phase, beat.own)


def _read_beat(file: Path) -> Beat:
    with contextlib.suppress(OSError, struct.error, IndexError):
        step, moved, phase, own = struct.unpack("<QdIf", file.read_bytes()[:24])
        return Beat(int(step), float(moved), p.PHASES[phase], float(own))
    return Beat()


def _import_torch() -> None:
    """Imports torch while the controller is still busy: it takes seconds."""
    import launcher.agent.elastic  # noqa: F401  # for what it imports
