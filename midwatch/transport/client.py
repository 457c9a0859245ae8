"""A client of a run's controller: snapshots as they come, questions, commands; for the screen, the reporter and the command line.

It finds the controller through the run directory, or through ssh where the run is on another machine, starts one where none lives
(if asked to), and comes back by itself when the connection breaks. Commands carry an id of the client's, so a command repeated
after a lost answer takes effect once.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from websockets.asyncio.client import ClientConnection, unix_connect
from websockets.exceptions import WebSocketException

from midwatch import protocol
from midwatch.journal.journal import JournalError
from midwatch.recipe import RecipeError
from midwatch.run_directory import Address, RunPaths, controller_lives, read_own_address
from midwatch.transport.discovery import UNREACHABLE, Looks, Starting, other_owner, reach_controller, shows_files, start_controller
from midwatch.transport.discovery import ClientError as ClientError
from midwatch.transport.ssh_url import RemoteError, RemoteRun, SshWay

RESTART_SECONDS = 5.0
"""Between two tries to start a controller where the last one did not live."""

REMOTE_RETRY_SECONDS = (0.5, 1.0, 2.0, 5.0)
"""Between two logins where the connection has broken."""

FROM_FILES = (
    protocol.ChartQuery,
    protocol.MetricsQuery,
    protocol.JournalQuery,
    protocol.LogQuery,
    protocol.UndoQuery,
    protocol.SampleQuery,
    protocol.TextQuery,
)
"""Questions that the run's files answer; all others need a controller."""
BROKE = "the connection to the controller broke"

Reply = TypeVar("Reply", bound=protocol.Message)


class LostError(ClientError):
    """Nobody has refused: the controller was not reached, or its answer did not come."""


