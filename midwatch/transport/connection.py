"""A connection to the controller that comes back by itself, from any machine of the run.

It reads the controller's address anew before each try, so it finds the next controller where the last one left off. On the
controller's own machine it goes over the unix socket, from any other over TCP with TLS, by the run's keys.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from websockets.exceptions import WebSocketException
from websockets.sync.client import ClientConnection, connect, unix_connect

from midwatch import protocol
from midwatch.run_directory import Address, host_name, read_address
from midwatch.transport.node_join import NodeJoin, ways_to
from midwatch.transport.tls_identity import CONTROLLER_NAME, KeysError, client_context, load_identity

log = logging.getLogger(__name__)

RETRY_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0)
HANDSHAKE_SECONDS = 5.0
REMOTE_HANDSHAKE_SECONDS = 15.0
"""TCP, TLS and WebSocket over a slow link that loses packets."""
PING_SECONDS, PONG_SECONDS = 5.0, 10.0
"""A link between nodes that is cut without a word is noticed after the two together; on either side."""


class Connection:
    """Keeps one connection to the controller, in a thread of its own.

    `hello` makes the first message of each connection; `opened` gets the answer to it, `received` every later message, both
    in the connection's thread. `refused` is called when the controller turns the hello down, and no further try is made.
    `identity` is the file of the node's keys, needed where the controller is on another machine; `joining` a way to it that holds
    while it has announced none.
    """

    def __init__(
        self,
        name: str,
        address_file: Path,
        hello: Callable[[], protocol.Message],
        opened: Callable[[protocol.Message], None],
        received: Callable[[protocol.Message], None],
        refused: Callable[[str], None],
        identity: Path | None = None,
        joining: NodeJoin | None = None,
        run: str = "",
    ) -> None:
        """`run` is the id of the run whose controller is meant; one that has announced itself for another is not spoken to."""
        self._name, self._address_file, self._identity = name, address_file, identity
        self._joining, self._run_id = joining, run
        self._hello, self._opened, self._received, self._refused = hello, opened, received, refused
        self._socket: ClientConnection | None = None
        self._way = ""
        """The address that another machine's controller was last reached at."""
        self._stopping = threading.Event()
        self.lost_since: float | None = time.monotonic()
        """When the controller was last in reach; None while it is."""
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def present(self) -> ClientConnection | None:
        """The connection there is now, to send over that one and no later one."""
        return self._socket

    def send(self, message: protocol.Message, over: ClientConnection | None = None) -> bool:
        """Sends at once, where it must be over one certain connection; False where there is none, or that one is broken."""
        connection = over or self._socket
        if connection is None:
            return False
        try:
            connection.send(protocol.encode(message))
        except (WebSocketException, OSError):
            return False
        return True

    def close(self) -> None:
        """Ends the connection and its thread."""
        self._stopping.set()
        connection = self._socket
        if connection is not None:
            with contextlib.suppress(WebSocketException, OSError):
                connection.close()
        if threading.current_thread() is not self._thread and self._thread.ident is not None:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        tries = 0
        told = ""
        while not self._stopping.is_set():
            try:
                connection = self._connect()
            except (OSError, WebSocketException, TimeoutError, protocol.ProtocolError, KeysError) as error:
                if isinstance(error, KeysError) and str(error) != told:
                    told = str(error)
                    log.error("%s: the controller cannot be reached: %s", self._name, told)
                self._stopping.wait(RETRY_SECONDS[min(tries, len(RETRY_SECONDS) - 1)])
                tries += 1
                continue
            if connection is None:
                return
            tries = 0
            try:
                while True:
                    self._received(protocol.decode(connection.recv()))
            except (OSError, WebSocketException, EOFError) as error:
                log.info("%s: connection lost: %s", self._name, error)
            except protocol.ProtocolError as error:
                log.warning("%s: the controller sent what is no message: %s", self._name, error)
            finally:
                self._socket = None
                self.lost_since = time.monotonic()
                with contextlib.suppress(WebSocketException, OSError):
                    connection.close()

    def _connect(self) -> ClientConnection | None:
        address = read_address(self._address_file)
        if address is not None and self._run_id and address.run and address.run != self._run_id:
            raise OSError("the address is another run's")
        if address is not None and _is_here(address):
            opening = self._open_local(address)
        else:
            opening = self._open_remote(ways_to(address, self._joining), address.host if address is not None else "another machine")
        connection = opening.__enter__()  # closed where the connection ends, in _run
        try:
            connection.send(protocol.encode(self._hello()))
            answer = protocol.decode(connection.recv(timeout=REMOTE_HANDSHAKE_SECONDS))
            if isinstance(answer, protocol.Refused):
                connection.close()
                self._refused(answer.reason)
                return None
            self._socket = connection
            if self._stopping.is_set():
                raise OSError("closing")
            self.lost_since = None
            self._opened(answer)
        except BaseException:
            self._socket = None
            with contextlib.suppress(WebSocketException, OSError):
                connection.close()
            raise
        return connection

    def _open_local(self, address: Address) -> ClientConnection:
        return unix_connect(
            address.url.removeprefix("unix:"),
            uri="ws://controller/",
            open_timeout=HANDSHAKE_SECONDS,
            max_size=protocol.MAX_FRAME,
            compression=None,
            ping_interval=10,
            ping_timeout=20,
            close_timeout=1,
        )

    def _open_remote(self, known: tuple[str, ...], host: str) -> ClientConnection:
        if not known:
            raise OSError("no controller")
        if self._identity is None:
            raise KeysError(f"it is on {host}, and this process has no identity to show there")
        tls = client_context(load_identity(self._identity))
        ways = sorted(known, key=lambda way: way != self._way)  # the one that worked last comes first
        for way in ways[:-1]:
            with contextlib.suppress(OSError, WebSocketException):  # TLS's and websockets' own, and those of the network
                return self._open_way(way, tls)
        return self._open_way(ways[-1], tls)

    def _open_way(self, way: str, tls: ssl.SSLContext) -> ClientConnection:
        place = urlsplit(way)
        wire = socket.create_connection((place.hostname or "", place.port or 0), REMOTE_HANDSHAKE_SECONDS)
        try:
            notice_cuts(wire)
            connection = connect(
                way,
                sock=wire,
                ssl=tls,
                server_hostname=CONTROLLER_NAME,
                proxy=None,
                open_timeout=REMOTE_HANDSHAKE_SECONDS,
                max_size=protocol.MAX_FRAME,
                compression=None,
                ping_interval=PING_SECONDS,
                ping_timeout=PONG_SECONDS,
                close_timeout=1,
            )
        except BaseException:
            wire.close()
            raise
        self._way = way
        return connection


def _is_here(address: Address) -> bool:
    """Whether the controller is reached over its unix socket: it is on this machine, and the socket ours; or there is no other way.

    Where there is no other way the host's name does not matter: a laptop's changes with its network.
    """
    if address.remote and address.host != host_name():
        return False
    try:
        status = os.stat(address.url.removeprefix("unix:"))
    except OSError:
        return not address.remote
    ours = stat.S_ISSOCK(status.st_mode) and status.st_uid in (os.getuid(), 0)
    return ours or not address.remote


def notice_cuts(wire: socket.socket) -> None:
    """Has the system break a connection on which nothing gets through, so that no send waits for a peer that is cut off."""
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * (PING_SECONDS + PONG_SECONDS)))
