"""The controller's door to other machines: TCP with TLS, open to those alone that show a key of this run.

What a stranger can cost is bounded before TLS begins: so many handshakes at once and no more, each for a few seconds, and where one
address crowds the others out its oldest makes room. Whoever has shown a key of the run is not counted among them.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import logging
import socket
import time
from asyncio import sslproto
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from websockets.asyncio.server import Server, ServerConnection
from websockets.protocol import State
from websockets.server import ServerProtocol

from launcher.controller.serving.peers import Peer, Refusals, quiet
from midwatch import protocol as p
from midwatch.recipe import Cluster
from midwatch.run_directory import host_name
from midwatch.transport import addresses
from midwatch.transport.connection import PING_SECONDS, PONG_SECONDS, notice_cuts
from midwatch.transport.tls_identity import ANY_NODE, KeysError, TlsIdentity, peer_of, server_context

log = logging.getLogger("launcher.controller")

TLS_SECONDS = 5.0
OPEN_SECONDS = 10.0
MOST_PENDING = 64
"""TLS handshakes under way."""
GRACE_SECONDS = 1.0
"""That a handshake has before it may have to make room."""
FAIR_SHARE = 8
"""Handshakes of one address that may wait for room; of more the newest is turned away at once."""
MOST_SESSIONS = 8192
"""Connections of peers that have shown a key: an agent of each node, and two of rank 0, many times over."""
BIND_SECONDS = 5.0

sslproto.SSLProtocol.max_size = 16 * 1024
"""What asyncio sets aside for each TLS connection: a record, not its 256 KiB, of which 1,024 agents would make 256 MiB."""


class ListenError(Exception):
    """The controller cannot listen; the message names the recipe's key and what to do."""


@dataclass
class Pending:
    place: str
    since: float


class Sessions(Server):
    """What websockets' connections want of their server, without its way of accepting them."""

    def __init__(self, handler: Callable[[ServerConnection], Awaitable[None]]) -> None:
        async def handle(connection: ServerConnection) -> None:
            task = asyncio.current_task()
            try:
                await handler(connection)
            finally:
                if task is not None:
                    self.handler_tasks.discard(task)

        super().__init__(_no_server, handle, quiet)
        self.serving = True

    def is_serving(self) -> bool:
        return self.serving


async def _no_server() -> asyncio.Server:
    """What websockets would await to be served by itself; this listener accepts on its own, so nobody does."""
    raise NotImplementedError  # and if somebody did, it should be heard of


