"""Who may do what, by the kernel's word; and which controller is in office when machines share a run's storage."""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import grp
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from launcher_desk import RECIPE, desk_at, make_recipe
from test_launcher_server import Served

from launcher.cli.runs import check_recipe
from midwatch import protocol as p
from midwatch.recipe import RecipeError
from midwatch.run_directory import (
    Address,
    RunPaths,
    beat,
    controller_lives,
    find_controller,
    host_name,
    read_address,
    say_farewell,
    write_address,
)
from midwatch.transport.access import is_member, socket_directory
from midwatch.transport.client import Client, ClientError

Open = Callable[..., Any]
as_root = pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be other users")

SPEAK = """
import os, sys
from pathlib import Path
import msgspec
from websockets.sync.client import unix_connect
from websockets.exceptions import WebSocketException
from midwatch import protocol as p
user, group, path, *frames = sys.argv[1:]
os.setgroups([]); os.setgid(int(group)); os.setuid(int(user))
try:
    with unix_connect(path, uri="ws://x/", compression=None) as connection:
        for frame in frames:
            connection.send(bytes.fromhex(frame))
            print(type(answer := p.decode(connection.recv(5))).__name__, getattr(answer, "reason", ""), flush=True)
            if isinstance(answer, p.CommandReply):
                print(answer.command.author, answer.command.state)
except (OSError, WebSocketException) as error:
    print(type(error).__name__)
"""


async def speak(user: str, path: Path, *messages: p.Message) -> list[str]:
    """What a user is answered."""
    entry = pwd.getpwnam(user)
    words = [sys.executable, "-c", SPEAK, str(entry.pw_uid), str(entry.pw_gid), str(path), *(p.encode(m).hex() for m in messages)]
    done = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, timeout=30, cwd=Path(__file__).parents[2])
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()


@pytest.fixture
def at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """A desk whose socket everybody reaches: the directory's guard is left out."""

    @contextlib.asynccontextmanager
    async def opened(operators: str | None = None) -> AsyncIterator[Served]:
        recipe = make_recipe()
        recipe = msgspec.structs.replace(recipe, cluster=msgspec.structs.replace(recipe.cluster, operators=operators))
        async with desk_at(tmp_path / "run", monkeypatch, "training", recipe) as desk:
            room = Path(os.environ["XDG_RUNTIME_DIR"])
            served = Served(desk, room / f"{desk.context.term}.sock")
            await served.open()
            served.mode = served.path.stat().st_mode & 0o777  # type: ignore[attr-defined]
            room.chmod(0o755)
            served.path.chmod(0o666)
            try:
                yield served
            finally:
                await served.close()

    return opened


CLIENT, GOLDEN = p.ClientHello(version=p.VERSION), p.Command(id="x", verb="golden", arguments={"checkpoint": "a"})
STOP = p.Command(id="y", verb="stop")


# Users


@as_root
async def test_a_stranger_is_told_whose_the_run_is_and_is_counted(at: Open) -> None:
    async with at() as served:
        assert served.mode == 0o600
        assert await speak("nobody", served.path, CLIENT) == [f"Refused you are nobody; this run is for {getpass.getuser()}"]
        assert served.turned_away == 1
        assert await speak("nobody", served.path, p.AgentHello(version=1, run="r", node="n", pid=1, generation=0)) != []
        assert served.turned_away == 2
        assert served.desk.ledger.commands == {}


@as_root
async def test_an_operator_of_the_group_watches_and_commands_under_their_own_name(at: Open) -> None:
    async with at("nogroup") as served:
        assert served.mode == 0o660
        assert served.path.stat().st_gid == grp.getgrnam("nogroup").gr_gid
        said = await speak("nobody", served.path, CLIENT, GOLDEN)
        assert said == ["ClientWelcome ", "CommandReply ", "nobody done"]
        assert served.desk.ledger.commands[1].author == "nobody"
        said = await speak("nobody", served.path, msgspec.structs.replace(CLIENT, read_only=True), STOP)
        assert said == ["ClientWelcome ", "CommandReply ", "nobody refused"]
        assert served.turned_away == 0


