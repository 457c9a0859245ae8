"""Links: what a rank reports arrives, in order and at least once, whatever happens to the controller; threads end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.server import Server, ServerConnection, unix_serve
from websockets.exceptions import ConnectionClosed

from midwatch import protocol as p
from midwatch.run_directory import Address, write_address
from midwatch.transport import connection as connection_module
from midwatch.transport.rank_client import Connection, RankLink, Spool

HELLO = p.RankHello(version=p.VERSION, run="r", generation=1, term=1, pid=1, world=2)


class Controller:
    """A real server on a unix socket that stores what it is sent, once, and may be killed."""

    def __init__(self, folder: Path, address: Path, term: int = 1, stored: dict[str, list[p.Numbered]] | None = None) -> None:
        self.stored: dict[str, list[p.Numbered]] = stored if stored is not None else {"control": [], "telemetry": []}
        """What counts: each number once, as a journal would keep it."""
        self.arrived: list[tuple[str, int]] = []
        self.connections: list[ServerConnection] = []
        self.acknowledges = True
        self.refuses = ""
        self.drops_after: int | None = None
        """Breaks the connection after so many messages, the last of them unacknowledged."""
        self._path = folder / f"{term}.sock"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._server = self._run(self._listen())
        write_address(address, Address(term=term, url=f"unix:{self._path}", host="h", pid=os.getpid()))

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)

    async def _listen(self) -> Server:
        return await unix_serve(self._serve, str(self._path), compression=None, close_timeout=1)

    async def _serve(self, connection: ServerConnection) -> None:
        hello = p.decode(await connection.recv())
        if self.refuses:
            await connection.send(p.encode(p.Refused(reason=self.refuses)))
            return
        assert isinstance(hello, p.RankHello)
        kept = self.stored[hello.channel]
        numbers = {m.number for m in kept}
        await connection.send(p.encode(p.RankWelcome(term=1, acknowledged=max(numbers, default=0))))
        self.connections.append(connection)
        sends: asyncio.Queue[p.Message] = asyncio.Queue()
        sender = asyncio.create_task(self._send(connection, sends))
        try:
            async for frame in connection:
                message = p.decode(frame)
                assert isinstance(message, p.Numbered)
                self.arrived.append((hello.channel, message.number))
                if message.number not in numbers:
                    kept.append(message)
                    numbers.add(message.number)
                if self.drops_after is not None:
                    self.drops_after -= 1
                    if self.drops_after <= 0:
                        self.drops_after = None
                        connection.transport.abort()
                        return
                if self.acknowledges:
                    sends.put_nowait(p.Ack(number=message.number))
        except ConnectionClosed:
            return
        finally:
            sender.cancel()

    async def _send(self, connection: ServerConnection, sends: asyncio.Queue[p.Message]) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                await connection.send(p.encode(await sends.get()))

    def tell(self, connection: int, frame: bytes | str) -> None:
        self._run(self.connections[connection].send(frame))

    def cut(self) -> None:
        """Breaks all connections without a word."""

        async def abort() -> None:
            for connection in self.connections:
                connection.transport.abort()

        self._run(abort())

    def kill(self) -> None:
        """Ends at once, its connections with it."""

        async def end() -> None:
            self._server.close()
            for connection in self.connections:
                connection.transport.abort()
            await self._server.wait_closed()

        self._run(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._path.unlink(missing_ok=True)


@pytest.fixture
def room(own_home: Path) -> Path:
    return Path(os.environ["XDG_RUNTIME_DIR"])


@pytest.fixture
def address(tmp_path: Path) -> Path:
    return tmp_path / "control" / "address"


@pytest.fixture
def closing() -> Iterator[Callable[[Any], Any]]:
    """Ends what a test has begun; no thread of ours is left after it."""
    before = set(threading.enumerate())
    things: list[Any] = []

    def keep(thing: Any) -> Any:
        things.append(thing)
        return thing

    yield keep
    for thing in things:
        getattr(thing, "close", getattr(thing, "kill", None))()
    left = [t for t in threading.enumerate() if t not in before and t.is_alive()]
    for thread in left:
        thread.join(3)
    assert [t.name for t in left if t.is_alive()] == []


def until(holds: Callable[[], Any], seconds: float = 8.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def note(number: int) -> p.Note:
    return p.Note(level="info", text=str(number), step=number)


def row(step: int) -> p.Metrics:
    return p.Metrics(lineage=1, step=step, tokens=step, time=0.0, values={"train/loss": 1.0})


def texts(messages: list[p.Numbered]) -> list[str]:
    return [m.body.text for m in messages if isinstance(m.body, p.Note)]


def test_reports_are_numbered_from_one_delivered_in_order_and_acknowledged(
    room: Path, address: Path, closing: Callable[[Any], Any]
) -> None:
    controller = closing(Controller(room, address))
    link = closing(RankLink(address, HELLO))
    for number in range(1, 301):
        link.send(note(number))
        link.send(row(number))
    assert link.flush(8)
    assert [m.number for m in controller.stored["control"]] == list(range(1, 301))
    assert texts(controller.stored["control"]) == [str(n) for n in range(1, 301)]
    assert [m.body.step for m in controller.stored["telemetry"]] == list(range(1, 301))


def test_samples_of_rollouts_travel_with_the_metrics(room: Path, address: Path, closing: Callable[[Any], Any]) -> None:
    controller = closing(Controller(room, address))
    link = closing(RankLink(address, HELLO))
    for reward in (None, -0.5):
        link.send(p.Sampled(stage="s", step=1, lineage=1, prompt="why?", text="because", reward=reward))
    assert link.flush(8)
    assert [m.body.reward for m in controller.stored["control"]] == [None]
    assert [m.body.reward for m in controller.stored["telemetry"]] == [-0.5]


def test_what_is_sent_before_there_is_a_controller_arrives_when_there_is(
    room: Path, address: Path, closing: Callable[[Any], Any]
) -> None:
    link = closing(RankLink(address, HELLO))
    link.send(note(1))
    assert not link.flush(0.1)
    controller = closing(Controller(room, address))
    assert link.flush(8)
    assert texts(controller.stored["control"]) == ["1"]


def test_what_was_not_acknowledged_is_sent_again_to_the_next_controller(
    room: Path, address: Path, closing: Callable[[Any], Any]
) -> None:
    first = Controller(room, address)
    first.acknowledges = False
    link = closing(RankLink(address, HELLO))
    for number in range(1, 11):
        link.send(note(number))
    until(lambda: len(first.stored["control"]) == 10)
    first.kill()
    link.send(note(11))
    lost: dict[str, list[p.Numbered]] = {"control": first.stored["control"][:4], "telemetry": []}
    second = closing(Controller(room, address, term=2, stored=lost))
    assert link.flush(8)
    assert second.arrived[0] == ("control", 5), "what the next one has stored is not sent again"
    assert texts(second.stored["control"]) == [str(n) for n in range(1, 12)]


def test_nothing_of_control_is_lost_or_reordered_however_often_the_connection_breaks(
    room: Path, address: Path, closing: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "RETRY_SECONDS", (0.0,))
    controller = closing(Controller(room, address))
    link = closing(RankLink(address, HELLO))
    for number in range(1, 1501):
        if number % 60 == 0:
            controller.drops_after = 7
            time.sleep(0.002)
        link.send(note(number))
    assert link.flush(15)
    assert texts(controller.stored["control"]) == [str(n) for n in range(1, 1501)]


def test_a_batch_begun_on_a_broken_connection_is_not_gone_on_with_on_the_next(
    room: Path, address: Path, closing: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection breaks and comes back in the middle of a batch; then the batch begins again, from what is unacknowledged."""
    controller = closing(Controller(room, address))
    gate, reached = threading.Event(), threading.Event()
    real = Connection.send

    def slowly(self: Connection, message: p.Message, *over: Any) -> bool:
        if isinstance(message, p.Numbered) and message.number == 3 and not gate.is_set():
            reached.set()
            gate.wait(8)
        return real(self, message, *over)

    monkeypatch.setattr(Connection, "send", slowly)
    spool = closing(Spool("s", address, lambda: HELLO, lambda _: None, lambda _: None))
    controller.acknowledges = False
    for number in range(1, 6):
        spool.put(note(number))
    spool.start()
    assert reached.wait(8)
    until(lambda: len(controller.arrived) == 2)
    controller.stored["control"].clear()
    controller.cut()
    until(lambda: len(controller.connections) == 2)
    controller.arrived.clear()
    controller.acknowledges = True
    gate.set()
    assert spool.flush(8)
    assert [n for _, n in controller.arrived] == [1, 2, 3, 4, 5]


