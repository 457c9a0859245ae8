"""A run without a controller is shown from its files, and given up to a controller as soon as there is one."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from launcher_desk import desk_at
from test_launcher_server import Served

from launcher.controller.archive import serving_in_thread
from midwatch import protocol as p
from midwatch.run_directory import RunPaths, find_controller
from midwatch.transport import discovery as reach_module
from midwatch.transport.client import Client, ClientError


@contextlib.asynccontextmanager
async def controlled(root: Path, monkeypatch: pytest.MonkeyPatch, state: p.State | None) -> AsyncIterator[Served]:
    async with desk_at(root, monkeypatch, state) as desk:
        served = Served(desk, Path(os.environ["XDG_RUNTIME_DIR"]) / f"{desk.context.term}.sock")
        await served.open()
        try:
            yield served
        finally:
            await served.close()


async def left_behind(root: Path, monkeypatch: pytest.MonkeyPatch, state: p.State) -> p.Snapshot:
    """A run whose controller has gone; what that one showed last."""
    async with controlled(root, monkeypatch, state) as served:
        return served.desk.term.door._clients._view.snapshot()


def everything(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (root, *root.rglob("*"))}


@pytest.mark.parametrize("state", ["finished", "failed", "released", "paused"])
async def test_the_files_say_what_the_controller_said(state: p.State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "run"
    before = await left_behind(root, monkeypatch, state)
    files = everything(root)
    arrived = asyncio.Event()
    async with Client(root, subscribe=True, looks="always", on_snapshot=lambda _: arrived.set()) as client:
        await asyncio.wait_for(arrived.wait(), 5)
        assert client.welcome is not None and client.welcome.archived
        now = client.snapshot
        assert now is not None and now.archived and "no controller is running" in now.reason
        for field in (
            "state",
            "step",
            "total_steps",
            "lineage",
            "generation",
            "checkpoints",
            "commands",
            "settings",
            "latest",
        ):
            assert getattr(now, field) == getattr(before, field), field
        rows = (await client.ask(p.MetricsQuery(id=0, names=("train/loss",), last=100), p.MetricsReply)).rows["train/loss"]
        assert [row.step for row in rows] == list(range(1, len(rows) + 1)) and len(rows) >= 20
        lines = (await client.ask(p.JournalQuery(id=0), p.JournalReply)).lines
        assert lines[-len(before.events) :] == before.events
        chart = p.ChartQuery(id=0, metric="train/loss", start=0, stop=26, width=10)
        assert (await client.ask(chart, p.ChartReply)).columns
    assert everything(root) == files


async def test_only_what_is_over_is_shown_so_where_a_controller_may_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Path] = []

    def start(directory: Path) -> reach_module.Starting:
        started.append(directory)
        raise ClientError("not in this test")

    monkeypatch.setattr(reach_module, "start_controller", start)
    await left_behind(tmp_path / "over", monkeypatch, "released")
    async with Client(tmp_path / "over", start=True, looks="when over") as client:
        assert client.welcome is not None and client.welcome.archived
    assert not started
    await left_behind(tmp_path / "on", monkeypatch, "training")
    with pytest.raises(ClientError, match="not in this test"):
        await Client(tmp_path / "on", start=True, looks="when over").__aenter__()
    assert started == [tmp_path / "on"]


async def test_who_looks_goes_over_to_a_controller_that_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "run"
    await left_behind(root, monkeypatch, "released")
    async with Client(root, subscribe=True, looks="when over") as client:
        assert client.welcome is not None and client.welcome.archived
        async with controlled(root, monkeypatch, None) as served:
            await served.desk.until(lambda: client.welcome is not None and not client.welcome.archived)
            await served.desk.until(lambda: client.snapshot is not None and not client.snapshot.archived)
            view = await client.command("golden", {"checkpoint": "a"})
            assert view.state == "done" and client.snapshot is not None and client.snapshot.term == 2
        await asyncio.sleep(0)


async def test_a_command_wakes_a_controller_and_goes_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real one, in the place of the files that were shown."""
    root = tmp_path / "run"
    await left_behind(root, monkeypatch, "finished")
    async with Client(root, start=True, looks="when over") as client:
        assert client.welcome is not None and client.welcome.archived
        view = await client.command("golden", {"checkpoint": "b"}, timeout=30)
        assert view.state == "done"
        assert client.welcome is not None and (client.welcome.archived, client.welcome.term) == (False, 2)


async def test_an_archive_is_for_its_user_and_answers_no_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "run"
    await left_behind(root, monkeypatch, "finished")
    with serving_in_thread(RunPaths(root)) as address:
        client = Client(root)
        connection = await client._connect(address)
        await connection.send(p.encode(p.Command(id="x", verb="pause")))
        answer = p.decode(await connection.recv())
        assert isinstance(answer, p.CommandReply)
        assert (answer.command.state, answer.command.reason) == ("refused", "no controller is running")
        await connection.close()


def test_whether_a_controller_lives_is_found_without_writing(tmp_path: Path) -> None:
    """Also where the last one was on another machine, whose sign of life is compared with this machine's clock."""
    paths = RunPaths(tmp_path)
    paths.create()
    paths.address.write_text('{"term":1,"url":"unix:/x","host":"elsewhere","pid":1}')
    before = everything(tmp_path)
    assert find_controller(paths, write=False) == "elsewhere"
    assert everything(tmp_path) == before
    os.utime(paths.address, (0, 0))  # it has said farewell
    assert find_controller(paths, write=False) == "nowhere"
