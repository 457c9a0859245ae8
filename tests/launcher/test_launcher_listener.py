"""The door to other machines: it opens to the run's keys alone; what strangers do costs little and changes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import resource
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from launcher_desk import NODE, Desk, desk_at
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidMessage, WebSocketException

from launcher.controller.serving import listener as listener_module
from launcher.controller.serving import peers as peers_module
from launcher.controller.serving import server as server_module
from launcher.controller.serving.listener import Listener, ListenError
from launcher.controller.serving.peers import Refusals
from midwatch import protocol as p
from midwatch.recipe import Cluster
from midwatch.run_directory import Address, RunPaths, write_address
from midwatch.transport import connection as connection_module
from midwatch.transport.connection import Connection
from midwatch.transport.rank_client import RankLink, Spool
from midwatch.transport.tls_identity import ANY_NODE, RunKeys, TlsIdentity, client_context, store_identity

Open = Callable[..., Any]
LOOPBACK = Cluster(backend="external", interface="lo")


class Remote:
    """A desk whose door to other machines is open."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.keys = desk, RunKeys.ensure(desk.paths)
        self.listener = Listener(self.keys.issue("controller", "head"), desk.term.door.serve, desk.term.door.refusals)

    async def open(self) -> None:
        self.url = (await self.listener.open(LOOPBACK))[0]
        place = urlsplit(self.url)
        self.place = (str(place.hostname), int(place.port or 0))

    async def connect(self, identity: TlsIdentity | None = None, **more: Any) -> ClientConnection:
        context = client_context(identity or self.keys.issue("agent", "n1"))
        return await connect(self.url, ssl=context, server_hostname="controller", proxy=None, compression=None, **more)

    async def hello(self, hello: p.Message, identity: TlsIdentity | None = None) -> tuple[ClientConnection, p.Message]:
        if identity is None and isinstance(hello, p.RankHello):
            identity = self.keys.issue("agent", NODE)
        connection = await self.connect(identity)
        await connection.send(p.encode(hello))
        return connection, p.decode(await asyncio.wait_for(connection.recv(), 5))

    def agent(self, node: str = "n1", **changes: Any) -> p.AgentHello:
        fields = {"version": p.VERSION, "run": self.desk.context.run, "node": node, "pid": 1, "generation": 0}
        return p.AgentHello(**(fields | changes))

    @property
    def turned_away(self) -> int:
        return self.desk.context.live.refused_peers

    async def counts(self, number: int, seconds: float = 5.0) -> None:
        """So many are turned away, and no more."""
        await self.desk.until(lambda: self.turned_away >= number, seconds)
        await asyncio.sleep(0.05)
        assert self.turned_away == number

    async def still_serves(self) -> None:
        connection, welcome = await self.hello(self.agent())
        assert isinstance(welcome, p.AgentWelcome)
        await connection.close()


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    @contextlib.asynccontextmanager
    async def opened(state: p.State | None = "training") -> AsyncIterator[Remote]:
        async with desk_at(tmp_path / "run", monkeypatch, state) as desk:
            remote = Remote(desk)
            await remote.open()
            try:
                yield remote
            finally:
                await remote.listener.close()

    return opened


@pytest.fixture
def many_files() -> Any:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 8192)), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def ended(connection: ClientConnection) -> list[p.Message]:
    """What the controller still says before it closes."""
    said = []
    with contextlib.suppress(ConnectionClosed):
        while True:
            said.append(p.decode(await asyncio.wait_for(connection.recv(), 8)))
    return said


# Who is let in


async def test_an_agent_with_its_key_is_welcomed_and_speaks_for_its_node(at: Open) -> None:
    async with at() as remote:
        connection, welcome = await remote.hello(remote.agent())
        assert welcome == p.AgentWelcome(term=1)
        stats = p.NodeStats(node="n1", time=1.0, cpus=(0.5,), memory_used=1, memory_total=2)
        await connection.send(p.encode(stats))
        await remote.desk.until(lambda: remote.desk.context.live.nodes["n1"].stats == stats)
        await connection.close()
        await remote.desk.until(lambda: not remote.desk.context.live.nodes["n1"].reachable)
        assert remote.turned_away == 0