def test_of_telemetry_the_oldest_is_dropped_and_counted_and_of_control_nothing(
    room: Path, address: Path, closing: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RankLink, "TELEMETRY_ROOM", 50)
    link = closing(RankLink(address, HELLO))
    for number in range(1, 201):
        link.send(row(number))
        link.send(note(number))
    controller = closing(Controller(room, address))
    assert link.flush(8)
    link.send(row(201))
    assert link.flush(8)
    bodies = [m.body for m in controller.stored["telemetry"]]
    dropped = sum(b.count for b in bodies if isinstance(b, p.Dropped))
    steps = [b.step for b in bodies if isinstance(b, p.Metrics)]
    assert steps == list(range(151, 202))
    assert dropped == 150
    assert len(texts(controller.stored["control"])) == 200


def test_orders_and_answers_come_in_their_order(room: Path, address: Path, closing: Callable[[Any], Any]) -> None:
    controller = closing(Controller(room, address))
    link = closing(RankLink(address, HELLO))
    until(lambda: len(controller.connections) == 2)
    for number in (1, 2, 3):
        controller.tell(0, p.encode(p.Order(number=number, op=1)))
    controller.tell(0, p.encode(p.Committed(id="c")))
    controller.tell(0, p.encode(p.CommitRefused(id="d", reason="r")))
    orders: list[p.Order] = []
    answers: list[Any] = []

    def gathered() -> bool:
        orders.extend(filter(None, [link.next_order()]))
        answers.extend(filter(None, [link.next_answer()]))
        return len(orders) == 3 and len(answers) == 2

    until(gathered)
    assert [o.number for o in orders] == [1, 2, 3]
    assert [a.id for a in answers] == ["c", "d"]
    assert link.next_order() is None


