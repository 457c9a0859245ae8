"""The processes of a build end when it does, whatever they are doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from types import FrameType

import pytest

from shards.tokenization.encode import Workers

LONG = 60.0  # seconds of a task that nobody waits for


class Asked(BaseException):
    """As a build's Stopped: what a signal raises."""


def test_a_build_that_is_stopped_does_not_wait_for_its_tasks() -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Asked

    before = signal.signal(signal.SIGALRM, stop)
    try:
        with Workers(2) as pool:
            tasks = pool.run(time.sleep, [(0,), (LONG,), (LONG,)])
            assert next(tasks) == (0,)
            begun = time.monotonic()
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(Asked):
                next(tasks)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - begun < LONG / 4


def test_a_task_that_fails_ends_the_others() -> None:
    begun = time.monotonic()
    with Workers(2) as pool, pytest.raises(RuntimeError, match="TypeError"):
        list(pool.run(time.sleep, [(LONG,), ("no number",)]))
    assert time.monotonic() - begun < LONG / 4


PARENT = f"""
import multiprocessing, time
from shards.tokenization.encode import Workers
if __name__ == "__main__":
    with Workers(1) as pool:
        tasks = pool.run(time.sleep, [(0,), ({LONG},)])
        next(tasks)
        print(multiprocessing.active_children()[0].pid, flush=True)
        next(tasks)
"""


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere a worker ends after its task")
def test_a_worker_does_not_outlive_its_parent_in_the_middle_of_a_task() -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        assert is_running(worker)
        parent.kill()
    until = time.monotonic() + LONG / 4
    while is_running(worker) and time.monotonic() < until:
        time.sleep(0.02)
    assert not is_running(worker)


INTERRUPTED = """
import os, signal, time
from shards.tokenization.encode import Workers
if __name__ == "__main__":
    with Workers(2) as pool:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(0.1)
        os.killpg(0, signal.SIGINT)  # as Ctrl-C does, while the workers still import what they need
        list(pool.run(time.sleep, [(0,), (0,)]))
"""


def test_workers_that_are_interrupted_as_they_begin_say_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, start_new_session=True)
    assert (done.returncode, done.stderr) == (0, "")
