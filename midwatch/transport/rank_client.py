"""A rank's numbered reports to the controller, and the controller's orders to it.

What a rank sends is numbered and kept until acknowledged: a resend after a reconnect changes nothing. Telemetry and control go over
connections of their own; telemetry has a bounded spool, whose oldest rows are dropped and counted.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
from websockets.sync.client import ClientConnection

from midwatch import protocol
from midwatch.transport.connection import Connection as Connection

log = logging.getLogger(__name__)

IDENTITY_VARIABLE = "MIDWATCH_IDENTITY"
"""Names the file, in the user's runtime directory, that holds the node's identity; set by the agent for its ranks."""


class Spool:
    """Numbered messages kept until acknowledged, sent in order over a connection by a thread of its own.

    With a `room`, the oldest of more than that many are dropped and counted; without, none ever is.
    """

    def __init__(
        self,
        name: str,
        address_file: Path,
        hello: Callable[[], protocol.Message],
        received: Callable[[protocol.Message], None],
        refused: Callable[[str], None],
        room: int | None = None,
        gather_seconds: float = 0.0,
        identity: Path | None = None,
        run: str = "",
    ) -> None:
        self._room, self._gather = room, gather_seconds
        self._kept: collections.deque[protocol.Numbered] = collections.deque()
        self._sent = 0
        """How many of those kept are sent on the present connection."""
        self._next = 1
        self._dropped = 0
        self._over: ClientConnection | None = None
        """The connection that what is kept goes over; None while there is none."""
        self._closing = False
        self._changed = threading.Condition()
        self._handle = received
        self.connection = Connection(name, address_file, hello, self._welcomed, self._received, refused, identity, run=run)
        self._thread = threading.Thread(target=self._run, name=f"{name}-send", daemon=True)

    def start(self) -> None:
        self.connection.start()
        self._thread.start()

    def put(self, body: protocol.RankBody) -> None:
        """Takes a message; never waits for the connection."""
        with self._changed:
            if self._room is not None and len(self._kept) >= self._room:
                self._kept.popleft()
                self._sent = max(0, self._sent - 1)
                self._dropped += 1
            elif self._dropped and self._over is not None:
                self._append(protocol.Dropped(count=self._dropped))
                self._dropped = 0
            self._append(body)
            self._changed.notify_all()

    def flush(self, timeout: float) -> bool:
        """Waits until all is acknowledged; whether it was in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._kept, timeout)

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self.connection.close()
        self._thread.join(timeout=5)

    def _append(self, body: protocol.RankBody) -> None:
        self._kept.append(protocol.Numbered(number=self._next, body=body))
        self._next += 1

    def _acknowledge(self, number: int) -> None:
        while self._kept and self._kept[0].number <= number:
            self._kept.popleft()
            self._sent = max(0, self._sent - 1)

    def _welcomed(self, answer: protocol.Message) -> None:
        with self._changed:
            self._sent = 0
            if isinstance(answer, protocol.RankWelcome):
                self._acknowledge(answer.acknowledged)
                self._handle(answer)
            self._over = self.connection.present
            self._changed.notify_all()

    def _received(self, message: protocol.Message) -> None:
        if isinstance(message, protocol.Ack):
            with self._changed:
                self._acknowledge(message.number)
                self._changed.notify_all()
        else:
            self._handle(message)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closing or (self._over is not None and self._sent < len(self._kept)))
                if self._closing:
                    return
                over = self._over
                batch = [self._kept[i] for i in range(self._sent, min(len(self._kept), self._sent + 256))]
                self._sent += len(batch)
            for message in batch:
                if not self.connection.send(message, over):
                    with self._changed:
                        if self._over is over:  # else it is another one already, and all is to be sent again
                            self._over = None
                    break
            if self._gather:
                time.sleep(self._gather)


class RankLink:
    """Rank 0's way to the controller: reports out, orders in."""

    TELEMETRY_ROOM = 20_000
    """Rows and samples kept while the controller is out of reach: hours of steps, some ten megabytes (samples: more)."""

    def __init__(
        self,
        address_file: Path,
        hello: protocol.RankHello,
        refused: Callable[[str], None] | None = None,
        identity: Path | None = None,
    ) -> None:
        """The `identity` is by default the one that the node's agent has named in the environment."""
        if identity is None and os.environ.get(IDENTITY_VARIABLE):
            identity = Path(os.environ[IDENTITY_VARIABLE])
        self._orders: queue.SimpleQueue[protocol.Order] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[protocol.Committed | protocol.CommitRefused] = queue.SimpleQueue()
        self._held = False
        end = refused or _leave
        self._control = Spool("link-control", address_file, lambda: hello, self._received, end, identity=identity, run=hello.run)
        telemetry = msgspec.structs.replace(hello, channel="telemetry")
        self._telemetry = Spool(
            "link-telemetry",
            address_file,
            lambda: telemetry,
            self._received_beside,
            end,
            room=self.TELEMETRY_ROOM,
            gather_seconds=0.05,
            identity=identity,
            run=hello.run,
        )
        self._control.start()
        self._telemetry.start()

    def send(self, body: protocol.RankBody) -> None:
        """Reports; never blocks. Metrics and samples of rollouts may be dropped while the controller is away, nothing else is."""
        many = isinstance(body, protocol.Metrics) or (isinstance(body, protocol.Sampled) and body.reward is not None)
        (self._telemetry if many else self._control).put(body)

    def next_order(self) -> protocol.Order | None:
        with contextlib.suppress(queue.Empty):
            return self._orders.get_nowait()
        return None

    def next_answer(self) -> protocol.Committed | protocol.CommitRefused | None:
        """What the controller made of a checkpoint that was ready."""
        with contextlib.suppress(queue.Empty):
            return self._answers.get_nowait()
        return None

    def flush(self, timeout: float) -> bool:
        """Waits until everything sent is stored by the controller; whether it was in time."""
        end = time.monotonic() + timeout
        return self._control.flush(timeout) and self._telemetry.flush(max(0.0, end - time.monotonic()))

    def close(self) -> None:
        self._control.close()
        self._telemetry.close()

    def _received(self, message: protocol.Message) -> None:
        if isinstance(message, protocol.Order):
            self._orders.put(message)
        elif isinstance(message, protocol.RankWelcome):
            self._hold(message.hold)
        elif isinstance(message, protocol.Hold):
            self._hold(message.on)
        elif isinstance(message, protocol.Committed | protocol.CommitRefused):
            self._answers.put(message)
        else:
            log.warning("link: passed over a %s", type(message).__name__)

    def _received_beside(self, message: protocol.Message) -> None:
        """By the connection for telemetry, whose welcome says nothing that the other's does not."""
        if not isinstance(message, protocol.RankWelcome):
            self._received(message)

    def _hold(self, on: bool) -> None:
        if on != self._held:
            self._held = on
            self._orders.put(protocol.Order(number=0, op=int(protocol.Op.HOLD if on else protocol.Op.UNHOLD)))


def _leave(reason: str) -> None:
    """A generation that the controller no longer knows has nothing left to do."""
    log.error("the controller refuses this generation: %s", reason)
    logging.shutdown()
    os._exit(71)