class Listener:
    """Accepts, checks and hands over to `serve`, which ends when the peer has gone."""

    def __init__(
        self, identity: TlsIdentity, serve: Callable[[ServerConnection, Peer], Awaitable[None]], refusals: Refusals
    ) -> None:
        self._tls = server_context(identity)
        self._serve, self._refusals = serve, refusals
        self._sessions = Sessions(self._converse)
        self._pending: dict[asyncio.Task[None], Pending] = {}
        self._listening: list[socket.socket] = []
        self._accepting: list[asyncio.Task[None]] = []

    async def open(self, cluster: Cluster) -> tuple[str, ...]:
        """Listens; the value is the addresses to announce, the likeliest first. Raises ListenError."""
        try:
            own = addresses.address_of(cluster.interface) if cluster.interface is not None else None
        except addresses.NetworkError as error:
            raise ListenError(f"[cluster] interface: {error}") from None
        deadline = time.monotonic() + BIND_SECONDS  # the controller before may be about to let go of the port
        while True:
            try:
                listening = _bind(own, cluster.port)
                break
            except OSError as error:
                if error.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                    await asyncio.sleep(0.2)
                    continue
                way = "name another, or 0 for any free one"
                raise ListenError(f"[cluster] port: {cluster.port} cannot be listened on: {error.strerror} ({way})") from None
        listening.setblocking(False)
        self._listening.append(listening)
        self._accepting.append(asyncio.create_task(self._accept(listening), name="accept"))
        hosts = [own] if own is not None else await asyncio.to_thread(_own_addresses, cluster)
        port = listening.getsockname()[1]
        return tuple(f"wss://{f'[{host}]' if host.count(':') else host}:{port}" for host in hosts)

    async def close(self) -> None:
        """Ends all connections and waits for those who serve them."""
        self._sessions.serving = False
        tasks = [*self._accepting, *self._pending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listening in self._listening:
            listening.close()
        await asyncio.gather(*(c.close(1001) for c in list(self._sessions.all_connections)), return_exceptions=True)
        await asyncio.gather(*list(self._sessions.handler_tasks), return_exceptions=True)

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                wire, place = await loop.sock_accept(listening)
            except OSError as error:  # most likely no file handle is left
                log.error("a connection cannot be taken: %s", error.strerror)
                await asyncio.sleep(1.0)
                continue
            try:
                room = await self._room(place[0])
            except BaseException:
                wire.close()
                raise
            if not room:
                wire.close()
                continue
            task = asyncio.create_task(self._admit(wire, place[0]), name="admit")
            self._pending[task] = Pending(place[0], time.monotonic())
            await asyncio.sleep(0)  # a flood of connections must leave the others their turn

    async def _room(self, place: str) -> bool:
        """Sees to it that one more handshake may begin; False where its address has more than its share under way."""
        while len(self._pending) >= MOST_PENDING:
            crowd = collections.Counter(one.place for one in self._pending.values())
            crowd[place] += 1
            most = max(crowd.values())
            task, oldest = next((t, one) for t, one in self._pending.items() if crowd[one.place] == most)
            if time.monotonic() - oldest.since > GRACE_SECONDS:
                del self._pending[task]
                task.cancel()
            elif crowd[place] == most and most > FAIR_SHARE:
                self._refusals.note(place, "it has too many handshakes under way")
                return False
            else:
                await asyncio.sleep(0.05)
        return True

    async def _admit(self, wire: socket.socket, place: str) -> None:
        """Does the TLS handshake. Whoever comes through is in `_converse`."""
        made: list[ServerConnection] = []

        def make() -> ServerConnection:
            protocol = ServerProtocol(max_size=p.MAX_FRAME, logger=quiet)
            made.append(
                ServerConnection(
                    protocol, self._sessions, ping_interval=PING_SECONDS, ping_timeout=PONG_SECONDS, close_timeout=1, max_queue=8
                )
            )
            return made[0]

        reason = "it disconnected before it presented a key"
        try:
            notice_cuts(wire)
            await asyncio.get_running_loop().connect_accepted_socket(
                make, wire, ssl=self._tls, ssl_handshake_timeout=TLS_SECONDS, ssl_shutdown_timeout=1.0
            )
        except asyncio.CancelledError:
            reason = "it was slow to present a key while others waited"
            raise
        except (OSError, TimeoutError) as error:  # those of TLS are among them
            reason = f"it has no key of this run ({getattr(error, 'reason', None) or error.strerror or 'nothing came in time'})"
        finally:
            self._pending.pop(asyncio.current_task(), None)  # type: ignore[arg-type]  # it runs in a task
            if not made:
                wire.close()  # else it is the transport's to close
            if not (made and hasattr(made[0], "transport")) and self._sessions.serving:  # it was never handed over
                self._refusals.note(place, reason)

    async def _converse(self, connection: ServerConnection) -> None:
        """Serves one peer that has shown a key of the run."""
        place = str((connection.remote_address or ("?",))[0])
        peer: Peer | None = None
        reason = ""
        try:
            peer = _peer(connection)
            if len(self._sessions.all_connections) >= MOST_SESSIONS:
                reason = "there are too many connections"
            else:
                async with asyncio.timeout(OPEN_SECONDS):
                    await connection.handshake(server_header=None)
                if connection.protocol.state is not State.OPEN:
                    reason = "it does not speak WebSocket"
        except TimeoutError:
            reason = "it does not speak WebSocket in time"
        except (KeysError, OSError) as error:
            reason = str(error)
        if peer is None or reason:
            connection.transport.abort()
            self._refusals.note(place, reason)
            return
        self._sessions.all_connections.add(connection)
        connection.start_keepalive()
        try:
            async with connection:
                await self._serve(connection, peer)
        except Exception:
            log.exception("serving %s failed", peer.name)
        finally:
            self._sessions.all_connections.discard(connection)


def _peer(connection: ServerConnection) -> Peer:
    role, name = peer_of(connection.transport.get_extra_info("ssl_object"))
    if role != "agent":
        raise KeysError("its key is not an agent's")
    return Peer(name, commands=False, works=True, node=None if name == ANY_NODE else name)


def _bind(address: str | None, port: int) -> socket.socket:
    """Listens at an address, or at all there are."""
    if address is not None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        return socket.create_server((address, port), family=family, backlog=1024)
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", port), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=1024)


def _own_addresses(cluster: Cluster) -> list[str]:
    """Where other machines may reach this one: the address on the way to the first host, or to anywhere, then all others."""
    towards = [h.rpartition("@")[2] for h in cluster.host_names[:1]]
    found = []
    for host in (*towards, "192.0.2.1", "2001:db8::1"):  # the last two stand for anywhere: nobody has them
        with contextlib.suppress(addresses.NetworkError):
            found.append(addresses.address_towards(host, 9))
    known = addresses.addresses()
    found = [address for address in found if address in known]
    return list(dict.fromkeys([*found, *known])) or [host_name()]
