"""`python -P -m launcher.controller RUN`: takes over a run and serves until it is over and nobody is watching."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import resource
import signal
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec

from launcher.backends.choice import backend_of
from launcher.controller.annotation.desk import Preferring
from launcher.controller.commands.command_queue import Dispatch
from launcher.controller.commands.rank_reports import Reports
from launcher.controller.commands.slurm_signals import BatchJob
from launcher.controller.core import recovery
from launcher.controller.core.checkpoints import Commits
from launcher.controller.core.context import ControllerContext
from launcher.controller.core.copies import settle_copy
from launcher.controller.core.data_build import Building
from launcher.controller.core.events import GenerationBegan, RolledBack
from launcher.controller.core.queries import Queries
from launcher.controller.core.recipe_change import note_change, run_began
from launcher.controller.core.snapshot import SnapshotBuilder
from launcher.controller.core.versions import installed_versions
from launcher.controller.core.watch_rules import Firing, WatchRules
from launcher.controller.probe.sessions import Probing
from launcher.controller.serving.listener import Listener, ListenError
from launcher.controller.serving.server import ConnectionServer
from launcher.controller.supervision.generations import Generations
from launcher.controller.supervision.node_pool import Pool
from launcher.controller.supervision.stragglers import Stragglers
from launcher.metrics.store import MetricStore, usable_index
from midwatch.directory_identity import DirectoryId
from midwatch.journal.journal import Journal, JournalError, Ousted
from midwatch.journal.run_identity import claim
from midwatch.protocol import Command
from midwatch.recipe import Recipe, RecipeError, Watch, load_recipe
from midwatch.run_directory import (
    Address,
    RunLock,
    RunPaths,
    beat,
    cache_directories,
    host_name,
    runtime_directory,
    say_farewell,
    write_address,
)
from midwatch.signals import ignore_stray
from midwatch.transport.access import group_id, socket_directory
from midwatch.transport.tls_identity import KeysError, RunKeys
from shards.common.terminal import log_to_stderr

log = logging.getLogger("launcher.controller")

BEAT_SECONDS = 3.0
"""Between two signs of life on the storage that the run's machines share."""
MOST_FILES = 65536
"""Handles that are asked for where the system allows it: a connection takes one, and the usual 1,024 are too few for many nodes."""
FAREWELL_SECONDS = 0.2
"""For the last words to agents, before their connections are closed."""
LINGER_SECONDS = 3.0
"""How long a finished run is served after its last client has gone."""


async def serve(paths: RunPaths) -> int:
    """One term of office: from taking the term to a later controller or the end; the value is the exit status."""
    recipe, text = load_recipe(paths.recipe), paths.recipe.read_text(encoding="utf-8-sig")
    paths.create()
    room = _socket_directory(recipe, paths)
    lock = RunLock(paths)
    if not _take(lock):
        log.info("another controller is running; leaving the run to it")
        return 0
    journal = Journal(paths.journal, time.time(), host_name(), os.getpid(), installed_versions(), recovery.floors(paths))
    claimed = claim(paths, journal.entries)
    index = usable_index([place / f"{claimed.run}.metrics.sqlite" for place in cache_directories()])
    metrics = MetricStore.open(paths.metrics, index, journal.term)
    context = ControllerContext(paths, recipe, journal, metrics, run=claimed.run)
    recovery.report_losses(context)
    if not context.ledger.started:
        context.record(run_began(recipe.run.name, recipe, text, context.clock(), context.run))
    elif claimed.original is not None:
        settle_copy(context, claimed.original)
    note_change(context)
    term = Term(context)
    server = await term.door.listen(room / f"{context.run}.{journal.term}.sock")
    socket = server.sockets[0].getsockname()
    listener: Listener | None = None
    remotes: tuple[str, ...] = ()
    beats: asyncio.Task[None] | None = None
    try:
        if recipe.cluster.backend != "local":
            identity = (await asyncio.to_thread(RunKeys.ensure, paths)).issue("controller", host_name())
            listener = Listener(identity, term.door.serve, term.door.refusals)
            remotes = await listener.open(recipe.cluster)
            log.info("listening for the run's nodes on %s", ", ".join(remotes))
        address = Address(
            term=journal.term,
            url=f"unix:{socket}",
            host=host_name(),
            pid=os.getpid(),
            generation=context.ledger.generation,
            remote=remotes[0] if remotes else "",
            also=remotes[1:],
            run=context.run,
            directory=DirectoryId.of(paths.root),
            path=str(paths.root.resolve()),
        )
        write_address(paths.address, address)
        context.events.subscribe(GenerationBegan, lambda event: _note_generation(paths, address, event.generation))
        beats = asyncio.create_task(_beat(paths, address), name="beat")
        await term.run()
    except Ousted as error:
        log.warning("ousted: %s", error)
    finally:
        if beats is not None:
            beats.cancel()
            await asyncio.to_thread(say_farewell, paths.address, journal.term)
        if listener is not None:
            await listener.close()
        server.close()
        await server.wait_closed()
        Path(socket).unlink(missing_ok=True)
        with contextlib.suppress(OSError, JournalError):
            context.retry_backlog()
        with contextlib.suppress(OSError):
            metrics.close()
        context.samples.close()
        context.directory.close()
        journal.close()
        lock.release()
    return 0


