"""One generation of ranks under torch's LocalElasticAgent, with a rendezvous that the controller has already held.

Each generation is one run of a fresh LocalElasticAgent with no restarts of its own, over a TCPStore of its own on a new port: stale
keys of an earlier generation cannot be met, and torch's restart count decides nothing. The ranks find what they start from in the
store under START_KEY.
"""

from __future__ import annotations

import contextlib
import logging
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # is public; its stubs leave it out
from torch.distributed.elastic.agent.server.api import RunResult, Worker, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler
from torch.distributed.elastic.rendezvous import (
    RendezvousGracefulExitError,
    RendezvousHandler,
    RendezvousInfo,
    RendezvousStoreInfo,
)

from launcher.agent.forkserver import ForkServerError, ForkServers
from launcher.agent.stacks import socket_of
from midwatch.protocol import Gather, RankExit

log = logging.getLogger("launcher.agent")

START_KEY = "midwatch/start"
MONITOR_SECONDS = 0.1
SHUTDOWN_SECONDS = 5
STORE_SECONDS = 20
LOG_TAIL_BYTES = 16 * 1024


_LOG_PREFIX = re.compile(r"^\d{4}-\d\d-\d\d [\d:,]+ (?:ERROR|CRITICAL|WARNING|INFO) +")


class ControlledRendezvous(RendezvousHandler):
    """A rendezvous whose members the controller has chosen; nobody else can join or restart it."""

    def __init__(self, run: str, gather: Gather, store: TCPStore, end: threading.Event) -> None:
        """Once `end` is set, the elastic agent stops its ranks at its next look."""
        self._run, self._gather, self._store, self._end = run, gather, store, end

    def get_backend(self) -> str:
        return "midwatch"

    @property
    def use_agent_store(self) -> bool:
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        if self._end.is_set():
            raise RendezvousGracefulExitError("the controller has ended this generation")
        info = RendezvousStoreInfo(master_addr=self._gather.store_host, master_port=self._store.port)
        return RendezvousInfo(self._store, self._gather.node_rank, self._gather.nodes, info)

    def is_closed(self) -> bool:
        return self._end.is_set()

    def set_closed(self) -> None:
        self._end.set()

    def num_nodes_waiting(self) -> int:
        if self._end.is_set():
            raise RendezvousGracefulExitError("the controller has ended this generation")
        return 0

    def get_run_id(self) -> str:
        return self._run

    def shutdown(self) -> bool:
        return True


class RankLogs(LogsSpecs):
    """Gives each rank its environment just before it starts; ranks append to a log of their own, named there."""

    def __init__(self, directory: Path, environment: dict[str, str], heartbeat: Path) -> None:
        super().__init__(log_dir=str(directory))
        self._directory, self._environment, self._heartbeat = directory, environment, heartbeat

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        for environment in envs.values():
            rank = environment["RANK"]
            environment |= self._environment
            environment["MIDWATCH_LOG"] = str(self._directory / f"{rank}.log")
            environment["MIDWATCH_HEARTBEAT"] = str(self._heartbeat)
            environment["TORCH_WORKER_SERVER_SOCKET"] = str(socket_of(self._heartbeat, int(rank)))
        errors = {rank: str(self._directory / f".error-{rank}.json") for rank in envs}
        for file in errors.values():
            Path(file).unlink(missing_ok=True)
        none = dict.fromkeys(envs, "")
        return LogsDest(stdouts=none, stderrs=none, tee_stdouts=none, tee_stderrs=none, error_files=errors)

    @property
    def root_log_dir(self) -> str:
        return str(self._directory)


class _ForkedHandler(SubprocessHandler):
    """A rank from the fork server, or, where that cannot be had, a process started anew."""

    def __init__(self, servers: ForkServers, entrypoint: str, args: tuple[str, ...], env: dict[str, str], local_rank: int) -> None:
        self._servers, self._order = servers, (args, env)
        super().__init__(entrypoint, args, env, None, None, local_rank, None)

    def _popen(self, args: tuple[str, ...], env: dict[str, str]) -> Any:
        given, added = self._order
        try:
            return self._servers.fork(given[given.index("trainer") + 1 :], added)
        except ForkServerError as error:
            log.warning("a rank is started without the fork server: %s", error)
            return super()._popen(args, env)

    def close(self, death_sig: signal.Signals | None = None) -> None:
        with contextlib.suppress(ProcessLookupError):  # word of a forked rank's end may still be on its way
            super().close(death_sig)