async def test_a_rank_with_its_nodes_key_reports(at: Open) -> None:
    async with at("starting") as remote:
        hello = p.RankHello(version=p.VERSION, run="desk", generation=1, term=1, pid=1, world=1)
        connection, welcome = await remote.hello(hello)
        assert isinstance(welcome, p.RankWelcome)
        phase = p.Phase(phase="training", step=0, stage="first", stage_step=0, lineage=1)
        await connection.send(p.encode(p.Numbered(number=1, body=phase)))
        assert p.decode(await connection.recv()) == p.Ack(number=1)
        assert remote.desk.ledger.state == "training"
        await connection.close()


async def test_an_agent_may_not_speak_for_another_node_and_nobody_commands_over_the_network(at: Open) -> None:
    async with at() as remote:
        _, answer = await remote.hello(remote.agent("n2"))
        assert isinstance(answer, p.Refused) and "the node n1, not of n2" in answer.reason
        assert "n2" not in remote.desk.context.live.nodes
        _, answer = await remote.hello(p.ClientHello(version=p.VERSION))
        assert isinstance(answer, p.Refused) and "ssh://HOST/RUN" in answer.reason
        _, answer = await remote.hello(p.Ack(number=1))
        assert isinstance(answer, p.Refused) and "not a hello" in answer.reason
        await remote.counts(3)
        assert remote.desk.ledger.commands == {}


async def test_only_the_node_of_rank_0_speaks_as_rank_0(at: Open) -> None:
    """A key of another node of the run gets no order, and what it says is not taken in."""
    async with at("training") as remote:
        desk = remote.desk
        hello = p.RankHello(version=p.VERSION, run="desk", generation=1, term=1, pid=1, world=1)
        for channel in ("control", "telemetry"):
            posing = msgspec.structs.replace(hello, channel=channel)
            connection, answer = await remote.hello(posing, remote.keys.issue("agent", "n2"))
            assert isinstance(answer, p.Refused) and f"is on {NODE}, and this key is of the node n2" in answer.reason
            assert await ended(connection) == []
        await remote.counts(2)
        desk.give("pause")
        await desk.until(lambda: desk.orders)
        assert desk.ledger.state == "training" and desk.ledger.generation_live


@pytest.mark.parametrize("channel", ["control", "telemetry"])
async def test_a_second_rank_0_takes_the_place_of_the_first_only_when_that_is_dead(
    channel: str, at: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_module, "PROOF_SECONDS", 0.5)
    async with at("starting") as remote:
        hello = p.RankHello(version=p.VERSION, run="desk", generation=1, term=1, pid=1, world=1, channel=channel)  # type: ignore[arg-type]
        first, welcome = await remote.hello(hello)
        assert isinstance(welcome, p.RankWelcome)
        second, answer = await remote.hello(msgspec.structs.replace(hello, pid=2))
        assert isinstance(answer, p.Refused) and "connected already" in answer.reason
        assert await ended(second) == []
        phase = p.Phase(phase="training", step=0, stage="first", stage_step=0, lineage=1)
        if channel == "control":  # the first is still who is listened to, and told
            await first.send(p.encode(p.Numbered(number=1, body=phase)))
            assert p.decode(await first.recv()) == p.Ack(number=1)
            remote.desk.give("pause")
            assert isinstance(p.decode(await first.recv()), p.Order)
        first.transport.pause_reading()  # cut off: it hears nothing, and nothing is heard of it
        third, welcome = await remote.hello(msgspec.structs.replace(hello, pid=3))
        assert isinstance(welcome, p.RankWelcome)
        first.transport.abort()
        await third.close()


