"""Runs on other machines, through ssh: the operator's own, a stand-in that runs the words here, and a real sshd."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from launcher_desk import desk_at
from test_launcher_server import Served

from launcher.cli.relay import pump
from launcher.cli.runs import NoSuchRun, find_anywhere, find_run, remember
from midwatch import protocol as p
from midwatch.transport.client import Client, ClientError
from midwatch.transport.ssh_url import RemoteError, RemoteRun, parse_remote

ROOT = Path(__file__).parents[2]
MIDWATCH = f"{sys.executable} -P -m midwatch"
SSHD = Path("/usr/sbin/sshd")

STAND_IN = """#!/bin/sh
echo $$ >> "$STAND_IN_LOG.pids"
printf '%s\\n' "$@" >> "$STAND_IN_LOG"
[ -n "$STAND_IN_FAILS" ] && { echo "Warning: something else" >&2; echo "$STAND_IN_FAILS" >&2; exit 255; }
[ -n "$STAND_IN_CHATTERS" ] && echo "Welcome to the cluster"
while [ $# -gt 0 ]; do
    case $1 in -p|-o) shift 2;; -*) shift;; *) break;; esac
done
shift
exec sh -c "exec $*"
"""

Open = Callable[..., Any]


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ssh that runs the command here, first on PATH; the value is where it notes its arguments."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "ssh").write_text(STAND_IN)
    (tools / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN_LOG", str(tmp_path / "ssh.log"))
    monkeypatch.setenv("MIDWATCH_REMOTE", MIDWATCH)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return tmp_path / "ssh.log"


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


def pids(log: Path) -> list[int]:
    return [int(line) for line in Path(f"{log}.pids").read_text().split()]


# Addresses


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("ssh://head/demo", RemoteRun("head", None, "demo")),
        ("ssh://ann@head.cluster:2222/demo-2", RemoteRun("ann@head.cluster", 2222, "demo-2")),
        ("ssh://head//scratch/runs/demo", RemoteRun("head", None, "/scratch/runs/demo")),
        ("ssh://ann@[fe80::1]:22/demo", RemoteRun("ann@fe80::1", 22, "demo")),
        ("runs/demo", None),
    ],
)
def test_an_address_names_host_port_and_run(text: str, means: RemoteRun | None) -> None:
    assert parse_remote(text) == means


@pytest.mark.parametrize(
    "text",
    [
        "ssh://",
        "ssh://head",
        "ssh://head/",
        "ssh:///demo",
        "ssh://-oProxyCommand=x/demo",
        "ssh://-l@head/demo",
        "ssh://ann@-head/demo",
        "ssh://he ad/demo",
        "ssh://head:port/demo",
        "ssh://head/-x",
        "ssh://head/a\nb",
        "ssh://a@b@c/demo",
    ],
)
def test_what_would_be_an_option_or_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(RemoteError, match="must be ssh://"):
        parse_remote(text)
    with pytest.raises(NoSuchRun, match="must be ssh://"):
        find_anywhere(text)


def test_what_is_sent_to_the_other_shell_is_quoted_and_a_screen_never_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MIDWATCH_REMOTE")
    words = RemoteRun("ann@head", 2222, "a run; rm -rf $HOME").command(prompts=False)
    assert words[:-1] == ["ssh", "-T", "-C", "-p", "2222", "-o", "BatchMode=yes", "ann@head"]
    assert words[-1] == "midwatch relay 'a run; rm -rf $HOME'"
    assert "BatchMode=yes" not in RemoteRun("head", None, "r").command(prompts=True)


def test_a_command_that_reads_files_says_where_to_give_it() -> None:
    with pytest.raises(NoSuchRun, match="run it on the machine that has them"):
        find_run("ssh://head/demo")


# The client


async def test_a_client_watches_asks_and_commands_through_ssh_and_leaves_nothing_behind(at: Open, stand_in: Path) -> None:
    async with at() as served:
        remote = RemoteRun("head", 2222, str(served.desk.paths.root))
        seen: list[p.Snapshot] = []
        async with Client(remote, subscribe=True, on_snapshot=seen.append) as client:
            await served.desk.until(lambda: seen)
            assert seen[0].run == "desk"
            view = await client.command("golden", {"checkpoint": "a"}, timeout=10)
            assert (view.state, view.author) == ("done", "root" if os.getuid() == 0 else view.author)
            assert (await client.ask(p.JournalQuery(id=0), p.JournalReply)).lines
        assert stand_in.read_text().splitlines()[:5] == ["-T", "-C", "-p", "2222", "head"]
        await served.desk.until(lambda: served.desk.term.door.clients == 0)
        assert not any(psutil.pid_exists(pid) for pid in pids(stand_in))


async def test_a_broken_ssh_is_started_again_and_a_command_under_way_takes_effect_once(at: Open, stand_in: Path) -> None:
    links: list[bool] = []
    async with at() as served:
        remote = RemoteRun("head", None, str(served.desk.paths.root))
        async with Client(remote, subscribe=True, on_link=links.append) as client:
            asked = asyncio.create_task(client.command("pause"))
            await served.desk.until(lambda: served.desk.orders)
            psutil.Process(pids(stand_in)[0]).kill()
            await served.desk.until(lambda: links == [True, False, True], 15)
            served.desk.answers(served.desk.orders[0], step=25)
            assert (await asyncio.wait_for(asked, 10)).state == "done"
        assert len(served.desk.ledger.commands) == 1
        assert len(pids(stand_in)) == 2


async def test_a_large_answer_comes_whole(at: Open) -> None:
    async with at() as served:
        for number in range(300):
            served.desk.context.note("info", f"{number} " + "x" * 20_000)
        async with Client(RemoteRun("head", None, str(served.desk.paths.root))) as client:
            lines = (await client.ask(p.JournalQuery(id=0, limit=5000), p.JournalReply)).lines
        assert sum(len(line.text) for line in lines) > 300 * 20_000


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"STAND_IN_FAILS": "ssh: connect to host head port 22: No route to host"}, "head: ssh: connect to host head .* No route"),
        ({"MIDWATCH_REMOTE": "/nowhere/midwatch"}, "head: .*not found.*MIDWATCH_REMOTE"),
        ({}, "head: .*neither a run directory nor the name of a run"),
    ],
    ids=["no route", "no midwatch", "no run"],
)
async def test_why_there_is_no_connection_is_said_in_a_sentence(
    variables: dict[str, str], says: str, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ClientError, match=says) as caught:
        await Client(RemoteRun("head", None, "nosuch"), start=True).__aenter__()
    assert "\n" not in str(caught.value)
    assert not any(psutil.pid_exists(pid) for pid in pids(stand_in))


async def test_login_scripts_that_print_are_named_as_what_spoils_the_connection(at: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_CHATTERS", "yes")
    async with at() as served:
        with pytest.raises(ClientError, match=r"head: .*login scripts"):
            await Client(RemoteRun("head", None, str(served.desk.paths.root))).__aenter__()


async def test_a_screen_that_cannot_ask_says_what_to_see_to(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN_FAILS", "ann@head: Permission denied (publickey,password).")
    with pytest.raises(ClientError, match=r"Permission denied.*a screen cannot ask"):
        await Client(RemoteRun("ann@head", None, "x"), prompts=False).__aenter__()


# The command line


def midwatch(*words: str, **more: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "midwatch", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=40, **more)


async def test_every_command_that_needs_only_the_controller_takes_an_ssh_address(at: Open) -> None:
    async with at() as served:
        remember(served.desk.paths.root)
        address = "ssh://head/run"

        async def told(*words: str) -> subprocess.CompletedProcess[str]:
            return await asyncio.to_thread(midwatch, *words)

        golden, metrics, logs = await asyncio.gather(
            told("golden", address, "b", "--json"),
            told("metrics", address, "train/loss", "-n", "3"),
            told("logs", address),
        )
        assert json.loads(golden.stdout)["state"] == "done"
        assert len(metrics.stdout.splitlines()) == 3
        assert (logs.returncode, logs.stdout) == (2, "") and "run it on the machine that has them" in logs.stderr


async def test_a_headless_reporter_follows_a_run_on_another_machine(at: Open) -> None:
    async with at("finished") as served:
        done = await asyncio.to_thread(midwatch, "attach", f"ssh://head/{served.desk.paths.root}", "--headless", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout.splitlines()[-1])["state"] == "finished"


async def test_relay_starts_a_controller_where_none_lives(at: Open) -> None:
    async with at("finished") as served:
        root = served.desk.paths.root
    async with Client(RemoteRun("head", None, str(root))) as client:
        lines = (await client.ask(p.JournalQuery(id=0), p.JournalReply)).lines
        assert any("term 2 began" in line.text for line in lines)
        pid = json.loads(served.desk.paths.address.read_text())["pid"]
    psutil.Process(pid).terminate()
    psutil.Process(pid).wait(10)


async def test_a_run_without_a_controller_is_looked_at_through_ssh_and_a_command_wakes_one(at: Open) -> None:
    async with at("finished") as served:
        root = served.desk.paths.root
    async with Client(RemoteRun("head", None, str(root)), subscribe=True, looks="when over") as client:
        assert client.welcome is not None and client.welcome.archived
        lines = (await client.ask(p.JournalQuery(id=0), p.JournalReply)).lines
        assert not any("term 2 began" in line.text for line in lines)
        view = await client.command("golden", {"checkpoint": "b"}, timeout=30)
        assert view.state == "done" and client.welcome is not None and client.welcome.term == 2
        pid = json.loads(served.desk.paths.address.read_text())["pid"]
    psutil.Process(pid).terminate()
    psutil.Process(pid).wait(10)


def test_relay_says_why_it_cannot_in_one_line_and_nothing_on_its_output(tmp_path: Path) -> None:
    done = midwatch("relay", "nosuch", stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    (tmp_path / "r" / "journal").mkdir(parents=True)
    (tmp_path / "r" / "recipe.toml").write_text("x = 1")
    done = midwatch("relay", str(tmp_path / "r"), stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert "controller.log" in done.stderr


# The pump


@pytest.fixture
def pumping() -> Iterator[tuple[socket.socket, socket.socket, threading.Thread]]:
    """(the client's end, the controller's end, the pump between them), the client's end in and out at once as sshd makes it."""
    client, near = socket.socketpair()
    far, controller = socket.socketpair()
    duplicate = os.dup(near.fileno())

    def work() -> None:
        pump(near.fileno(), duplicate, far)
        for end in (near, far):
            end.close()
        os.close(duplicate)

    thread = threading.Thread(target=work, name="pump")
    thread.start()
    yield client, controller, thread
    client.close()
    controller.close()
    thread.join(5)
    assert not thread.is_alive()