@as_root
async def test_an_operator_is_neither_agent_nor_rank_and_who_is_not_of_the_group_is_nothing(at: Open) -> None:
    async with at("nogroup") as served:
        agent = p.AgentHello(version=p.VERSION, run=served.desk.context.run, node="n", pid=1, generation=0)
        assert (await speak("nobody", served.path, agent))[0].startswith("Refused you are nobody; agents and ranks")
        rank = p.RankHello(version=p.VERSION, run="desk", generation=1, term=1, pid=1, world=1)
        assert (await speak("nobody", served.path, rank))[0].startswith("Refused you are nobody; agents and ranks")
        said = await speak("daemon", served.path, CLIENT)
        assert said == ["Refused you are daemon; this run is for root, and members of the group nogroup"]
        assert served.turned_away == 3
        assert "n" not in served.desk.context.live.nodes


def test_members_are_those_of_the_systems_database() -> None:
    me = pwd.getpwuid(os.getuid())
    assert is_member(me.pw_uid, me.pw_gid)
    assert all(is_member(me.pw_uid, g) for g in os.getgrouplist(me.pw_name, me.pw_gid))
    assert not is_member(me.pw_uid, 4_000_000)
    assert not is_member(4_000_000, me.pw_gid)


@as_root
async def test_only_the_runs_owner_starts_a_controller(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    paths.create()
    paths.recipe.touch()
    os.chown(paths.root, pwd.getpwnam("daemon").pw_uid, -1)
    with pytest.raises(ClientError, match="only daemon, whose run it is"):
        await Client(paths.root, start=True).__aenter__()
    assert not list(paths.logs.iterdir())


# The operators' directory


@pytest.fixture
def directory() -> Iterator[Path]:
    name = grp.getgrgid(os.getgid()).gr_name
    path = Path("/tmp") / f"midwatch-{os.getuid()}-{name}"
    if path.exists() or path.is_symlink():
        pytest.skip(f"{path} is in use")
    yield path
    if path.is_symlink():
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def test_the_operators_directory_lets_the_group_in_and_nobody_else(directory: Path) -> None:
    group = grp.getgrgid(os.getgid())
    assert socket_directory(group.gr_name, group.gr_gid) == directory
    status = directory.stat()
    assert (status.st_mode & 0o777, status.st_gid, status.st_uid) == (0o750, group.gr_gid, os.getuid())
    directory.chmod(0o777)
    assert socket_directory(group.gr_name, group.gr_gid).stat().st_mode & 0o777 == 0o750


def test_a_symlink_in_its_place_is_refused(directory: Path, tmp_path: Path) -> None:
    group = grp.getgrgid(os.getgid())
    directory.symlink_to(tmp_path)
    before = tmp_path.stat().st_mode
    with pytest.raises(PermissionError, match="must be a directory of yours"):
        socket_directory(group.gr_name, group.gr_gid)
    assert tmp_path.stat().st_mode == before


@as_root
def test_somebody_elses_directory_in_its_place_is_refused(directory: Path) -> None:
    group = grp.getgrgid(os.getgid())
    directory.mkdir()
    os.chown(directory, pwd.getpwnam("nobody").pw_uid, -1)
    with pytest.raises(PermissionError, match="must be a directory of yours"):
        socket_directory(group.gr_name, group.gr_gid)


def test_a_group_that_is_not_there_is_named_with_the_recipes_key_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(RECIPE + '\n[cluster]\noperators = "nosuchgroup"\n')
    with pytest.raises(RecipeError, match=r'r\.toml: \[cluster\] operators: there is no group "nosuchgroup"'):
        check_recipe(recipe)
    paths = RunPaths(tmp_path / "run")
    paths.create()
    paths.recipe.write_text(recipe.read_text())
    done = subprocess.run(
        [sys.executable, "-P", "-m", "launcher.controller", paths.root], capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 2
    assert "[cluster] operators" in done.stderr and "Traceback" not in done.stderr
    assert not list(paths.journal.iterdir()), "no term is begun"


# Which controller is in office


def elsewhere(paths: RunPaths, remote: str = "", age: float = 0.0) -> Address:
    address = Address(term=3, url="unix:/nowhere", host="head.far", pid=1, remote=remote)
    write_address(paths.address, address)
    grow_old(paths, age)
    return address


def grow_old(paths: RunPaths, age: float) -> None:
    then = time.time() - age
    os.utime(paths.address, (then, then))


def test_a_controller_on_another_machine_lives_as_long_as_its_address_is_touched_or_its_port_answers(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.create()
    assert find_controller(paths) == "nowhere"
    elsewhere(paths, age=15)
    assert find_controller(paths) == "elsewhere"
    elsewhere(paths, age=25)
    assert find_controller(paths) == "nowhere" and not controller_lives(paths)
    with socket.create_server(("127.0.0.1", 0)) as server:
        remote = f"wss://127.0.0.1:{server.getsockname()[1]}"
        for age in (0, 25):
            elsewhere(paths, remote, age)
            assert find_controller(paths) == "elsewhere"
    elsewhere(paths, remote, 0)
    assert find_controller(paths) == "silent" and controller_lives(paths)
    grow_old(paths, 25)
    assert find_controller(paths) == "nowhere"
    assert [f.name for f in paths.address.parent.iterdir()] == ["address"]


def test_a_beat_keeps_the_address_young_and_does_not_speak_for_a_later_controller(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.create()
    address = elsewhere(paths, age=25)
    beat(paths.address, address)
    assert find_controller(paths) == "elsewhere"
    assert paths.address.stat().st_mode & 0o777 == 0o644
    say_farewell(paths.address, 3)
    assert find_controller(paths) == "nowhere", "one that has left need not grow old"
    paths.address.unlink()
    beat(paths.address, address)
    assert read_address(paths.address) == address, "a lost address is written anew"
    later = msgspec.structs.replace(address, term=4)
    write_address(paths.address, later)
    grow_old(paths, 25)
    beat(paths.address, address)
    say_farewell(paths.address, 3)
    assert read_address(paths.address) == later
    assert find_controller(paths) == "nowhere"


@as_root
async def test_when_a_controllers_machine_is_gone_the_next_head_takes_over_and_the_old_one_yields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines: another host name, and a runtime directory that only the other sees."""
    async with desk_at(tmp_path / "run", monkeypatch, "finished") as desk:
        paths = desk.paths
    far = Path(os.environ["XDG_RUNTIME_DIR"]) / "far"
    far.mkdir(mode=0o700)
    log = (tmp_path / "far.log").open("wb")
    shell = f"mount -t tmpfs -o mode=700 none {far} && hostname head-far && exec {sys.executable} -P -m launcher.controller"
    words = ["unshare", "--uts", "--mount", "sh", "-c", f"{shell} {paths.root}"]
    old = subprocess.Popen(words, env={**os.environ, "XDG_RUNTIME_DIR": str(far)}, stderr=log)
    try:
        while (address := read_address(paths.address)) is None:
            await asyncio.sleep(0.02)
        assert address.host == "head-far" != host_name()
        with pytest.raises(ClientError, match=f"the controller is on head-far; from here: ssh://head-far/{paths.root}"):
            await Client(paths.root, start=True).__aenter__()
        old.send_signal(signal.SIGSTOP)
        grow_old(paths, 25)
        async with Client(paths.root, start=True) as client:
            assert client.welcome is not None and client.welcome.term == address.term + 1
            old.send_signal(signal.SIGCONT)
            assert await asyncio.to_thread(old.wait, 10) == 0
            assert (await client.command("golden", {"checkpoint": "a"})).state == "done"
        assert "ousted" in (tmp_path / "far.log").read_text()
        assert json.loads(paths.address.read_text())["host"] == host_name()
    finally:
        log.close()
        if old.poll() is None:
            old.kill()
            old.wait()
        pid = json.loads(paths.address.read_text())["pid"]
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