async def test_a_second_agent_of_a_node_takes_the_place_of_the_first_only_when_that_is_dead(
    at: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers_module, "PROOF_SECONDS", 0.5)
    async with at("training") as remote:
        first, welcome = await remote.hello(remote.agent())
        assert isinstance(welcome, p.AgentWelcome)
        await asyncio.sleep(0.1)
        for address in ("127.0.0.1", "10.0.0.9"):  # even one that says that it is the same
            second, answer = await remote.hello(remote.agent(address=address))
            assert isinstance(answer, p.Refused) and "has an agent already, at 127.0.0.1" in answer.reason
            await second.close()
        first.transport.pause_reading()
        third, welcome = await remote.hello(remote.agent(pid=2))
        assert isinstance(welcome, p.AgentWelcome)
        first.transport.abort()
        await third.close()


async def test_without_a_key_or_with_another_runs_or_the_controllers_nobody_comes_in(at: Open, tmp_path: Path) -> None:
    async with at() as remote:
        (tmp_path / "other").mkdir()
        others = RunKeys.ensure(RunPaths(tmp_path / "other"))
        stranger = others.issue("agent", "n1")
        ours = remote.keys.issue("agent", "n1")
        mixed = TlsIdentity(stranger.certificate, stranger.key, ours.authority)
        for number, identity in enumerate((stranger, mixed, remote.keys.issue("controller", "head")), 1):
            with pytest.raises((ssl.SSLError, ConnectionError, WebSocketException)):
                await remote.connect(identity)
            await remote.counts(number)
        blind = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        blind.check_hostname, blind.verify_mode = False, ssl.CERT_NONE
        with pytest.raises((ssl.SSLError, ConnectionError, InvalidMessage)):
            await connect(remote.url, ssl=blind, proxy=None)
        await remote.counts(4)
        old = client_context(ours)
        old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await connect(remote.url, ssl=old, server_hostname="controller", proxy=None)
        await remote.counts(5)
        await remote.still_serves()


# What strangers do


HTTP = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"