Pumping = tuple[socket.socket, socket.socket, threading.Thread]


def read_all(end: socket.socket) -> bytes:
    return b"".join(iter(lambda: end.recv(65536), b""))


def test_bytes_pass_both_ways_at_once_however_slowly_they_are_taken(pumping: Pumping) -> None:
    client, controller, _ = pumping
    out, back = os.urandom(3_000_000), os.urandom(3_000_000)
    senders = [threading.Thread(target=client.sendall, args=(out,)), threading.Thread(target=controller.sendall, args=(back,))]
    for sender in senders:
        sender.start()
    time.sleep(0.1)
    got = {client: b"", controller: b""}
    readers = []
    for end, number in ((client, len(back)), (controller, len(out))):

        def read(end: socket.socket = end, number: int = number) -> None:
            while len(got[end]) < number:
                got[end] += end.recv(50_000)

        readers.append(threading.Thread(target=read))
    for thread in readers:
        thread.start()
    for thread in [*senders, *readers]:
        thread.join(10)
    assert got[client] == back and got[controller] == out


@pytest.mark.parametrize("ends", ["client", "controller"])
def test_when_one_side_ends_the_other_gets_the_rest_and_the_end(ends: str, pumping: Pumping) -> None:
    client, controller, thread = pumping
    ending, staying = (client, controller) if ends == "client" else (controller, client)
    ending.sendall(b"x" * 100_000)
    ending.shutdown(socket.SHUT_WR)
    assert len(read_all(staying)) == 100_000
    thread.join(5)
    assert not thread.is_alive()


