"""Ranks forked from one process: real processes of `trainer`, which end as they would have ended alone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from launcher.agent.forkserver import ForkServerError, ForkServers

pytest.importorskip("torch")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def code(tmp_path: Path) -> Path:
    """A copy of the packages that a rank reads, which a test may change."""
    directory = tmp_path / "code"
    for name in ("launcher", "shards", "trainer"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    return directory


@pytest.fixture
def servers(tmp_path: Path, code: Path) -> Iterator[ForkServers]:
    servers = ForkServers(tmp_path / "run", {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1", "KEPT": "yes"})
    yield servers
    servers.close()


def wait(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_forked_rank_has_its_own_arguments_environment_log_and_status(servers: ForkServers, tmp_path: Path) -> None:
    log = tmp_path / "0.log"
    rank = servers.fork([str(tmp_path / "none")], {"MIDWATCH_LOG": str(log), "RANK": "0"})
    assert rank.wait(20) == 2, "there is no such run"
    assert rank.poll() == 2
    assert "recipe" in log.read_text() and "Traceback" not in log.read_text()
    with pytest.raises(subprocess.TimeoutExpired):
        waiting(servers, tmp_path).wait(0.2)


def waiting(servers: ForkServers, tmp_path: Path):  # type: ignore[no-untyped-def]
    """A rank that waits for ever in its first lines: nobody writes to the FIFO it opens as its log."""
    fifo = tmp_path / f"fifo-{time.monotonic_ns()}"
    os.mkfifo(fifo)
    return servers.fork([str(tmp_path / "none")], {"MIDWATCH_LOG": str(fifo), "RANK": "7"})


def test_a_forked_rank_looks_like_any_other_and_ends_by_signals(servers: ForkServers, tmp_path: Path) -> None:
    rank = waiting(servers, tmp_path)
    process = psutil.Process(rank.pid)
    wait(lambda: os.getpgid(rank.pid) == rank.pid, 5)
    assert process.cmdline()[-3:] == ["-m", "trainer", str(tmp_path / "run")]
    assert rank.poll() is None
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(5) == -signal.SIGTERM
    rank.send_signal(signal.SIGTERM)


def test_its_ranks_die_with_the_fork_server_and_another_takes_its_place(servers: ForkServers, tmp_path: Path) -> None:
    rank = waiting(servers, tmp_path)
    parent = psutil.Process(rank.pid).ppid()
    os.kill(parent, signal.SIGKILL)
    assert rank.wait(5) == -signal.SIGKILL
    wait(lambda: not psutil.pid_exists(rank.pid), 5)
    again = waiting(servers, tmp_path)
    assert psutil.Process(again.pid).ppid() != parent


def test_changed_code_is_read_anew(servers: ForkServers, code: Path, tmp_path: Path) -> None:
    before = waiting(servers, tmp_path)
    early = code / "trainer" / "process" / "bootstrap.py"
    early.write_text(early.read_text().replace("AGENT_DIED = 70", "AGENT_DIED = 71"))
    after = waiting(servers, tmp_path)
    assert psutil.Process(after.pid).ppid() != psutil.Process(before.pid).ppid()
    assert before.poll() is None, "those that run are left alone"
    before.send_signal(signal.SIGKILL)
    assert before.wait(5) == -signal.SIGKILL, "and their end is still told"


@pytest.mark.soak  # what it does shorter tests do in parts
def test_one_that_stands_still_is_replaced(servers: ForkServers, tmp_path: Path) -> None:
    rank = waiting(servers, tmp_path)
    parent = psutil.Process(rank.pid).ppid()
    os.kill(parent, signal.SIGSTOP)
    rank.send_signal(signal.SIGTERM)
    assert rank.wait(5) == -signal.SIGTERM, "seen without its word"
    again = waiting(servers, tmp_path)
    assert again.poll() is None and psutil.Process(again.pid).ppid() != parent
    wait(lambda: not psutil.pid_exists(parent), 5)


def test_where_nothing_can_fork_the_error_says_so(tmp_path: Path) -> None:
    servers = ForkServers(tmp_path / "run", {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"})
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("")
    (tmp_path / "trainer" / "__main__.py").write_text("raise SystemExit(3)")
    with pytest.raises(ForkServerError, match=r"it has ended|Broken pipe|reset"):
        servers.fork([], {})
    servers.close()


def test_closing_does_not_wait_for_imports(servers: ForkServers, tmp_path: Path) -> None:
    told: list[ForkServerError] = []

    def ask() -> None:
        try:
            servers.fork([], {})
        except ForkServerError as error:
            told.append(error)

    asking = threading.Thread(target=ask, name="asking")
    asking.start()
    time.sleep(0.2)
    began = time.monotonic()
    servers.close()
    asking.join(5)
    assert not asking.is_alive() and time.monotonic() - began < 2
    assert told and "leaves" in str(told[0])
