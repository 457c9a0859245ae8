"""The hosts that the system tests run on: they are what they claim to be, and leave nothing behind."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.system.harness import gone
from tests.system.hosts import Hosts, require

ROOT = Path(__file__).parents[2]

GLOO = """
import datetime, sys, torch, torch.distributed as dist
dist.init_process_group("gloo", init_method=f"tcp://{sys.argv[1]}:29555", rank=int(sys.argv[2]), world_size=2,
                        timeout=datetime.timedelta(seconds=40))
total = torch.tensor([float(sys.argv[2]) + 1])
dist.all_reduce(total)
print(total.item())
"""

LISTEN = """
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.bind(("", 5005)); s.settimeout(float(sys.argv[1]))
print("ready", flush=True)
try: print(s.recv(99).decode())
except TimeoutError: print("nothing")
"""

OWNER = """
import sys, time; from pathlib import Path; from tests.system.hosts import Hosts
with Hosts(("left",), Path(sys.argv[1])) as hosts:
    print(hosts.address("left"), flush=True); time.sleep(60)
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    require()
    with Hosts(("a", "b"), tmp_path_factory.mktemp("hosts")) as made:
        yield made


def heard(hosts: Hosts, host: str, seconds: float) -> str:
    """What a host hears of a datagram that this machine sends."""
    words = hosts.inside(host, sys.executable, "-c", LISTEN, str(seconds))
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as listener, socket.socket(type=socket.SOCK_DGRAM) as us:
        assert listener.stdout is not None and listener.stdout.readline() == "ready\n"
        us.sendto(b"word", (hosts.address(host), 5005))
        return listener.stdout.readline().strip()


def told(hosts: Hosts, host: str, seconds: float) -> str:
    """What this machine hears of a datagram that a host sends."""
    with socket.socket(type=socket.SOCK_DGRAM) as us:
        us.bind((hosts.gateway, 0))
        us.settimeout(seconds)
        send = f"import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'word', {us.getsockname()!r})"
        subprocess.run(hosts.inside(host, sys.executable, "-c", send), check=True)
        with contextlib.suppress(TimeoutError):
            return us.recv(99).decode()
        return "nothing"


def test_a_host_has_a_name_and_directories_of_its_own_and_knows_the_others(hosts: Hosts) -> None:
    for name in hosts.names:
        done = hosts.run(name, "hostname; echo $HOME; echo $XDG_RUNTIME_DIR; getent hosts b; cat")
        lines = done.stdout.splitlines()
        assert lines[0] == name, done.stderr
        assert f"/{name}/" in lines[1] and f"/{name}/" in lines[2]
        assert lines[3].split() == [hosts.address("b"), "b"]


def test_gloo_works_between_two_hosts(hosts: Hosts) -> None:
    environment = {"GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1"}
    variables = [f"{k}={v}" for k, v in environment.items()]
    ranks = [
        subprocess.Popen(
            hosts.inside(host, "env", *variables, sys.executable, "-c", GLOO, hosts.address("a"), str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, host in enumerate(hosts.names)
    ]
    assert [rank.communicate(timeout=60)[0].split()[-1:] for rank in ranks] == [["3.0"], ["3.0"]]


def test_a_killed_host_has_no_process_left_and_comes_back(hosts: Hosts) -> None:
    hosts.run("b", "nohup setsid sleep 100 >/dev/null 2>&1 &")
    assert len(hosts.pids("b")) >= 2
    hosts.kill("b")
    assert hosts.pids("b") == []
    hosts.restart("b")
    assert hosts.run("b", "hostname").stdout == "b\n"


def test_a_link_is_cut_one_way_or_both_and_mended(hosts: Hosts) -> None:
    def ways() -> tuple[bool, bool]:
        return heard(hosts, "a", 0.4) == "word", told(hosts, "a", 0.4) == "word"

    assert ways() == (True, True)
    hosts.cut("a", "in")
    assert ways() == (False, True)
    hosts.mend("a")
    hosts.cut("a", "out")
    assert ways() == (True, False)
    hosts.cut("a")
    assert ways() == (False, False)
    hosts.mend("a")
    assert ways() == (True, True)


def test_a_delayed_link_is_late_by_that_much_and_no_later_once_mended(hosts: Hosts) -> None:
    def seconds() -> float:
        began = time.monotonic()
        socket.create_connection((hosts.address("a"), 22), timeout=10).close()
        return time.monotonic() - began

    hosts.delay("a", 100)
    assert 0.2 <= seconds() < 1.0
    hosts.delay("a", 2, loss_percent=3)
    many = hosts.run("a", "head -c 3000000 /dev/zero")
    assert len(many.stdout) == 3_000_000, "TCP makes good what is lost"
    hosts.mend("a")
    assert seconds() < 0.15


def test_a_directory_is_hidden_from_one_host_only(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    hosts.hide("a", tmp_path)
    assert [hosts.run(name, f"ls {tmp_path}").stdout for name in hosts.names] == ["", "file\n"]
    hosts.show("a", tmp_path)
    assert hosts.run("a", f"ls {tmp_path}").stdout == "file\n"


def left(prefix: str) -> list[str]:
    spaces = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    links = subprocess.run(["ip", "-br", "link"], capture_output=True, text=True, check=True).stdout.split()
    return [
        *(s for s in spaces if s.startswith(f"{prefix}-")),
        *(link for link in links if link.startswith(f"{prefix}@")),
        *(str(f) for f in Path("/tmp").glob(f"{prefix}-*")),
    ]


def test_nothing_is_left_after_a_failure(tmp_path: Path) -> None:
    require()
    with contextlib.suppress(ZeroDivisionError), Hosts(("c",), tmp_path) as hosts:
        hosts.delay("c", 5)
        hosts.run("c", "nohup setsid sleep 100 >/dev/null 2>&1 &")
        prefix = f"mw{hosts.gateway.split('.')[2]}"
        processes = [psutil.Process(pid) for pid in hosts.pids("c") if psutil.pid_exists(pid)]
        assert len(left(prefix)) >= 4 and len(processes) >= 2, "sshd, the sleeper, and perhaps a session that is about to end"
        raise ZeroDivisionError
    assert left(prefix) == []
    assert gone(processes, 5)


def test_what_a_killed_owner_left_is_swept_away_by_the_next(tmp_path: Path) -> None:
    require()
    with subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        address = owner.stdout.readline().strip()
        owner.kill()
    prefix = f"mw{address.split('.')[2]}"
    assert left(prefix) != []
    held: list[Hosts] = []
    with contextlib.ExitStack() as stack:
        while not held or held[-1].gateway.split(".")[2] != address.split(".")[2]:
            held.append(stack.enter_context(Hosts(("d",), tmp_path / str(len(held)))))
        assert held[-1].run("d", "hostname").stdout == "d\n"
        assert not any("left" in each for each in left(prefix))
    assert left(prefix) == []