def test_it_ends_when_a_side_vanishes_while_the_other_says_nothing(pumping: Pumping) -> None:
    client, _, thread = pumping
    client.close()
    thread.join(3)
    assert not thread.is_alive()


# A real sshd


@pytest.mark.skipif(not SSHD.exists() or os.getuid() != 0, reason="needs root and sshd")
async def test_through_a_real_sshd(at: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"].partition(":")[2])  # no stand-in
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / name], check=True)
    (tmp_path / "keys").write_bytes((tmp_path / "user.pub").read_bytes())
    config = f"""Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/keys\nUsePAM no
StrictModes no\nPidFile none\nPermitRootLogin yes\n"""
    (tmp_path / "sshd_config").write_text(config)
    Path("/run/sshd").mkdir(exist_ok=True)
    # ssh takes the home of the user database, not of the environment: the configuration goes in as the command's own
    wrapper = tmp_path / "real" / "ssh"
    wrapper.parent.mkdir()
    options = f"-F none -i {tmp_path}/user -o StrictHostKeyChecking=no -o UserKnownHostsFile={tmp_path}/known"
    wrapper.write_text(f'#!/bin/sh\nexec /usr/bin/ssh {options} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    names = ("HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "PYTHONPATH")
    there = " ".join(f"{name}={os.environ[name]}" for name in names)
    monkeypatch.setenv("MIDWATCH_REMOTE", f"env {there} {MIDWATCH}")
    server = subprocess.Popen([SSHD, "-D", "-e", "-f", tmp_path / "sshd_config"], stderr=subprocess.DEVNULL)
    try:
        async with at() as served:
            remote = RemoteRun("root@127.0.0.1", port, str(served.desk.paths.root))

            async def listens() -> None:
                while True:
                    with contextlib.suppress(OSError):
                        (await asyncio.open_connection("127.0.0.1", port))[1].close()
                        return
                    await asyncio.sleep(0.05)

            await asyncio.wait_for(listens(), 10)
            seen: list[p.Snapshot] = []
            async with Client(remote, subscribe=True, prompts=False, on_snapshot=seen.append) as client:
                assert (await client.command("golden", {"checkpoint": "a"}, timeout=10)).state == "done"
                await served.desk.until(lambda: seen)
            await served.desk.until(lambda: served.desk.term.door.clients == 0)
    finally:
        server.terminate()
        server.wait(10)
