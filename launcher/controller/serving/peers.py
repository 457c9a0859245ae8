"""Who is at the other end of a connection, and the count of rejected peers."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

from launcher.controller.core.context import LiveState
from midwatch.transport.access import is_member, user_name
from shards.common.terminal import safe

log = logging.getLogger("launcher.controller")
quiet = logging.getLogger("launcher.controller.wire")
"""For what websockets says of each broken connection: it goes nowhere, for those that matter are counted here."""
quiet.addHandler(logging.NullHandler())
quiet.propagate = False

PROOF_SECONDS = 5.0
"""That a peer has to answer a ping when another wants to take its place."""


@dataclass(frozen=True)
class Peer:
    """Who it is, by the kernel's word or by the run's keys, and what it may be."""

    name: str
    """Author of its commands."""
    commands: bool
    """Whether it may be a client."""
    works: bool
    """Whether it may be an agent or a rank."""
    node: str | None = None
    """The one node that it may speak for; None: any."""


@dataclass(frozen=True)
class Roles:
    """The run's owner, and the group of its operators."""

    owner: int
    operators: int | None = None

    async def local(self, peer: socket.socket) -> Peer:
        """The process at the other end of a unix socket, by its user."""
        try:
            credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        except OSError:
            return Peer("unknown", commands=False, works=False)
        uid = struct.unpack("3i", credentials)[1]
        if uid in (self.owner, 0):
            return Peer(user_name(uid), commands=True, works=True)
        member = self.operators is not None and await asyncio.to_thread(is_member, uid, self.operators)  # it may ask a directory
        return Peer(user_name(uid), commands=member, works=False)


class Rivals:
    """Which connection speaks for what; nobody takes the place of a connection whose peer still answers."""

    def __init__(self) -> None:
        self._present: dict[Hashable, ServerConnection] = {}

    async def admit(self, what: Hashable, connection: ServerConnection) -> bool:
        """Whether the connection speaks for it from now on; False where another one does, and answers a ping."""
        while (other := self._present.get(what)) is not None:
            if await _answers(other):
                return False
            if self._present.get(what) is other:
                del self._present[what]
        self._present[what] = connection
        return True

    def left(self, what: Hashable, connection: ServerConnection) -> None:
        if self._present.get(what) is connection:
            del self._present[what]


async def _answers(connection: ServerConnection) -> bool:
    """Whether the peer at the other end answers; the connection of one that does not is ended."""
    try:
        async with asyncio.timeout(PROOF_SECONDS):
            await (await connection.ping())
        return True
    except (ConnectionClosed, TimeoutError):
        connection.transport.abort()
        return False


class Refusals:
    """Counts peers that are turned away, and tells of the first few in a while: strangers must not fill the log."""

    LINES = 10
    SPAN_SECONDS = 300.0

    def __init__(self, live: LiveState, clock: Callable[[], float] = time.monotonic) -> None:
        self._live, self._clock = live, clock
        self._since, self._lines, self._silent = float("-inf"), 0, 0

    def note(self, who: str, reason: str) -> None:
        self._live.refused_peers += 1
        now = self._clock()
        if now - self._since >= self.SPAN_SECONDS:
            if self._silent:
                log.warning("%d more peers were rejected", self._silent)
            self._since, self._lines, self._silent = now, 0, 0
        self._lines += 1
        if self._lines > self.LINES:
            self._silent += 1
            return
        told = safe(reason[:200])
        rest = "; more are only counted for a while" if self._lines == self.LINES else ""
        log.warning("a peer (%s) is rejected: %s%s", who, told, rest)