class _ForkedContext(SubprocessContext):
    """Ranks as children of the fork server, all at once."""

    def __init__(self, servers: ForkServers, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._servers = servers

    def _start(self) -> None:
        self.subprocess_handlers = {
            local: _ForkedHandler(self._servers, str(self.entrypoint), self.args[local], self.envs[local], local)
            for local in range(self.nprocs)
        }


class ForkingElasticAgent(LocalElasticAgent):
    """Torch's agent, whose ranks come from a process that has imported everything already."""

    def __init__(self, spec: WorkerSpec, logs: LogsSpecs, servers: ForkServers) -> None:
        super().__init__(spec, logs, exit_barrier_timeout=30, shutdown_timeout=SHUTDOWN_SECONDS)
        self._servers = servers

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        spec = worker_group.spec
        args = {w.local_rank: tuple(spec.args) for w in worker_group.workers}
        envs = {w.local_rank: self._environment_of(worker_group, w) for w in worker_group.workers}
        context = _ForkedContext(self._servers, spec.role, spec.entrypoint, args, envs, self._logs_specs)
        self._pcontext = context
        context.start()
        return dict(context.pids())

    def _environment_of(self, group: WorkerGroup, worker: Worker) -> dict[str, str]:
        """What torchrun tells its workers, by the documented names."""
        spec = group.spec
        environment = {
            "RANK": worker.global_rank,
            "LOCAL_RANK": worker.local_rank,
            "GROUP_RANK": group.group_rank,
            "ROLE_RANK": worker.role_rank,
            "ROLE_NAME": spec.role,
            "LOCAL_WORLD_SIZE": spec.local_world_size,
            "WORLD_SIZE": worker.world_size,
            "GROUP_WORLD_SIZE": group.group_world_size,
            "ROLE_WORLD_SIZE": worker.role_world_size,
            "MASTER_ADDR": group.master_addr,
            "MASTER_PORT": group.master_port,
            "TORCHELASTIC_RESTART_COUNT": 0,
            "TORCHELASTIC_MAX_RESTARTS": spec.max_restarts,
            "TORCHELASTIC_RUN_ID": spec.rdzv_handler.get_run_id(),
            "TORCHELASTIC_USE_AGENT_STORE": spec.rdzv_handler.use_agent_store,
        }
        return {name: str(value) for name, value in environment.items()}


class RankGroup:
    """The ranks of one generation on this node, in a thread that ends with them."""

    def __init__(
        self,
        gather: Gather,
        run_directory: Path,
        run: str,
        log_directory: Path,
        environment: dict[str, str],
        heartbeat: Path,
        opened: Callable[[int], None],
        ended: Callable[[int, bool, tuple[RankExit, ...], str], None],
        servers: ForkServers | None = None,
    ) -> None:
        """`opened` gets the port of the generation's store when it is there, `ended` is called when all ranks are gone.

        Ranks are forked by `servers`, or started anew where there are none.
        """
        self.generation = gather.start.generation
        self._gather, self._run_name, self._directory = gather, run, run_directory
        self._opened, self._ended, self._servers = opened, ended, servers
        self._logs, self._environment, self._heartbeat = log_directory, environment, heartbeat
        self._ending = threading.Event()
        self._elastic: LocalElasticAgent | None = None
        self._thread = threading.Thread(target=self._run, name=f"generation-{self.generation}", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        """Ends the ranks; `ended` is called when they are gone."""
        self._ending.set()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def pids(self) -> dict[int, int]:
        """Process number of each rank here."""
        context = self._elastic._pcontext if self._elastic is not None else None  # torch has no public way to them
        first = self._gather.node_rank * self._gather.ranks_per_node
        return {first + local: pid for local, pid in context.pids().items()} if context is not None else {}

    def _run(self) -> None:
        ok, reason = False, ""
        exits: tuple[RankExit, ...] = ()
        try:
            store = _open_store(self._gather)
            self._opened(store.port)
            self._elastic = self._prepare(store)
            result = self._elastic.run()
            if result is None:
                reason = "ended by the controller"
            else:
                ok, exits = result.state == WorkerState.SUCCEEDED, _exits(result)
        except Exception as error:
            log.exception("generation %d", self.generation)
            reason = "ended by the controller" if self._ending.is_set() else f"{type(error).__name__}: {_first_line(str(error))}"
        self._ended(self.generation, ok, tuple(self._explained(e) for e in exits), reason)

    def _prepare(self, store: TCPStore) -> LocalElasticAgent:
        spec = WorkerSpec(
            role="trainer",
            local_world_size=self._gather.ranks_per_node,
            rdzv_handler=ControlledRendezvous(self._run_name, self._gather, store, self._ending),
            entrypoint=sys.executable,
            args=("-P", "-m", "trainer", str(self._directory)),
            max_restarts=0,
            monitor_interval=MONITOR_SECONDS,
        )
        logs = RankLogs(self._logs, self._environment, self._heartbeat)
        if self._servers is not None:
            return ForkingElasticAgent(spec, logs, self._servers)
        return LocalElasticAgent(spec, logs, exit_barrier_timeout=30, shutdown_timeout=SHUTDOWN_SECONDS)

    def _explained(self, ended: RankExit) -> RankExit:
        """With the last line of the rank's log, where it ended by itself and left no other word."""
        if ended.message or ended.code <= 0:
            return ended
        try:
            text = (self._logs / f"{ended.rank}.log").read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
        except OSError:
            return ended
        return RankExit(ended.rank, ended.code, last_words(text))


def last_words(text: str) -> str:
    """The last line of a rank's log without its time, and where the code was if that line ends a traceback."""
    last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
    begin = text.rfind("Traceback (most recent call last):")
    ends_it = begin >= 0 and [line for line in text[begin:].splitlines()[1:] if line.strip() and line[0] != " "][:1] == [last]
    message = _LOG_PREFIX.sub("", last.strip())[:300]
    return message + (_place(text[begin:]) if ends_it else "")


def _exits(result: RunResult) -> tuple[RankExit, ...]:
    """How ranks failed, the first to fail first: the others are mostly its victims."""
    failures = sorted(result.failures.items(), key=lambda item: item[1].timestamp)
    return tuple(RankExit(rank, failure.exitcode, _with_place(failure)) for rank, failure in failures)


def _with_place(failure: ProcessFailure) -> str:
    """What a rank's exception says, and the line of code that raised it."""
    data = failure.error_file_data.get("message")
    if not isinstance(data, dict):
        return _first_line(failure.message)
    return _first_line(str(data.get("message", ""))) + _place(str(data.get("extraInfo", {}).get("py_callstack", "")))


def _place(stack: str) -> str:
    """` (FILE:LINE)` of the innermost frame of a traceback; of code that is not installed, where there is any."""
    frames = re.findall(r'^  File "([^"]+)", line (\d+)', stack, re.MULTILINE)
    own = [frame for frame in frames if "-packages/" not in frame[0] and not frame[0].startswith(("<", sys.base_prefix))]
    return "".join(f" ({file}:{line})" for file, line in (own or frames)[-1:])


def _first_line(message: str) -> str:
    text = message.strip()
    return "" if text.startswith("Signal ") or "To enable traceback" in text else text.splitlines()[-1][:300] if text else ""


def _open_store(gather: Gather) -> TCPStore:
    """Node 0 opens the generation's store, at its own address alone; the others join it. Raises OSError or RuntimeError."""
    if gather.node_rank:
        return TCPStore(
            gather.store_host,
            gather.store_port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=STORE_SECONDS),
        )
    listener = socket.socket(socket.AF_INET6 if ":" in gather.store_host else socket.AF_INET)
    listener.bind((gather.store_host, 0))
    listener.listen(1024)
    port = int(listener.getsockname()[1])
    store = TCPStore(
        gather.store_host,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=STORE_SECONDS),
        master_listen_fd=listener.detach(),  # the store closes it
    )
    store.set(START_KEY, msgspec.msgpack.encode(gather.start))  # type: ignore[arg-type]  # takes bytes, too
    return store
