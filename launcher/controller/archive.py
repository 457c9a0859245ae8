"""A run without a controller, shown from its files alone: no term is claimed, no process is started and nothing is written.

It answers the questions that a controller answers, over a socket that leaves no file, and has one snapshot to show. It leaves as
soon as a controller announces itself, so that its clients go over to that one.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
from websockets.asyncio.server import ServerConnection, unix_serve
from websockets.exceptions import ConnectionClosed

from launcher.controller.commands.clients import refused_command
from launcher.controller.core.checkpoints import Commits
from launcher.controller.core.context import ControllerContext
from launcher.controller.core.queries import Queries
from launcher.controller.core.snapshot import SnapshotBuilder
from launcher.controller.serving.peers import Roles, quiet
from launcher.metrics.store import MetricStore
from midwatch import protocol as p
from midwatch.checkpoint_format.directory import listed
from midwatch.journal import entries as j
from midwatch.journal.journal import Journal, JournalError, read_journal
from midwatch.journal.run_identity import run_id
from midwatch.recipe import load_recipe
from midwatch.run_directory import Address, RunPaths, cache_directories, host_name, read_address

NO_CONTROLLER = "no controller is running"
LOOK_SECONDS = 0.5
"""Between two looks whether a controller has come."""
OVER = ("finished", "failed", "released")


class _PastJournal(Journal):
    """A journal that only reads."""

    def __init__(self, directory: Path) -> None:
        reading = read_journal(directory)
        self.entries = reading.entries
        self.damaged = reading.damaged
        self.term = max((term for term, _ in reading.entries), default=0)

    def append(self, *entries: j.Entry) -> None:
        raise JournalError("this run is shown from its files")


class _ArchiveContext(ControllerContext):
    """What the parts that answer questions need, and nothing that is written to."""

    def _lay_ballast(self) -> None:
        pass


class Archive:
    """One run as its files have it."""

    def __init__(self, paths: RunPaths) -> None:
        """Raises JournalError, RecipeError or OSError where the files cannot be read."""
        journal = _PastJournal(paths.journal)
        self._newest = journal.entries[-1][1].time if journal.entries else time.time()
        recipe = load_recipe(paths.recipe)
        index = f"{run_id(paths) or paths.key}.metrics.sqlite"
        found = [place / index for place in cache_directories() if (place / index).is_file()]
        metrics = MetricStore.read(paths.metrics, found[0] if found else Path(index))
        self.context = _ArchiveContext(paths, recipe, journal, metrics, clock=lambda: self._newest, run=run_id(paths))
        self.context.restore()
        there = listed(paths.checkpoints) or frozenset()
        self.context.ledger.missing = frozenset(id for id in self.context.ledger.checkpoints if id not in there)
        self.context.live.step = max(self.context.live.step, _last_step(journal.entries))
        self._view = SnapshotBuilder(self.context)
        self._queries = Queries(self.context, Commits(self.context), self._view)

    def close(self) -> None:
        self.context.metrics.close()
        self.context.samples.close()

    def snapshot(self, why: str = NO_CONTROLLER) -> p.Snapshot:
        """The run as its files have it; `why` that is all there is to show is added to its reason."""
        told = self._view.snapshot()
        if why == NO_CONTROLLER and told.state not in OVER:
            place = f"midwatch attach {self.context.paths.root} starts one"
            why = f"when its controller ended; {NO_CONTROLLER} now, {place}" if told.term else f"no controller has run yet, {place}"
        reason = f"{told.reason}; {why}" if told.reason else why
        return msgspec.structs.replace(told, reason=reason, time=time.time(), archived=True)

    async def serve(self, connection: ServerConnection) -> None:
        """Talks with one client until it leaves."""
        context = self.context
        peer = await Roles(os.getuid()).local(connection.transport.get_extra_info("socket"))
        try:
            hello = p.decode(await connection.recv())
            if not peer.works or not isinstance(hello, p.ClientHello) or hello.version != p.VERSION:
                await connection.send(p.encode(p.Refused(reason="this process serves another user")))
                return
            welcome = p.ClientWelcome(
                term=context.term, run=context.recipe.run.name, directory=str(context.paths.root), author=peer.name, archived=True
            )
            await connection.send(p.encode(welcome))
            if hello.subscribe:
                await connection.send(p.encode(await asyncio.to_thread(self.snapshot)))
            async for frame in connection:
                await connection.send(p.encode(await self._answer(p.decode(frame), peer.name)))
        except (ConnectionClosed, p.ProtocolError):
            return

    async def _answer(self, message: p.Message, author: str) -> p.Message:
        if isinstance(message, p.Command):
            return p.CommandReply(command=refused_command(message, author, time.time(), NO_CONTROLLER))
        try:
            return await self._queries.answer(message)
        except p.ProtocolError:
            return p.Refused(id=getattr(message, "id", 0), reason=f"{NO_CONTROLLER}; midwatch resume starts one")


def _last_step(entries: list[tuple[int, j.Entry]]) -> int:
    """The last step that the journal knows of on the line in force."""
    step = 0
    for _, entry in entries:
        if isinstance(entry, j.LineageOpened):
            step = entry.lineage.fork_step
        elif isinstance(entry, j.GenerationEnded | j.CheckpointCommitted):
            step = max(step, entry.step)
    return step


@contextlib.asynccontextmanager
async def serving(paths: RunPaths) -> AsyncIterator[Address]:
    """Serves a run's archive until the end of the `with`. Raises what `Archive` raises."""
    archive = await asyncio.to_thread(Archive, paths)
    # An abstract socket: it has no file, and ends with this process.
    path = f"\0midwatch-archive-{os.getpid()}-{secrets.token_hex(8)}"
    server = await unix_serve(archive.serve, path, max_size=p.MAX_FRAME, compression=None, close_timeout=1, logger=quiet)
    try:
        leaving = asyncio.create_task(_leave(paths, archive.context.term, server.close), name="archive")
        yield Address(term=archive.context.term, url=f"unix:{path}", host=host_name(), pid=os.getpid())
    finally:
        leaving.cancel()
        server.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(server.wait_closed(), 2)
        with contextlib.suppress(OSError, sqlite3.Error):
            archive.close()


async def _leave(paths: RunPaths, term: int, close: object) -> None:
    """Closes the connections when a controller of a later term has announced itself."""
    assert callable(close)
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        address = read_address(paths.address)
        if address is not None and address.term > term:
            close()
            return


@contextlib.contextmanager
def serving_in_thread(paths: RunPaths) -> Iterator[Address]:
    """As `serving`, for a caller that has no event loop to spare."""
    found: list[Address | BaseException] = []
    ready, done = threading.Event(), threading.Event()

    async def work() -> None:
        try:
            async with serving(paths) as address:
                found.append(address)
                ready.set()
                while not done.is_set():
                    await asyncio.sleep(0.1)
        except BaseException as error:
            found.append(error)
            ready.set()

    thread = threading.Thread(target=lambda: asyncio.run(work()), name="archive", daemon=True)
    thread.start()
    ready.wait()
    try:
        if isinstance(found[0], BaseException):
            raise found[0]
        yield found[0]
    finally:
        done.set()
        thread.join(5)