def test_a_controller_that_sends_garbage_is_left_and_tried_again(room: Path, address: Path, closing: Callable[[Any], Any]) -> None:
    controller = closing(Controller(room, address))
    link = closing(RankLink(address, HELLO))
    until(lambda: len(controller.connections) == 2)
    controller.tell(0, b"\xc1")
    controller.tell(1, "text")
    until(lambda: len(controller.connections) == 4)
    link.send(note(1))
    assert link.flush(8)


def test_a_refused_hello_ends_the_link_with_the_reason(room: Path, address: Path, closing: Callable[[Any], Any]) -> None:
    controller = closing(Controller(room, address))
    controller.refuses = "generation 1 is over"
    reasons: list[str] = []
    closing(RankLink(address, HELLO, reasons.append))
    until(lambda: len(reasons) == 2)
    time.sleep(0.2)
    assert reasons == ["generation 1 is over"] * 2
    assert not [t for t in threading.enumerate() if t.name in ("link-control", "link-telemetry") and t.is_alive()]


@pytest.mark.parametrize("moment", [0.0, 0.01, 0.05, 0.3])
def test_closing_at_any_moment_ends_all_threads_soon(
    moment: float, room: Path, address: Path, closing: Callable[[Any], Any]
) -> None:
    closing(Controller(room, address))
    link = RankLink(address, HELLO)
    time.sleep(moment)
    began = time.monotonic()
    link.close()
    assert time.monotonic() - began < 3
    assert not [t.name for t in threading.enumerate() if t.name.startswith("link-")]


def test_closing_while_the_handshake_is_under_way_ends_the_thread(room: Path, address: Path, closing: Callable[[Any], Any]) -> None:
    closing(Controller(room, address))
    inside, go = threading.Event(), threading.Event()

    def opened(_: p.Message) -> None:
        inside.set()
        go.wait(5)

    def hello() -> p.Message:
        inside.set()
        go.wait(5)
        return HELLO

    connection = Connection("slow", address, hello, lambda _: None, lambda _: None, lambda _: None)
    connection.start()
    assert inside.wait(5)
    threading.Timer(0.2, go.set).start()
    began = time.monotonic()
    connection.close()
    assert time.monotonic() - began < 3
    assert not [t for t in threading.enumerate() if t.name == "slow"]


def test_what_is_dropped_after_it_was_sent_makes_nothing_else_be_passed_over(
    room: Path, address: Path, closing: Callable[[Any], Any]
) -> None:
    controller = closing(Controller(room, address))
    controller.acknowledges = False
    spool = closing(Spool("s", address, lambda: HELLO, lambda _: None, lambda _: None, room=5))
    spool.start()
    for step in range(1, 21):
        spool.put(row(step))
        until(lambda: len(controller.arrived) >= step)  # noqa: B023
    rows = [m.body.step for m in controller.stored["control"] if isinstance(m.body, p.Metrics)]
    assert rows == list(range(1, 21))