SCANS = [b"", HTTP, b"SSH-2.0-scan\r\n", random.Random(7).randbytes(4000), b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"]


@pytest.mark.parametrize("words", SCANS, ids=["nothing", "http", "ssh", "noise", "half a hello"])
async def test_a_scan_is_closed_and_counted_and_changes_nothing(words: bytes, at: Open) -> None:
    async with at() as remote:
        entries = len(remote.desk.journal.entries)
        for _ in range(10):
            with socket.create_connection(remote.place) as wire, contextlib.suppress(OSError):
                wire.sendall(words)
        await remote.counts(10)
        with socket.create_connection(remote.place) as wire:  # and one that ends with a reset
            wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        await remote.counts(11)
        assert not remote.listener._pending
        assert len(remote.desk.journal.entries) == entries
        await remote.still_serves()


async def test_whoever_has_a_key_and_does_not_speak_websocket_is_closed_and_counted(
    at: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener_module, "OPEN_SECONDS", 0.3)
    async with at() as remote:
        context = client_context(remote.keys.issue("agent", "n1"))
        for number, words in enumerate((HTTP, b"\xff" * 100, b"GET / HTTP/1.1\r\nA: " + b"x" * 20_000, b""), 1):
            reader, writer = await asyncio.open_connection(*remote.place, ssl=context, server_hostname="controller")
            writer.write(words)
            with contextlib.suppress(OSError):
                await asyncio.wait_for(reader.read(), 5)
            await remote.counts(number)
            writer.close()
        await remote.still_serves()


FRAMES = [b"\xc1", b"", "text", b"x" * (p.MAX_FRAME + 1)]


@pytest.mark.parametrize("frame", FRAMES, ids=["noise", "empty", "text", "too large"])
@pytest.mark.parametrize("after", [False, True])
async def test_what_is_no_message_ends_the_connection_and_is_counted_once(frame: bytes | str, after: bool, at: Open) -> None:
    async with at() as remote:
        connection = (await remote.hello(remote.agent()))[0] if after else await remote.connect()
        with contextlib.suppress(ConnectionClosed):
            await connection.send(frame)
        assert all(isinstance(m, p.Refused) for m in await ended(connection))
        await remote.counts(1)
        await remote.still_serves()


async def test_whoever_has_a_key_and_says_nothing_is_closed_and_counted(at: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HELLO_SECONDS", 0.2)
    async with at() as remote:
        await ended(await remote.connect())
        await remote.counts(1)


class Loris:
    """Three hundred connections that each say a byte now and then."""

    def __init__(self, place: tuple[str, int], source: str, number: int = 300) -> None:
        self._place, self._source, self._number = place, source, number
        self._stop = threading.Event()
        self.ready = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Loris:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        wires = [socket.create_connection(self._place, 20, (self._source, 0)) for _ in range(self._number)]
        hello = b"\x16\x03\x01\x02\x00" + bytes(200)
        for byte in hello:
            for wire in wires:
                with contextlib.suppress(OSError):
                    wire.send(bytes([byte]))
            self.ready.set()
            if self._stop.wait(0.2):
                break
        for wire in wires:
            wire.close()


async def test_three_hundred_slow_strangers_are_bounded_counted_and_keep_no_agent_out(
    at: Open, monkeypatch: pytest.MonkeyPatch, many_files: None, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(listener_module, "TLS_SECONDS", 2.0)
    async with at() as remote:
        await remote.still_serves()
        before = resident()
        most = 0
        with Loris(remote.place, "127.0.0.2") as crowd:
            began = time.monotonic()
            while not crowd.ready.is_set():
                most = max(most, len(remote.listener._pending))
                await asyncio.sleep(0.005)
            first = time.monotonic()
            await remote.still_serves()
            assert time.monotonic() - first < 1.5, "an agent of another address finds room among the crowd"
            assert most <= listener_module.MOST_PENDING
            grown = resident() - before
            await remote.counts(300, 10)
            assert time.monotonic() - began < 10
        assert grown < 25e6
        await remote.still_serves()
    lines = [r for r in caplog.records if "rejected" in r.message]
    assert 1 <= len(lines) <= Refusals.LINES


async def test_an_agent_behind_the_same_address_as_the_slow_ones_comes_in_too(
    at: Open, monkeypatch: pytest.MonkeyPatch, many_files: None
) -> None:
    async with at() as remote:
        with Loris(remote.place, "127.0.0.1", 80) as crowd:
            await asyncio.to_thread(crowd.ready.wait, 10)
            end = time.monotonic() + 4
            while True:
                with contextlib.suppress(OSError, WebSocketException, TimeoutError):
                    await remote.still_serves()
                    break
                assert time.monotonic() < end
                await asyncio.sleep(0.1)


@pytest.mark.parametrize("number", [300, pytest.param(1024, marks=pytest.mark.soak)])
async def test_hundreds_of_agents_are_served_at_once_and_none_is_taken_for_a_stranger(
    number: int, at: Open, many_files: None
) -> None:
    async with at() as remote:
        monitor = resident()
        contexts = [client_context(remote.keys.issue("agent", ANY_NODE)) for _ in range(8)]
        gate = asyncio.Semaphore(32)

        async def come(k: int) -> ClientConnection:
            async with gate:
                more = {"ssl": contexts[k % 8], "server_hostname": "controller", "proxy": None, "compression": None}
                connection = await connect(remote.url, open_timeout=30, ping_interval=None, close_timeout=0.1, **more)
                await connection.send(p.encode(remote.agent(f"n{k}")))
                assert isinstance(p.decode(await connection.recv()), p.AgentWelcome)
                return connection

        agents = await asyncio.gather(*(come(k) for k in range(number)))
        assert len(remote.listener._sessions.all_connections) == number
        assert remote.turned_away == 0
        assert resident() - monitor < 400e6, "both ends of each are in this process"
        for connection in agents:
            connection.transport.abort()
        await remote.desk.until(lambda: not remote.listener._sessions.all_connections, 10)


def test_refusals_are_all_counted_and_the_first_few_told(caplog: pytest.LogCaptureFixture) -> None:
    from launcher.controller.core.context import LiveState

    now, live = [0.0], LiveState()
    refusals = Refusals(live, clock=lambda: now[0])
    with caplog.at_level(logging.WARNING, logger=peers_module.log.name):
        for _ in range(1000):
            refusals.note("10.0.0.9", "no key\n\x1b[31m" + "x" * 5000)
        assert len(caplog.records) == Refusals.LINES
        assert all("\n" not in r.getMessage() and "\x1b" not in r.getMessage() for r in caplog.records)
        assert max(len(r.getMessage()) for r in caplog.records) < 400
        now[0] = Refusals.SPAN_SECONDS
        refusals.note("10.0.0.9", "no key")
    assert f"{1000 - Refusals.LINES} more" in caplog.records[Refusals.LINES].getMessage()
    assert live.refused_peers == 1001


# Where it listens


async def test_the_recipes_interface_and_port_are_used_and_what_is_wrong_with_them_said(tmp_path: Path) -> None:
    identity = RunKeys.ensure(RunPaths(tmp_path)).issue("controller", "head")

    def listener() -> Listener:
        from launcher.controller.core.context import LiveState

        return Listener(identity, lambda *_: asyncio.sleep(0), Refusals(LiveState()))

    with pytest.raises(ListenError, match=r"\[cluster\] interface: .*nosuch0.*lo"):
        await listener().open(Cluster(backend="external", interface="nosuch0"))
    first = listener()
    url = (await first.open(LOOPBACK))[0]
    assert url.startswith("wss://127.0.0.1:")
    port = urlsplit(url).port or 0
    second = listener()
    opening = asyncio.create_task(second.open(Cluster(backend="external", interface="lo", port=port)))
    await asyncio.sleep(0.3)
    assert not opening.done(), "the port of a controller that is leaving is waited for"
    await first.close()
    assert await opening == (url,)
    third = listener()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listener_module, "BIND_SECONDS", 0.1)
        with pytest.raises(ListenError, match=rf"\[cluster\] port: {port}.*in use.*name another"):
            await third.open(Cluster(backend="external", interface="lo", port=port))
    await second.close()
    every = listener()
    announced = urlsplit((await every.open(Cluster(backend="external")))[0])
    assert announced.hostname and announced.hostname != "127.0.0.1"
    with socket.create_connection(("127.0.0.1", announced.port or 0)):
        pass
    await every.close()


async def test_a_snapshot_tells_how_many_were_turned_away(at: Open) -> None:
    async with at() as remote:
        for _ in range(3):
            socket.create_connection(remote.place).close()
        await remote.counts(3)
        snapshot = remote.desk.term.door._clients._view.snapshot()
        assert snapshot.refused_peers == 3
        assert b'"refused_peers":3' in msgspec.json.encode(snapshot)


# The other end: links over the network


class Relay:
    """A network between two machines: passes bytes on after a while, or, once cut, not at all, and says nothing of it."""

    def __init__(self, target: tuple[str, int], delay: float = 0.0) -> None:
        self._target, self._delay = target, delay
        self.cut = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return f"wss://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._tasks.add(task)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                if not self.cut:
                    loop.call_later(self._delay, sink.write, data)
        if not self.cut:
            loop.call_later(self._delay, sink.close)


def identity_file(remote: Remote, node: str = NODE) -> Path:
    file = Path(os.environ["XDG_RUNTIME_DIR"]) / f"{node}.identity"
    store_identity(remote.keys.issue("agent", node), file)
    return file


def elsewhere(remote: Remote, url: str) -> Path:
    """An address as a controller on another machine leaves it."""
    write_address(remote.desk.paths.address, Address(term=1, url="unix:/nowhere", host="head.far", pid=1, remote=url))
    return remote.desk.paths.address


RANK = p.RankHello(version=p.VERSION, run="desk", generation=1, term=1, pid=1, world=1)


async def test_a_ranks_link_on_another_machine_reports_over_tls_and_takes_orders(at: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    async with at("starting") as remote:
        file = identity_file(remote)
        monkeypatch.setenv("MIDWATCH_IDENTITY", str(file))
        link = RankLink(elsewhere(remote, remote.url), RANK)
        link.send(p.Phase(phase="training", step=0, stage="first", stage_step=0, lineage=1))
        assert await asyncio.to_thread(link.flush, 5)
        assert remote.desk.ledger.state == "training"
        remote.desk.give("pause")
        await remote.desk.until(lambda: link.next_order() is not None)
        await asyncio.to_thread(link.close)
        assert not [t for t in threading.enumerate() if t.name.startswith("link-")]


async def test_a_link_goes_on_where_the_next_controller_listens(at: Open, tmp_path: Path) -> None:
    async with at("starting") as remote:
        address = elsewhere(remote, "wss://127.0.0.1:9")
        spool = Spool("s", address, lambda: RANK, lambda _: None, lambda _: None, identity=identity_file(remote))
        spool.start()
        spool.put(p.Note(level="info", text="kept", step=1))
        assert not await asyncio.to_thread(spool.flush, 0.3)
        elsewhere(remote, remote.url)
        assert await asyncio.to_thread(spool.flush, 5)
        await asyncio.to_thread(spool.close)


async def test_without_an_identity_a_link_says_why_it_cannot_and_tries_on(at: Open, caplog: pytest.LogCaptureFixture) -> None:
    async with at() as remote:
        address = elsewhere(remote, remote.url)
        missing = Connection("lost", address, lambda: RANK, lambda _: None, lambda _: None, lambda _: None)
        missing.start()
        await remote.desk.until(lambda: "head.far" in caplog.text)
        await asyncio.sleep(0.3)
        await asyncio.to_thread(missing.close)
        assert caplog.text.count("no identity to show") == 1


async def test_an_agent_does_not_talk_to_whoever_has_no_controllers_key(at: Open, tmp_path: Path) -> None:
    """Another node, with an agent's key of the run, listens where the controller is said to be."""
    async with at() as remote:
        heard: list[object] = []
        impostor = Listener(
            remote.keys.issue("agent", "n9"), lambda *a: asyncio.sleep(0, heard.append(a)), remote.desk.term.door.refusals
        )
        url = (await impostor.open(LOOPBACK))[0]
        opened: list[object] = []
        link = Connection(
            "a", elsewhere(remote, url), remote.agent, opened.append, lambda _: None, lambda _: None, identity=identity_file(remote)
        )
        link.start()
        await remote.desk.until(lambda: remote.turned_away >= 2)
        await asyncio.to_thread(link.close)
        await impostor.close()
        assert opened == heard == []


async def test_a_link_that_is_cut_without_a_word_is_noticed_on_both_sides(at: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    assert connection_module.PING_SECONDS + connection_module.PONG_SECONDS <= 15
    for module in (connection_module, listener_module):
        monkeypatch.setattr(module, "PING_SECONDS", 0.4)
        monkeypatch.setattr(module, "PONG_SECONDS", 0.6)
    async with at() as remote:
        network = Relay(remote.place)
        address = elsewhere(remote, await network.open())
        link = Connection(
            "a", address, remote.agent, lambda _: None, lambda _: None, lambda _: None, identity=identity_file(remote, "n1")
        )
        link.start()
        await remote.desk.until(lambda: link.lost_since is None and "n1" in remote.desk.context.live.nodes)
        network.cut = True
        began = time.monotonic()
        await remote.desk.until(lambda: link.lost_since is not None)
        await remote.desk.until(lambda: not remote.listener._sessions.all_connections)
        assert 0.3 < time.monotonic() - began < 3.5
        network.cut = False
        await remote.desk.until(lambda: link.lost_since is None)
        await asyncio.to_thread(link.close)
        await network.close()


async def test_half_a_second_there_and_back_breaks_nothing(at: Open) -> None:
    async with at("starting") as remote:
        network = Relay(remote.place, delay=0.25)
        address = elsewhere(remote, await network.open())
        opened: list[object] = []
        spool = Spool("s", address, lambda: RANK, lambda _: None, lambda _: None, identity=identity_file(remote))
        spool.connection._opened = lambda answer, first=spool.connection._opened: (opened.append(answer), first(answer))  # type: ignore
        spool.start()
        for number in range(20):
            spool.put(p.Note(level="info", text=str(number), step=1))
            await asyncio.sleep(0.1)
        assert await asyncio.to_thread(spool.flush, 8)
        assert len(opened) == 1
        await asyncio.to_thread(spool.close)
        await network.close()
