"""Real terminals: a tmux with real keys, a terminal that does not read for a while."""

import contextlib
import fcntl
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from midwatch import protocol as p
from tests.tui.stage import NOW, Stage

ATTACH = "import sys, pathlib; from tui.app import run; sys.exit(run(pathlib.Path(sys.argv[1])))"
ROOT = Path(__file__).parents[2]
ENVIRONMENT = {**os.environ, "TZ": "UTC", "LANG": "C.UTF-8", "MIDWATCH_ASCII": "0", "TERM": "xterm-256color"}


class Tmux:
    """A tmux server of its own, with one pane on the screen."""

    def __init__(self, *command: str) -> None:
        self._socket = f"midwatch-{uuid.uuid4().hex[:8]}"
        self("-f", "/dev/null", "new-session", "-d", "-x", "80", "-y", "24", *command)

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-u", "-L", self._socket, *arguments], capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT, timeout=20
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def text(self) -> str:
        return self("capture-pane", "-p")

    def keys(self, *keys: str) -> None:
        self("send-keys", *keys)

    def sees(self, *words: str, seconds: float = 20.0) -> None:
        _until(lambda: all(word in self.text() for word in words), lambda: f"{words} in\n{self.text()}", seconds)

    def close(self) -> None:
        with contextlib.suppress(AssertionError):
            self("kill-server")


def _until(condition: Callable[[], object], what: Callable[[], str], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"never came: {what()}"
        time.sleep(0.05)


@pytest.fixture
def tmux(stage: Stage) -> Iterator[Tmux]:
    if shutil.which("tmux") is None:
        reason = "tmux is not installed (tests/apt.txt names it)"
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)
    attach = shlex.join([sys.executable, "-c", ATTACH, str(stage.directory)])
    terminal = Tmux("sh", "-c", f"{attach}; echo status $?; sleep 60")
    yield terminal
    terminal.close()


def test_an_operator_at_a_real_terminal(stage: Stage, tmux: Tmux) -> None:
    tmux.sees("TRAINING", "dpo: step 181 of 300", "w watch", "q detach")
    for key, words in (("m", "train/loss"), ("k", "step-1100"), ("t", "made from"), ("l", "laptop/0.log"), ("j", "#4 advance")):
        tmux.keys(key)
        tmux.sees(words)
    tmux.keys("w")
    tmux.keys("p")
    tmux.sees("pause: done at step 1,180")
    tmux.keys("R")
    tmux.sees("Undoes 180 steps", "[ Cancel ]")
    tmux.keys("Escape")
    tmux.sees("nothing was sent", "CPUs")
    assert stage.verbs() == ["pause"]

    for columns, rows in (("1", "1"), ("80", "24"), ("3", "50"), ("200", "50"), ("80", "24")):
        tmux("resize-window", "-x", columns, "-y", rows)
        time.sleep(0.4)
    tmux.sees("TRAINING", "dpo: step 181 of 300", "q detach")
    tmux.keys(":", "set lr 1e-4", "Enter")
    _until(lambda: stage.verbs() == ["pause", "set"], lambda: str(stage.verbs()))

    tmux.keys("q")
    tmux.sees("detached: the run continues", "status 0")


def test_after_many_changes_the_terminal_shows_what_a_fresh_one_does(stage: Stage, tmux: Tmux) -> None:
    """Only what changed is sent; nothing that changed may be left out."""
    tmux.sees("TRAINING", "dpo: step 181 of 300")
    for view in "kwtw":
        tmux.keys(view)
        for number in range(4):
            tmux.keys("Up" if number % 2 else "Down")
            step = stage.snapshot.step + 7
            line = p.JournalLine(
                index=step, time=NOW + number, term=1, kind="note", author="", text="n" * (step % 90), level="warning"
            )
            latest = {**stage.snapshot.latest, "train/loss": 1 / step}
            stage.send(step=step, latest=latest, events=(*stage.snapshot.events[1:], line), reason="r" * (step % 50))
            time.sleep(0.3)
    tmux.sees(f"step {stage.snapshot.step:,}")
    time.sleep(1.5)
    attach = shlex.join([sys.executable, "-c", ATTACH, str(stage.directory)])
    fresh = Tmux("sh", "-c", attach)
    try:
        fresh.sees("TRAINING", f"step {stage.snapshot.step:,}")
        _until(lambda: _steady(fresh.text()) == _steady(tmux.text()), lambda: f"{fresh.text()}\nlike\n{tmux.text()}")
    finally:
        fresh.close()


def _steady(words: str) -> list[str]:
    """The screen without its clock, nor the times that the operator's clock shifts."""
    return [re.sub(r"\d\d:\d\d:\d\d|\S+ ago", "", line).rstrip() for line in words.splitlines()]


class Pty:
    """The screen on a pseudo-terminal that is read only when asked."""

    def __init__(self, directory: Path) -> None:
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execve(sys.executable, [sys.executable, "-c", ATTACH, str(directory)], ENVIRONMENT)
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))

    def read(self, until: str, seconds: float = 20.0) -> bytes:
        found, end = b"", time.monotonic() + seconds
        while until.encode() not in found:
            assert time.monotonic() < end, f"never came: {until}; the last: {found[-2000:]!r}"
            if select.select([self.terminal], [], [], 0.1)[0]:
                found += os.read(self.terminal, 1 << 16)
        return found

    def drain(self, seconds: float) -> None:
        """Reads whatever comes for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([self.terminal], [], [], left)[0]:
                os.read(self.terminal, 1 << 16)

    def write(self, keys: bytes) -> None:
        """Any number of bytes, read from meanwhile: a terminal takes 4 kB at a time."""
        while keys:
            readable, writable, _ = select.select([self.terminal], [self.terminal], [], 1.0)
            if readable:
                os.read(self.terminal, 1 << 16)
            if writable:
                keys = keys[os.write(self.terminal, keys[:1024]) :]

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.terminal)
        with contextlib.suppress(OSError):
            os.waitpid(self.pid, 0)


def test_a_terminal_that_does_not_read_holds_up_nothing_and_goes_on_after(stage: Stage) -> None:
    screen = Pty(stage.directory)
    try:
        screen.read("TRAINING")
        screen.read("train")
        slowest = 0.0
        for number in range(120):  # six seconds in which the terminal reads nothing: far more than it can hold
            line = p.JournalLine(index=100 + number, time=NOW, term=1, kind="note", author="", text=f"{number}: " + "x" * 180)
            began = time.monotonic()
            stage.send(step=1_181 + number, events=(line,) * 12)
            slowest = max(slowest, time.monotonic() - began)
            time.sleep(0.05)
        assert slowest < 1.0  # what sends the snapshots never waited for the terminal
        screen.read("1,300/1,300")
        os.write(screen.terminal, b"p")
        screen.read("pause: done")
        assert stage.verbs() == ["pause"]
        os.write(screen.terminal, b"q")
        screen.read("detached: the run continues")
        assert os.waitstatus_to_exitcode(os.waitpid(screen.pid, 0)[1]) == 0
    finally:
        screen.close()


def test_a_killed_terminal_sends_the_run_nothing(stage: Stage) -> None:
    screen = Pty(stage.directory)
    screen.read("TRAINING")
    screen.close()
    stage.send(step=1_200)
    assert stage.commands == []
