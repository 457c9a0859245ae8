"""The controller's door: who knocks is known by the kernel's word; what is no message changes nothing; no peer costs another."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import itertools
import os
import random
import resource
import socket
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from launcher_desk import Desk, InstantData, desk_at
from websockets.asyncio.client import ClientConnection, unix_connect
from websockets.exceptions import ConnectionClosed

from launcher.controller.serving import server as server_module
from midwatch import protocol as p
from midwatch.journal import entries as j
from midwatch.journal.journal import JournalError
from midwatch.run_directory import Address, RunLock, host_name, write_address
from midwatch.transport import discovery as reach_module
from midwatch.transport.client import Client, ClientError

Open = Callable[..., Any]


class Served:
    """A desk whose door is open."""

    def __init__(self, desk: Desk, path: Path) -> None:
        self.desk, self.path = desk, path
        self._tasks: list[asyncio.Task[None]] = []

    async def open(self) -> None:
        self.server = await self.desk.term.door.listen(self.path)
        self._tasks = [asyncio.create_task(self.desk.term.door.publish())]
        self._lock = RunLock(self.desk.paths)
        assert self._lock.take()
        url = f"unix:{self.path}"
        write_address(self.desk.paths.address, Address(term=self.desk.context.term, url=url, host=host_name(), pid=os.getpid()))

    async def close(self) -> None:
        self.server.close()
        await self.server.wait_closed()
        for task in self._tasks:
            task.cancel()
        self._lock.release()

    async def connect(self, **more: Any) -> ClientConnection:
        return await unix_connect(str(self.path), uri="ws://x/", compression=None, **more)

    async def hello(self, hello: p.Message, **more: Any) -> tuple[ClientConnection, p.Message]:
        connection = await self.connect(**more)
        await connection.send(p.encode(hello))
        return connection, p.decode(await connection.recv())

    @property
    def turned_away(self) -> int:
        return self.desk.context.live.refused_peers


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    @contextlib.asynccontextmanager
    async def opened(state: p.State | None = "training") -> AsyncIterator[Served]:
        async with desk_at(tmp_path / "run", monkeypatch, state) as desk:
            served = Served(desk, Path(os.environ["XDG_RUNTIME_DIR"]) / f"{desk.context.term}.sock")
            await served.open()
            try:
                yield served
            finally:
                await served.close()

    return opened


CLIENT = p.ClientHello(version=p.VERSION)


async def until_closed(connection: ClientConnection) -> list[p.Message]:
    """What the controller still says before it closes."""
    said = []
    with contextlib.suppress(ConnectionClosed):
        while True:
            said.append(p.decode(await connection.recv()))
    return said


def rank(**changes: Any) -> p.RankHello:
    return p.RankHello(**{"version": p.VERSION, "run": "desk", "generation": 1, "term": 1, "pid": 1, "world": 1, **changes})


async def test_the_author_of_a_command_is_the_peers_user_as_the_kernel_knows_it(at: Open) -> None:
    async with at() as served:
        async with Client(served.desk.paths.root) as client:
            assert client.welcome is not None and client.welcome.author == getpass.getuser()
            view = await client.command("golden", {"checkpoint": "a"})
        assert (view.state, view.author) == ("done", getpass.getuser())
        assert os.stat(served.path).st_mode & 0o777 == 0o600


async def test_a_read_only_clients_command_is_refused_and_answered(at: Open) -> None:
    async with at() as served, Client(served.desk.paths.root, read_only=True) as client:
        view = await client.command("stop", timeout=5)
        assert (view.state, view.reason) == ("refused", "this client is read-only")
        assert served.desk.ledger.commands == {}


@pytest.mark.parametrize(
    "frame", [b"", b"\xc1", b"\x81\xa4type\xa1\xff", "text", p.encode(p.Ack(number=1)), random.Random(7).randbytes(999)]
)
async def test_a_peer_whose_first_word_is_no_hello_is_turned_away_and_counted(frame: bytes | str, at: Open) -> None:
    async with at() as served:
        entries, connection = len(served.desk.journal.entries), await served.connect()
        await connection.send(frame)
        assert isinstance(p.decode(await connection.recv()), p.Refused)
        with pytest.raises(ConnectionClosed):
            await connection.recv()
        assert served.turned_away == 1
        assert len(served.desk.journal.entries) == entries


@pytest.mark.parametrize("frame", [b"\xc1", "text", p.encode(rank()), b"x" * (p.MAX_FRAME + 1)])
async def test_a_client_that_says_nonsense_later_is_closed_and_counted(frame: bytes | str, at: Open) -> None:
    async with at() as served:
        connection, welcome = await served.hello(CLIENT)
        assert isinstance(welcome, p.ClientWelcome)
        with contextlib.suppress(ConnectionClosed):
            await connection.send(frame)
        assert all(isinstance(m, p.Refused) for m in await until_closed(connection))
        async with Client(served.desk.paths.root) as client:
            assert (await client.ask(p.LogQuery(id=0), p.LogReply)).files == ()
        if len(frame) < p.MAX_FRAME:
            assert served.turned_away == 1


async def test_a_silent_peer_is_closed_and_counted(at: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HELLO_SECONDS", 0.1)
    async with at() as served:
        connection = await served.connect()
        await asyncio.wait_for(until_closed(connection), 5)
        assert served.turned_away == 1


async def test_three_hundred_connections_do_not_keep_an_operator_out_for_long(at: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "HELLO_SECONDS", 1.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2048)), hard))
    async with at() as served:
        crowd = [await served.connect(open_timeout=10) for _ in range(300)]
        async with Client(served.desk.paths.root) as client:
            assert (await client.command("golden", {"checkpoint": "a"})).state == "done"
        await served.desk.until(lambda: served.turned_away >= 300)
        await asyncio.gather(*(c.close() for c in crowd))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_what_is_not_even_a_websocket_changes_nothing(at: Open) -> None:
    async with at() as served:
        for content in (b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01", b"\n" * 5000, b""):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(str(served.path))
                raw.sendall(content)
        async with Client(served.desk.paths.root) as client:
            assert (await client.command("golden", {"checkpoint": "a"})).state == "done"


async def test_unknown_fields_of_a_command_are_refused(at: Open) -> None:
    async with at() as served:
        connection, _ = await served.hello(CLIENT)
        raw = {"type": "Command", "id": "x", "verb": "stop", "arguments": {}, "force": True}
        await connection.send(msgspec.msgpack.encode(raw))
        answer = p.decode(await connection.recv())
        assert isinstance(answer, p.Refused) and "force" in answer.reason
        assert served.desk.ledger.commands == {}


@pytest.mark.parametrize(
    ("hello", "says"),
    [
        (p.ClientHello(version=99), "use the same Midwatch"),
        (rank(version=99), "version 99"),
        (rank(generation=7), "generation 7 is over"),
        (rank(run="other"), "another run"),
        (p.AgentHello(version=99, run="r", node="n", pid=1, generation=0), "another version"),
        (p.AgentHello(version=p.VERSION, run="r", node="n", pid=1, generation=0), "another run"),
    ],
)
async def test_whoever_is_of_another_version_run_or_generation_is_told_so(hello: p.Message, says: str, at: Open) -> None:
    async with at() as served:
        _, answer = await served.hello(hello)
        assert isinstance(answer, p.Refused) and says in answer.reason


async def test_a_client_of_another_version_says_so_in_one_sentence(at: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    async with at() as served:
        client = Client(served.desk.paths.root)
        client._hello = p.ClientHello(version=99)
        with pytest.raises(ClientError, match="use the same Midwatch"):
            await client.__aenter__()


async def test_ranks_of_the_generation_are_welcomed_ordered_and_acknowledged(at: Open) -> None:
    async with at("starting") as served:
        desk = served.desk
        connection, welcome = await served.hello(rank())
        assert welcome == p.RankWelcome(term=1, acknowledged=0)
        said = p.Phase(phase="training", step=0, stage="first", stage_step=0, lineage=1)
        for _ in range(2):
            await connection.send(p.encode(p.Numbered(number=1, body=said)))
            assert p.decode(await connection.recv()) == p.Ack(number=1)
        assert desk.ledger.state == "training"
        async with Client(desk.paths.root) as client:
            asked = asyncio.create_task(client.command("checkpoint"))
            order = p.decode(await connection.recv())
            assert isinstance(order, p.Order) and order.op == p.Op.CHECKPOINT
            await connection.close()
            again, welcome = await served.hello(rank())
            assert welcome == p.RankWelcome(term=1, acknowledged=1)
            assert p.decode(await again.recv()) == order
            outcome = p.Outcome(number=order.number, ok=False, step=1, reason="the disk is full")
            await again.send(p.encode(p.Numbered(number=2, body=outcome)))
            assert (await asked).reason == "the disk is full"


async def test_a_report_that_is_sent_again_is_acknowledged_again_and_counts_once(at: Open) -> None:
    async with at("starting") as served:
        connection, _ = await served.hello(rank())
        said = p.Numbered(number=1, body=p.Note(level="warning", text="only once", step=1))
        for _ in range(3):
            await connection.send(p.encode(said))
            assert p.decode(await connection.recv()) == p.Ack(number=1)
        notes = [e for _, e in served.desk.journal.entries if isinstance(e, j.Noted) and e.text == "only once"]
        assert len(notes) == 1


async def test_metrics_are_acknowledged_once_stored_and_a_resend_adds_nothing(at: Open) -> None:
    async with at("starting") as served:
        connection, _ = await served.hello(rank(channel="telemetry"))
        for number in (1, 2, 2, 1, 3):
            body = p.Metrics(lineage=1, step=number, tokens=1, time=1.0, values={"train/loss": 0.5})
            await connection.send(p.encode(p.Numbered(number=number, body=body)))
        while True:
            ack = p.decode(await asyncio.wait_for(connection.recv(), 5))
            if isinstance(ack, p.Ack) and ack.number >= 3:
                break
        async with Client(served.desk.paths.root) as client:
            reply = await client.ask(p.MetricsQuery(id=0, names=("train/loss",), last=10), p.MetricsReply)
        assert [r.step for r in reply.rows["train/loss"]] == [1, 2, 3]


async def test_a_screen_that_never_reads_slows_nobody_and_costs_no_memory(at: Open) -> None:
    async with at() as served:
        desk = served.desk
        for number in range(50):
            desk.context.note("info", f"{number} " + "x" * 20_000)
        deaf = []
        for _ in range(5):
            connection = await served.connect(max_queue=1)
            await connection.send(p.encode(p.ClientHello(version=p.VERSION, subscribe=True)))
            connection.transport.pause_reading()
            deaf.append(connection)
        arrivals: list[float] = []
        async with Client(desk.paths.root, subscribe=True, on_snapshot=lambda _: arrivals.append(time.monotonic())):
            before = _resident()
            end = time.monotonic() + 3
            while time.monotonic() < end:
                desk.context.touch()
                await asyncio.sleep(0.01)
        assert len(arrivals) >= 10
        assert max(b - a for a, b in itertools.pairwise(arrivals)) < 1.0
        assert _resident() - before < 20e6
        for connection in deaf:
            connection.transport.abort()


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_screens_get_a_snapshot_at_once_and_after_every_change(at: Open) -> None:
    async with at() as served:
        seen: list[p.Snapshot] = []
        async with Client(served.desk.paths.root, subscribe=True, on_snapshot=seen.append) as client:
            await served.desk.until(lambda: seen)
            assert (seen[0].state, seen[0].step, seen[0].run) == ("training", 25, "desk")
            await client.command("golden", {"checkpoint": "b"})
            await served.desk.until(lambda: [c.id for c in seen[-1].checkpoints if c.golden] == ["b"])


# Questions


async def test_questions_are_answered_and_bad_ones_refused_without_harm(at: Open) -> None:
    async with at() as served:
        desk = served.desk
        (desk.paths.logs / "node").mkdir()
        (desk.paths.logs / "node" / "0.log").write_text("one\ntwo\nthree\nunfinished")
        async with Client(desk.paths.root) as client:
            lines = (await client.ask(p.JournalQuery(id=0), p.JournalReply)).lines
            assert any(line.kind == "checkpoint" and line.text.startswith("b:") for line in lines)
            later = await client.ask(p.JournalQuery(id=0, after=lines[-2].index), p.JournalReply)
            assert later.lines == lines[-1:]
            log = await client.ask(p.LogQuery(id=0, file="node/0.log", pattern="t"), p.LogReply)
            assert log.lines == ("two", "three")
            undo = await client.ask(p.UndoQuery(id=0, checkpoint="a"), p.UndoReply)
            assert (undo.steps, undo.tokens) == (15, 15 * 8)
            text = await client.ask(p.TextQuery(id=0, what="recipe"), p.TextReply)
            assert 'name = "desk"' in text.text
            chart = p.ChartQuery(id=0, metric="train/loss", start=0, stop=100, width=20)
            assert (await client.ask(chart, p.ChartReply)).columns
            bad: list[tuple[Any, str]] = [
                (p.LogQuery(id=0, file="../journal/000001.log"), "there is no log"),
                (p.LogQuery(id=0, file="node/0.log", pattern="("), "unterminated"),
                (p.UndoQuery(id=0, checkpoint="nope"), "there is no checkpoint"),
                (p.ChartQuery(id=0, metric="x", start=5, stop=5, width=9), "cannot be drawn"),
                (p.ChartQuery(id=0, metric="x", start=0, stop=5, width=10**9), "cannot be drawn"),
            ]
            for question, says in bad:
                with pytest.raises(ClientError, match=says):
                    await client.ask(question, p.ChartReply)


# Clients


async def test_a_command_whose_connection_breaks_is_given_again_and_takes_effect_once(at: Open) -> None:
    async with at() as served:
        desk = served.desk
        async with Client(desk.paths.root) as client:
            asked = asyncio.create_task(client.command("pause"))
            await desk.until(lambda: desk.orders)
            for _ in range(3):
                assert client._connection is not None
                before = client._connection
                before.transport.abort()
                await desk.until(lambda: client._connection not in (None, before) and client._connected.is_set())  # noqa: B023
            desk.answers(desk.orders[0], step=25)
            view = await asyncio.wait_for(asked, 5)
        assert (view.state, view.step) == ("done", 25)
        assert len(desk.ledger.commands) == 1


async def test_a_question_whose_connection_breaks_is_refused_soon(at: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    async with at() as served, Client(served.desk.paths.root) as client:
        late = asyncio.Event()

        async def never(_: object) -> p.Message:
            await late.wait()
            return p.Refused(reason="too late")

        monkeypatch.setattr(served.desk.term.door._clients._queries, "answer", never)
        asked = asyncio.create_task(client.ask(p.LogQuery(id=0), p.LogReply))
        await asyncio.sleep(0.05)
        assert client._connection is not None
        client._connection.transport.abort()
        with pytest.raises(ClientError, match="broke"):
            await asyncio.wait_for(asked, 5)
        late.set()


async def test_a_client_goes_on_with_the_next_controller(at: Open) -> None:
    links: list[bool] = []
    async with at() as served:
        root = served.desk.paths.root
        client = await Client(root, subscribe=True, on_link=links.append).__aenter__()
        asked = asyncio.create_task(client.command("pause"))
        await served.desk.until(lambda: served.desk.orders)
    async with at(None) as served:
        desk = served.desk
        await desk.until(lambda: links == [True, False, True])
        desk.agent_comes()
        desk.rank_comes()
        desk.answers(desk.orders[0], step=25)
        assert (await asyncio.wait_for(asked, 5)).state == "done"
        await client.__aexit__()


async def test_a_controller_that_sends_nonsense_is_connected_to_anew(at: Open) -> None:
    links: list[bool] = []
    async with at() as served, Client(served.desk.paths.root, subscribe=True, on_link=links.append) as client:
        await served.desk.until(lambda: served.desk.term.door._clients._screens)
        for connection in list(served.desk.term.door._clients._screens):
            await connection.send(b"\xc1")
        await served.desk.until(lambda: links == [True, False, True])
        assert (await client.command("golden", {"checkpoint": "a"}, timeout=5)).state == "done"


async def test_no_outcome_in_time_is_said(at: Open) -> None:
    async with at() as served, Client(served.desk.paths.root) as client:
        with pytest.raises(ClientError, match="no outcome after"):
            await client.command("pause", timeout=0.2)
        view = await client.command("checkpoint", wait=False)
        assert view.state == "queued"


async def test_a_journal_that_cannot_be_written_refuses_the_command(at: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    async with at() as served, Client(served.desk.paths.root) as client:

        def full(*_: j.Entry) -> None:
            raise JournalError("no space left")

        monkeypatch.setattr(served.desk.journal, "append", full)
        view = await client.command("pause", timeout=5)
        assert view.state == "refused"
        assert "nothing can be journaled: no space left (" in view.reason


async def test_without_a_run_or_a_controller_the_client_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="not a run directory"):
        await Client(tmp_path).__aenter__()
    (tmp_path / "journal").mkdir()
    (tmp_path / "recipe.toml").touch()
    with pytest.raises(ClientError, match="midwatch attach starts one"):
        await Client(tmp_path).__aenter__()


async def test_a_client_that_may_starts_a_controller_which_tells_why_it_cannot(tmp_path: Path) -> None:
    (tmp_path / "journal").mkdir()
    (tmp_path / "recipe.toml").write_text("x = 1")
    with pytest.raises(ClientError, match=r"unknown key .* \(log: .*controller\.log\)"):
        await Client(tmp_path, start=True).__aenter__()
    assert "unknown key" in (tmp_path / "logs" / "controller.log").read_text()


async def test_a_client_that_may_starts_a_controller(at: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, over a run that is finished: it answers, and leaves when nobody asks any more."""
    async with at("finished") as served:
        root = served.desk.paths.root
    assert InstantData.done.is_set()
    processes = []
    real = reach_module.start_controller

    def started(directory: Path) -> Any:
        processes.append(real(directory))
        return processes[-1]

    monkeypatch.setattr(reach_module, "start_controller", started)
    async with Client(root, start=True) as client:
        lines = (await client.ask(p.JournalQuery(id=0), p.JournalReply)).lines
        assert any("term 2 began" in line.text for line in lines)
        view = await client.command("golden", {"checkpoint": "b"})
        assert view.state == "done"
    assert await asyncio.to_thread(processes[0].process.wait, 15) == 0
    assert len(processes) == 1