def _socket_directory(recipe: Recipe, paths: RunPaths) -> Path:
    """The user's own, or, where a group of operators is to reach the socket, one that they can enter."""
    group = recipe.cluster.operators
    return runtime_directory() if group is None else socket_directory(group, group_id(group, str(paths.recipe)))


def _note_generation(paths: RunPaths, address: Address, generation: int) -> None:
    """Outside the journal too, which may be lost."""
    try:
        write_address(paths.address, msgspec.structs.replace(address, generation=generation))
    except OSError as error:
        log.warning("%s: %s", paths.address, error.strerror)


async def _beat(paths: RunPaths, address: Address) -> None:
    """Shows other machines that this controller lives."""
    while True:
        await asyncio.sleep(BEAT_SECONDS)
        await asyncio.to_thread(beat, paths.address, address)


def _take(lock: RunLock) -> bool:
    """Tries for half a second: a client that only looks whether a controller lives holds the lock for a moment."""
    for _ in range(10):
        if lock.take():
            return True
        time.sleep(0.05)
    return False


class Term:
    """The parts of one controller, put together."""

    def __init__(self, context: ControllerContext) -> None:
        self._context = context
        commits = Commits(context)
        pool = Pool(context, backend_of(context.recipe, context.paths))
        self.generations = Generations(context, commits, Building(context), pool)
        self.dispatch = Dispatch(context, commits, self.generations)
        self.watching = WatchRules(context.recipe.watch, self._rule_fires)
        context.events.subscribe(RolledBack, lambda _: self.watching.forget())
        view = SnapshotBuilder(context)
        reports = Reports(context, commits, self.dispatch, self.generations, self.watching)
        self.probing = Probing(context, commits)
        self.preferring = Preferring(context, self.probing)
        queries = Queries(context, commits, view)
        self.door = ConnectionServer(
            context, self.dispatch, self.generations, reports, view, queries, self.probing, self.preferring
        )
        self._commits = commits
        self.stragglers = Stragglers(context)
        self._batch = BatchJob.of(context, self.dispatch, self.generations)
        self._quit = asyncio.Event()
        context.restore()

    async def run(self) -> None:
        """Works until the run is over and nobody watches, or a later term begins."""
        await recovery.look_for(self._context)
        recovery.keep_goldens(self._context)
        adopting = asyncio.create_task(recovery.adopt(self._context), name="adopting")  # it may have much to read
        if self._batch is not None:
            self._batch.begin()
        self.generations.take_over()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._quit.set)
        if self._batch is not None:
            loop.add_signal_handler(signal.SIGTERM, self._batch.job_ends)
            loop.add_signal_handler(signal.SIGUSR1, self._batch.limit_is_near)
        tasks = [
            self._task(c) for c in (self.door.publish(), self.dispatch.run(), self._tick(), self._leave(), self._told_to_quit())
        ]
        done, pending = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in (adopting, *pending):
            task.cancel()
        await asyncio.gather(adopting, *pending, return_exceptions=True)
        await self.preferring.close()
        await self.probing.close()
        for task in done:
            task.result()

    def _task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        return asyncio.create_task(work)

    async def _told_to_quit(self) -> None:
        """A signal ends the controller, not the run: the ranks train on, and the next term takes over. A batch job's mean more."""
        if self._batch is not None:
            await self._batch.until_over()
        else:
            await self._quit.wait()

    async def _tick(self) -> None:
        """What is looked after every half second."""
        beat = 0
        while True:
            await asyncio.sleep(0.5)
            beat += 1
            self.generations.look()
            self.stragglers.look()
            self._context.retry_backlog()
            self._report_broken_rules()
            self.dispatch.look()
            if lost := self._context.directory.lost():
                self.generations.abandon(lost)
                await asyncio.sleep(FAREWELL_SECONDS)
                raise Ousted(lost)
            with contextlib.suppress(OSError):  # storage that errs does not say that
                if (self._context.paths.journal / f"{self._context.term + 1:06d}.log").exists():
                    raise Ousted("a later term has begun")
            if beat % 4 == 0:
                await self._flush_metrics()
            if beat % 10 == 0:
                await recovery.look_for(self._context)
            self._context.touch()

    async def _flush_metrics(self) -> None:
        try:
            await asyncio.to_thread(self._context.metrics.flush)
        except OSError as error:  # a full disk: the rows wait, and the run goes on
            log.warning("metrics cannot be written: %s", error)

    async def _leave(self) -> None:
        """Ends the term some time after the run is over and the last client has gone."""
        context = self._context
        idle = 0.0
        while idle < LINGER_SECONDS:
            resting = context.state in ("finished", "failed") or (
                context.state == "released" and not context.ledger.generation_live
            )
            waited_for = (
                *(self.door.clients, self.generations.parting, self.generations.gathering),
                *(context.ledger.open_commands(), context.unwritten),
            )
            idle = idle + 0.25 if (resting or context.over.is_set()) and not any(waited_for) else 0.0
            await asyncio.sleep(0.25)
        self.generations.dismiss()
        await asyncio.sleep(FAREWELL_SECONDS)

    def _report_broken_rules(self) -> None:
        while self.watching.broken:
            rule, why = self.watching.broken.pop(0)
            self._context.raise_alarm(why, self._context.live.step, rule=rule.name, value=None, threshold="")

    def _rule_fires(self, rule: Watch, step: int, seen: Firing) -> None:
        context = self._context
        text = f"{rule.name}: {seen.words(rule.metric)}"
        value = seen.value if math.isfinite(seen.value) else None
        context.raise_alarm(text, step, rule=rule.name, value=value, threshold=seen.threshold)
        command = rule.command()
        if command is None:
            return
        asked = Command(id=f"watch/{rule.name}/{context.ledger.lineage}/{step}", verb=command.verb, arguments=command.arguments)
        context.when_durable(lambda: self._give(asked, f"watch rule {rule.name}"))

    def _give(self, command: Command, author: str) -> None:
        try:
            self.dispatch.accept(command, author)
        except Ousted:
            raise
        except JournalError as error:
            log.error("%s of %s is lost: %s", command.verb, author, error)


def main() -> int:
    log_to_stderr("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    logging.getLogger("websockets").setLevel(logging.WARNING)
    ignore_stray()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MOST_FILES)), hard))
    try:
        return asyncio.run(serve(RunPaths(Path(sys.argv[1]))))
    except (RecipeError, JournalError, KeysError, ListenError, PermissionError) as error:
        log.error("%s", error)
        return 2
    except OSError as error:
        if error.filename is None:
            log.exception("the controller failed")
        else:
            log.error("%s: %s", error.filename, error.strerror)
        return 1
    except Exception:
        log.exception("the controller failed")
        return 1


if __name__ == "__main__":
    sys.exit(main())