class Client:
    """One client; use as `async with Client(...) as client`.

    `on_snapshot` and `on_link` (True: connected, False: lost) are called in the event loop. `prompts`: whether ssh may ask the
    operator something at the terminal. `looks`: whether a run without a controller is shown from its files; for what only a
    controller can do one is started then, and this client goes over to it. `resumes`: a copy of a live run may
    become a run of its own.
    """

    def __init__(
        self,
        run: Path | RemoteRun,
        *,
        subscribe: bool = False,
        read_only: bool = False,
        start: bool = False,
        looks: Looks = "never",
        resumes: bool = False,
        prompts: bool = True,
        on_snapshot: Callable[[protocol.Snapshot], None] | None = None,
        on_link: Callable[[bool], None] | None = None,
    ) -> None:
        self.run = run
        self._ssh = SshWay(run, prompts=prompts, looks=looks) if isinstance(run, RemoteRun) else None
        self.welcome: protocol.ClientWelcome | None = None
        self.snapshot: protocol.Snapshot | None = None
        self._hello = protocol.ClientHello(version=protocol.VERSION, read_only=read_only, subscribe=subscribe)
        self._start, self._looks, self._resumes = start, looks, resumes
        self._archive = contextlib.AsyncExitStack()
        """Serves the run's files while no controller does."""
        self.trouble = ""
        """Why the last try to come back over ssh has failed."""
        self._problem = ""
        """Why no controller could be started, as far as that is known."""
        self._on_snapshot, self._on_link = on_snapshot, on_link
        self._connection: ClientConnection | None = None
        self._connected = asyncio.Event()
        self._losses = 0
        """How often the connection has broken."""
        self._numbers = itertools.count(1)
        self._questions: dict[int, asyncio.Future[protocol.Message]] = {}
        self._commands: dict[str, asyncio.Future[protocol.CommandView]] = {}
        self._probes: dict[int, tuple[asyncio.Queue[protocol.ProbeAnswer], dict[int, str]]] = {}
        """Of each ask what has been answered, and the checkpoints whose answers have not ended."""
        self._keeper: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Client:
        """Raises ClientError if there is no run or no controller."""
        try:
            if isinstance(self.run, RemoteRun):
                self._connection = await self._connect_remote()
            else:
                paths = RunPaths(self.run)
                found = await reach_controller(paths, self._connect, start=self._start, looks=self._looks, resumes=self._resumes)
                self._connection = found or await self._connect_archive(paths)
        except BaseException:
            await self._close_ssh()
            raise
        self._connected.set()
        self._keeper = asyncio.create_task(self._keep(), name="client")
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._keeper
        if self._connection is not None:
            await self._connection.close()
        await self._close_ssh()
        await self._archive.aclose()

    async def _close_ssh(self) -> None:
        if self._ssh is not None:
            await self._ssh.close()

    async def ask(self, question: Any, expect: type[Reply], timeout: float = 30.0) -> Reply:
        """Sends a query, whose id is set here, and waits for the answer. Raises ClientError if refused or out of reach."""
        if not isinstance(question, FROM_FILES):
            await self._wake_controller()
        number = next(self._numbers)
        future: asyncio.Future[protocol.Message] = asyncio.get_running_loop().create_future()
        self._questions[number] = future
        try:
            await self._send(msgspec.structs.replace(question, id=number))
            answer = await asyncio.wait_for(future, timeout)
        except TimeoutError:
            raise LostError("the controller does not answer") from None
        finally:
            self._questions.pop(number, None)
        if isinstance(answer, protocol.Refused):
            raise LostError(answer.reason) if answer.reason == BROKE else ClientError(answer.reason)
        if not isinstance(answer, expect):
            raise ClientError(f"the controller answered with a {type(answer).__name__}")
        return answer

    async def command(
        self, verb: protocol.Verb, arguments: dict[str, Any] | None = None, *, wait: bool = True, timeout: float | None = None
    ) -> protocol.CommandView:
        """Gives a command and waits until it has ended, or, without `wait`, until it is accepted or refused.

        Sent again, under the same id, after a reconnect. Raises ClientError when the time is up.
        """
        await self._wake_controller()
        command = protocol.Command(id=uuid.uuid4().hex, verb=verb, arguments=arguments or {}, wait=wait)
        future: asyncio.Future[protocol.CommandView] = asyncio.get_running_loop().create_future()
        self._commands[command.id] = future
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            while True:
                lost = asyncio.create_task(self._lost(self._losses))
                try:
                    await self._send(command)
                except BaseException:
                    lost.cancel()
                    raise
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                waiting: list[asyncio.Future[Any]] = [future, lost]
                await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
                broken = lost.done()
                lost.cancel()
                if future.done():
                    return future.result()
                if not broken:
                    raise ClientError(f"{verb}: no outcome after {timeout:g} s; it may still come (midwatch status shows it)")
        finally:
            self._commands.pop(command.id, None)

    async def probe(self, ask: protocol.ProbeAsk) -> AsyncGenerator[protocol.ProbeAnswer]:
        """Sends an ask, whose number is set here, and gives what is answered until every checkpoint's answer has ended.

        Left before that, it is stopped. Where the connection breaks the answers end with that as their problem. Raises
        ClientError where the controller is out of reach.
        """
        await self._wake_controller()
        number = next(self._numbers)
        answers: asyncio.Queue[protocol.ProbeAnswer] = asyncio.Queue()
        left = dict(enumerate(ask.checkpoints))
        self._probes[number] = answers, left
        try:
            await self._send(msgspec.structs.replace(ask, ask=number))
            while left:
                answer = await answers.get()
                if isinstance(answer, protocol.ProbeEnd):
                    left.pop(answer.which, None)
                yield answer
        finally:
            del self._probes[number]
            if left and self._connection is not None:
                with contextlib.suppress(WebSocketException, OSError):
                    await self._connection.send(protocol.encode(protocol.ProbeStop(ask=number)))

    async def _lost(self, losses: int) -> None:
        """Returns when the connection has broken once more, even if it is back already."""
        while self._losses == losses:
            await asyncio.sleep(0.1)

    async def _send(self, message: protocol.Message) -> None:
        frame = protocol.encode(message)
        for _ in range(3):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._connected.wait(), 20)
            if self._connection is None:
                continue
            try:
                await self._connection.send(frame)
                return
            except (WebSocketException, OSError):
                await asyncio.sleep(0.1)
        raise LostError(self._problem or "the controller is out of reach")

    async def _wake_controller(self) -> None:
        """Goes over from the run's files to a controller, which is started."""
        if self.welcome is None or not self.welcome.archived:
            return
        if self._hello.read_only:
            raise ClientError("no controller is running, and a read-only client starts none")
        self._start, self._looks, self._problem = True, "never", ""
        if self._ssh is not None:
            self._ssh.looks = "never"
        connection, self.welcome = self._connection, None
        self._connected.clear()
        if connection is not None:
            await connection.close()

    async def _connect_remote(self) -> ClientConnection:
        assert self._ssh is not None
        try:
            return await self._greet(await self._ssh.connect())
        except RemoteError as error:
            raise ClientError(str(error)) from None
        except (OSError, WebSocketException, TimeoutError, EOFError, protocol.ProtocolError) as error:
            raise ClientError(f"{self.run}: the connection broke at once: {error}") from None

    async def _connect_archive(self, paths: RunPaths) -> ClientConnection:
        """To the run's files. Raises ClientError where they cannot be read."""
        await self._archive.aclose()
        try:
            return await self._connect(await self._archive.enter_async_context(_archive(paths)))
        except (RecipeError, JournalError, OSError) as error:
            raise ClientError(str(error)) from None

    async def _connect(self, address: Address) -> ClientConnection:
        connection = await unix_connect(
            address.url.removeprefix("unix:"),
            uri="ws://controller/",
            max_size=protocol.MAX_FRAME,
            open_timeout=5,
            close_timeout=1,
            compression=None,
        )
        return await self._greet(connection)

    async def _greet(self, connection: ClientConnection) -> ClientConnection:
        try:
            await connection.send(protocol.encode(self._hello))
            answer = protocol.decode(await asyncio.wait_for(connection.recv(), 20 if self._ssh is not None else 5))
        except BaseException:
            await connection.close()
            raise
        if isinstance(answer, protocol.Refused):
            raise ClientError(answer.reason)
        if isinstance(answer, protocol.ClientWelcome):
            self.welcome = answer
        return connection

    async def _keep(self) -> None:
        while True:
            connection = self._connection
            assert connection is not None
            if self._on_link is not None:
                self._on_link(True)
            with contextlib.suppress(WebSocketException, OSError, protocol.ProtocolError):
                async for frame in connection:
                    self._take(protocol.decode(frame))
            self._losses += 1
            self._connected.clear()
            await connection.close()
            if self._on_link is not None:
                self._on_link(False)
            for question in self._questions.values():
                if not question.done():
                    question.set_result(protocol.Refused(reason=BROKE))
            for number, (answers, left) in self._probes.items():
                for which, name in left.items():
                    end = protocol.ProbeEnd(ask=number, which=which, checkpoint=name, finish="failed", problem=BROKE)
                    answers.put_nowait(end)
            self._connection = await self._connect_again()
            self._connected.set()

    async def _connect_again(self) -> ClientConnection:
        """Tries until a controller answers, and starts one where the last has died, if this client may."""
        self._connection = None
        if isinstance(self.run, RemoteRun):
            return await self._connect_remote_again()
        paths = RunPaths(self.run)
        started: Starting | None = None
        next_start = 0.0
        while True:
            address = read_own_address(paths)
            with contextlib.suppress(*UNREACHABLE, ClientError):
                if address is not None:
                    return await self._connect(address)
            starting = started is not None and started.process.poll() is None
            if started is not None and started.has_failed():
                self._problem = started.failure()
            due = not starting and time.monotonic() >= next_start and paths.is_run()
            with contextlib.suppress(ClientError):
                due = due and not await asyncio.to_thread(controller_lives, paths, write=self._looks == "never")
                if due and await asyncio.to_thread(shows_files, paths, self._looks):
                    return await self._connect_archive(paths)
                if due and self._start and other_owner(paths) is None:
                    started = start_controller(paths.root)
                    next_start = time.monotonic() + RESTART_SECONDS
            await asyncio.sleep(0.5)

    async def _connect_remote_again(self) -> ClientConnection:
        for tries in itertools.count():
            try:
                found = await self._connect_remote()
            except ClientError as error:
                self.trouble = str(error)
            else:
                self.trouble = ""
                return found
            await asyncio.sleep(REMOTE_RETRY_SECONDS[min(tries, len(REMOTE_RETRY_SECONDS) - 1)])
        raise AssertionError

    def _take(self, message: protocol.Message) -> None:
        if isinstance(message, protocol.Snapshot):
            self.snapshot = message
            if self._on_snapshot is not None:
                self._on_snapshot(message)
        elif isinstance(message, protocol.ProbeBegan | protocol.ProbeToken | protocol.ProbeEnd):
            if message.ask in self._probes:
                self._probes[message.ask][0].put_nowait(message)
        elif isinstance(message, protocol.CommandReply):
            waiting = self._commands.get(message.command.id)
            if waiting is not None and not waiting.done():
                waiting.set_result(message.command)
        else:
            question = self._questions.get(getattr(message, "id", 0))
            if question is not None and not question.done():
                question.set_result(message)


def _archive(paths: RunPaths) -> AbstractAsyncContextManager[Address]:
    """A server that shows the run from its files. Raises ClientError where this installation has none."""
    for entry in entry_points(group="midwatch.archive"):
        serving: Callable[[RunPaths], AbstractAsyncContextManager[Address]] = entry.load()
        return serving(paths)
    raise ClientError(f"{paths.root}: no controller is running, and this installation cannot read a run's files (install midwatch)")
