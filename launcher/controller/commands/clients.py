"""The controller's clients: screens, the command line and reporters, which watch, ask, command and talk to checkpoints.

Each screen has one slot for the newest snapshot, so one that does not read costs neither memory nor anybody's time.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from launcher.controller.annotation.desk import Preferring, Question
from launcher.controller.commands.command_queue import Dispatch
from launcher.controller.core.context import ControllerContext
from launcher.controller.core.events import CommandEnded
from launcher.controller.core.queries import Queries
from launcher.controller.core.snapshot import SnapshotBuilder
from launcher.controller.probe.sessions import Probing
from midwatch import protocol as p
from midwatch.journal import entries as j
from midwatch.journal.journal import JournalError, Ousted

log = logging.getLogger("launcher.controller")

SNAPSHOT_SECONDS = 0.2
"""Between two snapshots, or longer where they are large:"""
SNAPSHOT_RATE = 4e6
"""Bytes a second that a screen is sent; a thousand nodes of eight GPUs are 3.5 MB, and speak once a second."""

MOST_UNREAD = 4096
"""Messages of the probe that wait for a client; one that is further behind gets no more of that answer."""


class Clients:
    """Serves every client there is."""

    def __init__(
        self,
        context: ControllerContext,
        dispatch: Dispatch,
        view: SnapshotBuilder,
        queries: Queries,
        probing: Probing,
        preferring: Preferring,
    ) -> None:
        self._context, self._dispatch, self._view, self._queries = context, dispatch, view, queries
        self._probing, self._preferring = probing, preferring
        self._screens: dict[ServerConnection, asyncio.Event] = {}
        self._frame = b""
        self.count = 0
        self._waiting: dict[int, list[asyncio.Future[None]]] = {}
        context.events.subscribe(CommandEnded, lambda event: self._command_ended(event.entry))

    async def publish(self) -> None:
        """Draws up a snapshot whenever something has changed, and hands it to the screens."""
        while True:
            await self._context.changed.wait()
            self._context.changed.clear()
            if self._screens:
                try:
                    self._frame = p.encode(self._view.snapshot())
                except Exception:  # a picture that cannot be drawn must not end the controller
                    log.exception("the snapshot cannot be built")
                for event in self._screens.values():
                    event.set()
            await asyncio.sleep(max(SNAPSHOT_SECONDS, len(self._frame) / SNAPSHOT_RATE if self._screens else 0.0))

    async def serve(self, connection: ServerConnection, hello: p.ClientHello, author: str) -> None:
        """Talks with one client until it leaves; `author` is who its commands are of."""
        if hello.version != p.VERSION:
            reason = f"this controller speaks version {p.VERSION} of the protocol, you {hello.version}; use the same Midwatch"
            await connection.send(p.encode(p.Refused(reason=reason)))
            return
        context = self._context
        welcome = p.ClientWelcome(term=context.term, run=context.recipe.run.name, directory=str(context.paths.root), author=author)
        await connection.send(p.encode(welcome))
        pusher = asyncio.create_task(self._push(connection)) if hello.subscribe else None
        answers: asyncio.Queue[p.ProbeAnswer] = asyncio.Queue()
        answerer = asyncio.create_task(_hand_on(answers, connection))
        commands: set[asyncio.Task[None]] = set()
        self.count += 1
        try:
            async for frame in connection:
                message = p.decode(frame)
                if isinstance(message, p.Command):
                    if hello.read_only:
                        refused = refused_command(message, author, context.clock(), "this client is read-only")
                        await connection.send(p.encode(p.CommandReply(command=refused)))
                        continue
                    task = asyncio.create_task(self._command(connection, message, author))
                    commands.add(task)
                    task.add_done_callback(commands.discard)
                elif isinstance(message, p.ProbeAsk):
                    await self._probing.ask(connection, message, functools.partial(_put, answers))
                elif isinstance(message, p.ProbeStop):
                    self._probing.stop(connection, message.ask)
                elif isinstance(message, Question):
                    task = asyncio.create_task(self._prefer(connection, message, author, hello.read_only))
                    commands.add(task)
                    task.add_done_callback(commands.discard)
                else:
                    await connection.send(p.encode(await self._queries.answer(message)))
        finally:
            self.count -= 1
            self._probing.left(connection)
            self._preferring.left(connection)
            for task in [*commands, answerer, *([pusher] if pusher else [])]:
                task.cancel()
            self._screens.pop(connection, None)

    async def _push(self, connection: ServerConnection) -> None:
        event = self._screens[connection] = asyncio.Event()
        with contextlib.suppress(ConnectionClosed):
            await connection.send(p.encode(self._view.snapshot()))
            while True:
                await event.wait()
                event.clear()
                await connection.send(self._frame)

    async def _prefer(self, connection: ServerConnection, question: Question, author: str, read_only: bool) -> None:
        reply = await self._preferring.answer(connection, question, author, read_only=read_only)
        with contextlib.suppress(ConnectionClosed):
            await connection.send(p.encode(reply))

    async def _command(self, connection: ServerConnection, command: p.Command, author: str) -> None:
        context = self._context
        try:
            if missing := context.directory.missing():
                raise JournalError(missing)
            view = context.as_durable(self._dispatch.accept(command, author))
        except Ousted:
            context.over.set()
            return
        except JournalError as error:
            view = refused_command(command, author, context.clock(), str(error))
        if command.wait and view.state in ("queued", "sent"):
            future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiting.setdefault(view.number, []).append(future)
            await future
            view = context.ledger.commands[view.number]
        with contextlib.suppress(ConnectionClosed):
            await connection.send(p.encode(p.CommandReply(command=view)))

    def _command_ended(self, entry: j.CommandEnded) -> None:
        for future in self._waiting.pop(entry.number, []):
            if not future.done():
                future.set_result(None)


def _put(answers: asyncio.Queue[p.ProbeAnswer], answer: p.ProbeAnswer) -> bool:
    """An end is always kept; of the rest what there is room for."""
    room = answers.qsize() < MOST_UNREAD
    if room or isinstance(answer, p.ProbeEnd):
        answers.put_nowait(answer)
    return room


async def _hand_on(answers: asyncio.Queue[p.ProbeAnswer], connection: ServerConnection) -> None:
    with contextlib.suppress(ConnectionClosed):
        while True:
            await connection.send(p.encode(await answers.get()))


def refused_command(command: p.Command, author: str, now: float, reason: str) -> p.CommandView:
    """The answer to a command that was not even taken in."""
    return p.CommandView(
        id=command.id,
        number=0,
        verb=command.verb,
        arguments=command.arguments,
        author=author,
        time=now,
        state="refused",
        reason=reason,
    )
