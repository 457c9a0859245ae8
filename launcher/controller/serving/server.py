"""The controller's door: ranks, agents and clients, each known by its first message, and let in by who it is.

Who it is says the kernel, on the unix socket, or the key that it has shown, over the network. A peer that says nothing, says no
message, says too much or says what is not for it to say is closed and counted; it changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from websockets.asyncio.server import Server, ServerConnection, unix_serve
from websockets.exceptions import ConnectionClosed

from launcher.controller.annotation.desk import Preferring
from launcher.controller.commands.clients import Clients
from launcher.controller.commands.command_queue import Dispatch
from launcher.controller.commands.rank_reports import Reports
from launcher.controller.core.context import ControllerContext
from launcher.controller.core.queries import Queries
from launcher.controller.core.snapshot import SnapshotBuilder
from launcher.controller.probe.sessions import Probing
from launcher.controller.serving.peers import Peer, Refusals, Rivals, Roles, quiet
from launcher.controller.supervision.generations import Generations
from midwatch import protocol as p
from midwatch.journal.journal import Ousted
from midwatch.transport.access import group_id, user_name

log = logging.getLogger("launcher.controller")

HELLO_SECONDS = 10.0
SYNC_SECONDS = 0.2
"""Longest that a row waits to be made durable."""
MOST_WAITING = 256
"""Connections on the unix socket that have not said yet who they are."""
MOST_CLIENTS = 256
MISBEHAVIOUR = (1002, 1003, 1007, 1009)
"""Codes with which WebSocket ends a connection whose peer breaks its rules: a frame too large is one."""


class Unwelcome(Exception):
    """The peer may not do what it wants; the message tells it why."""


class ConnectionServer:
    """Serves every kind of peer."""

    def __init__(
        self,
        context: ControllerContext,
        dispatch: Dispatch,
        generations: Generations,
        reports: Reports,
        view: SnapshotBuilder,
        queries: Queries,
        probing: Probing,
        preferring: Preferring,
    ) -> None:
        self._senders: dict[ServerConnection, asyncio.Task[None]] = {}
        """What sends for each connection."""
        self._context, self._dispatch, self._generations = context, dispatch, generations
        self._reports = reports
        self._clients = Clients(context, dispatch, view, queries, probing, preferring)
        group = context.recipe.cluster.operators
        self._operators = group_id(group, str(context.paths.recipe)) if group is not None else None
        self._roles = Roles(os.getuid(), self._operators)
        self.refusals = Refusals(context.live)
        self._rivals = Rivals()
        self._waiting = 0
        self.publish = self._clients.publish

    @property
    def clients(self) -> int:
        return self._clients.count

    async def listen(self, path: Path) -> Server:
        path.unlink(missing_ok=True)
        server = await unix_serve(
            self._serve_local,
            str(path),
            max_size=p.MAX_FRAME,
            compression=None,
            ping_interval=10,
            ping_timeout=30,
            open_timeout=5,
            close_timeout=1,
            logger=quiet,
        )
        if self._operators is not None:
            os.chown(path, -1, self._operators)
        os.chmod(path, 0o600 if self._operators is None else 0o660)
        return server

    async def _serve_local(self, connection: ServerConnection) -> None:
        peer = await self._roles.local(connection.transport.get_extra_info("socket"))
        try:
            await self.serve(connection, peer)
        except Exception:
            log.exception("serving a peer failed")

    async def serve(self, connection: ServerConnection, peer: Peer) -> None:
        """Talks with one peer until it leaves or is rejected."""
        if self._context.directory.missing():
            return  # a moment out of sight, or the end of this controller: either way the peer comes again
        try:
            hello = await self._hello(connection, peer)
            if isinstance(hello, p.ClientHello):
                await self._serve_client(connection, hello, peer)
            elif not isinstance(hello, p.RankHello | p.AgentHello):
                raise p.ProtocolError(f"a {type(hello).__name__} is not a hello")
            elif not peer.works:
                raise Unwelcome(f"you are {peer.name}; agents and ranks of this run are {user_name(self._roles.owner)}'s alone")
            elif isinstance(hello, p.RankHello):
                await self._serve_rank(connection, hello, peer)
            elif peer.node is not None and hello.node != peer.node:
                raise Unwelcome(f"this key is of the node {peer.node}, not of {hello.node}")
            else:
                await self._serve_agent(connection, hello)
        except ConnectionClosed as error:
            if error.sent is not None and error.sent.code in MISBEHAVIOUR and not error.rcvd_then_sent:
                self.refusals.note(peer.name, error.sent.reason or "it violates the WebSocket protocol")
        except (p.ProtocolError, TimeoutError, Unwelcome) as error:
            reason = str(error) if isinstance(error, Unwelcome) else f"not understood: {error or 'nothing was said'}"
            self.refusals.note(peer.name, reason)
            with contextlib.suppress(ConnectionClosed):
                await connection.send(p.encode(p.Refused(reason=reason)))
        except Ousted:
            self._context.over.set()
        except OSError as error:
            log.warning("a peer's message could not be stored: %s", error)

    async def _hello(self, connection: ServerConnection, peer: Peer) -> p.Message:
        """The first message, waited for only so long and for only so many: whoever has shown a key is not included."""
        if peer.node is not None:
            return p.decode(await asyncio.wait_for(connection.recv(), HELLO_SECONDS))
        if self._waiting >= MOST_WAITING:
            raise Unwelcome("too many connections have not sent their hello yet; try again")
        self._waiting += 1
        try:
            frame = await asyncio.wait_for(connection.recv(), HELLO_SECONDS)
        finally:
            self._waiting -= 1
        if not peer.commands and not peer.works:  # told only now: who is closed while it still speaks does not hear why
            group = self._context.recipe.cluster.operators
            members = f", and members of the group {group}" if group is not None else ""
            raise Unwelcome(f"you are {peer.name}; this run is for {user_name(self._roles.owner)}{members}")
        return p.decode(frame)

    async def _serve_client(self, connection: ServerConnection, hello: p.ClientHello, peer: Peer) -> None:
        if not peer.commands:
            raise Unwelcome("clients come over the unix socket, or from elsewhere with ssh://HOST/RUN")
        if self.clients >= MOST_CLIENTS:
            raise Unwelcome(f"{MOST_CLIENTS} clients are connected already; close some")
        await self._clients.serve(connection, hello, peer.name)

    def _sender(self, connection: ServerConnection) -> Callable[[p.Message], None]:
        """Sends in the background, in order; a connection that breaks loses the rest."""
        outbox: asyncio.Queue[bytes] = asyncio.Queue()

        async def work() -> None:
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await connection.send(await outbox.get())

        task = asyncio.create_task(work())
        self._senders[connection] = task
        return lambda message: outbox.put_nowait(p.encode(message))

    # Ranks

    async def _serve_rank(self, connection: ServerConnection, hello: p.RankHello, peer: Peer) -> None:
        """Talks with rank 0, which is on the first node of the living generation and connected once a channel."""
        ledger = self._context.ledger
        problem = ""
        if hello.version != p.VERSION:
            problem = f"version {hello.version} of the protocol, {p.VERSION} is spoken here"
        elif hello.run != self._context.run:
            problem = "another run's rank"
        elif hello.generation != ledger.generation or not ledger.generation_live:
            problem = f"generation {hello.generation} is over"
        if problem:
            await connection.send(p.encode(p.Refused(reason=problem)))
            return
        first = ledger.generation_nodes[0]
        if peer.node not in (None, first):
            raise Unwelcome(f"rank 0 of generation {hello.generation} is on {first}, and this key is of the node {peer.node}")
        place = (hello.generation, hello.channel)
        if not await self._rivals.admit(place, connection):
            raise Unwelcome(f"rank 0 of generation {hello.generation} is connected already, and answers")
        try:
            await self._talk_with_rank(connection, hello)
        finally:
            self._rivals.left(place, connection)

    async def _talk_with_rank(self, connection: ServerConnection, hello: p.RankHello) -> None:
        control = hello.channel == "control"
        source = f"{hello.generation}/{hello.channel}"
        acknowledged = self._reports.acknowledged() if control else 0
        await connection.send(
            p.encode(p.RankWelcome(term=self._context.term, acknowledged=acknowledged, hold=self._dispatch.holding))
        )
        send = self._sender(connection)
        if control:
            self._dispatch.rank_came(send)
        try:
            await (
                self._take_control(connection, hello, send) if control else self._take_telemetry(connection, hello, source, send)
            )
        finally:
            if control:
                self._dispatch.rank_went(send)
            self._senders.pop(connection).cancel()

    async def _take_control(self, connection: ServerConnection, hello: p.RankHello, send: Callable[[p.Message], None]) -> None:
        async for frame in connection:
            message = p.decode(frame)
            if not isinstance(message, p.Numbered):
                raise p.ProtocolError(f"a rank may not send a {type(message).__name__}")
            if hello.generation != self._context.ledger.generation:
                raise p.ProtocolError(f"generation {hello.generation} is over")
            if isinstance(message.body, p.CheckpointReady):
                await self._reports.rows_stored(message.body)
                if hello.generation != self._context.ledger.generation:  # the next one has begun meanwhile
                    raise p.ProtocolError(f"generation {hello.generation} is over")
            self._reports.control(message, send)

    async def _take_telemetry(
        self, connection: ServerConnection, hello: p.RankHello, source: str, send: Callable[[p.Message], None]
    ) -> None:
        """Rows are acknowledged in batches, once they would survive a loss of power."""
        last, synced, due = 0, 0, 0.0
        while True:
            try:
                wait = max(0.0, due - time.monotonic()) if last > synced else None
                message = p.decode(await asyncio.wait_for(connection.recv(), wait))
            except TimeoutError:
                await asyncio.to_thread(self._context.sync)
                synced = last
                send(p.Ack(number=synced))
                continue
            if not isinstance(message, p.Numbered):
                raise p.ProtocolError(f"a rank may not send a {type(message).__name__}")
            if hello.generation != self._context.ledger.generation:
                raise p.ProtocolError(f"generation {hello.generation} is over")
            self._reports.metrics(source, message)
            if last == synced:
                due = time.monotonic() + SYNC_SECONDS
            last = message.number

    # Agents

    async def _serve_agent(self, connection: ServerConnection, hello: p.AgentHello) -> None:
        rival = False
        if hello.version != p.VERSION or hello.run != self._context.run:
            reason = (
                "another run's agent"
                if hello.version == p.VERSION
                else (
                    f"an agent of another version of Midwatch (its protocol is {hello.version}, and {p.VERSION} here); "
                    "install the same version on the node"
                )
            )
        elif not await self._rivals.admit(hello.node, connection):
            address = self._generations.address(hello.node)
            reason = f"the node {hello.node} has an agent already, at {address}; give each its own name (--node)"
            rival = True
        else:
            reason = ""
        if reason:
            if hello.run == self._context.run and not rival:
                self._generations.agent_refused(hello.node, reason)
            await connection.send(p.encode(p.Refused(reason=reason)))
            return
        try:
            await self._talk_with_agent(connection, hello)
        finally:
            self._rivals.left(hello.node, connection)

    async def _talk_with_agent(self, connection: ServerConnection, hello: p.AgentHello) -> None:
        await connection.send(p.encode(p.AgentWelcome(term=self._context.term)))
        send = self._sender(connection)
        self._generations.agent_came(hello, send)
        try:
            async for frame in connection:
                self._generations.agent_told(hello.node, p.decode(frame))
        finally:
            self._generations.agent_went(hello.node, send)
            self._senders.pop(connection).cancel()
