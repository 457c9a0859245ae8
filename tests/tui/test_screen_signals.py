"""The terminal is left as it was found, whatever ends the screen; and what a terminal sends may be anything."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import random
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tui.stage import Stage

ROOT = Path(__file__).parents[2]
ATTACH = (
    "import sys; from launcher.cli.__main__ import main; sys.argv = ['midwatch', 'attach', sys.argv[1]]; {before}sys.exit(main())"
)
ENVIRONMENT = {**os.environ, "TZ": "UTC", "LANG": "C.UTF-8", "MIDWATCH_ASCII": "0", "TERM": "xterm-256color"}
MODE = re.compile(rb"\x1b\[\?(\d+)([hl])")


class Terminal:
    """`midwatch attach` on a pseudo-terminal of 80 columns and 24 rows."""

    def __init__(self, directory: Path, before: str = "", **environment: str) -> None:
        self.seen = b""
        self.status: int | None = None
        master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.before = termios.tcgetattr(slave)
        self.master, self._slave = master, slave
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
            for number in range(3):
                os.dup2(slave, number)
            os.closerange(3, 64)
            os.chdir(ROOT)
            words = [sys.executable, "-c", ATTACH.format(before=before), str(directory)]
            os.execve(sys.executable, words, {**ENVIRONMENT, **environment})

    def read(self, until: bytes = b"", seconds: float = 30.0) -> bytes:
        """Reads until these bytes come or, without any, until the process ends."""
        start, end = len(self.seen), time.monotonic() + seconds
        while True:
            if select.select([self.master], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.master, 1 << 16)
            elif not until and self.ended():
                return self.seen[start:]
            if until and until in self.seen[start:]:
                return self.seen[start:]
            assert time.monotonic() < end, f"never came: {until!r}; the last: {self.seen[-1500:]!r}"

    def ended(self) -> bool:
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.status = os.waitstatus_to_exitcode(status) if pid else None
        return self.status is not None

    def modes(self) -> dict[bytes, bytes]:
        """Of the terminal's modes that were set, how each was left."""
        return dict(MODE.findall(self.seen))

    def close(self) -> None:
        if not self.ended():
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        for handle in (self.master, self._slave):
            with contextlib.suppress(OSError):
                os.close(handle)


@pytest.fixture
def open_terminal(stage: Stage) -> Iterator[object]:
    opened: list[Terminal] = []

    def make(before: str = "", **environment: str) -> Terminal:
        opened.append(Terminal(stage.directory, before, **environment))
        return opened[-1]

    yield make
    for terminal in opened:
        terminal.close()


def is_restored(terminal: Terminal) -> bool:
    left = {mode for mode, state in terminal.modes().items() if state == b"h"} - {b"7", b"25", b"2026"}  # wrap and cursor are shown
    return not left and termios.tcgetattr(terminal.master) == terminal.before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP], ids=lambda n: n.name)
def test_a_signal_restores_the_terminal_and_the_run_goes_on(stage: Stage, open_terminal, number: signal.Signals) -> None:  # type: ignore[no-untyped-def]
    terminal = open_terminal()
    terminal.read(b"TRAINING")
    assert terminal.modes()[b"1000"] == b"h" and not is_restored(terminal)
    os.kill(terminal.pid, number)
    last = terminal.read()
    assert terminal.status == 128 + number and is_restored(terminal), last
    assert f"{number.name}: detached: the run continues".encode() in last and b"Traceback" not in last
    assert stage.verbs() == []


def test_a_screen_that_hangs_is_ended_by_a_signal_too(open_terminal) -> None:  # type: ignore[no-untyped-def]
    hang = "import tui.app as a; a.MidwatchApp.do_checkpoint = lambda self: [0 for i in iter(int, 1) if i]; "
    terminal = open_terminal(hang)
    terminal.read(b"TRAINING")
    os.write(terminal.master, b"c")
    time.sleep(0.5)
    os.kill(terminal.pid, signal.SIGTERM)
    terminal.read()
    assert terminal.status == 128 + signal.SIGTERM and is_restored(terminal)


def test_a_terminal_that_goes_away_ends_the_screen(open_terminal) -> None:  # type: ignore[no-untyped-def]
    terminal = open_terminal()
    terminal.read(b"TRAINING")
    for handle in (terminal.master, terminal._slave):
        os.close(handle)
    end = time.monotonic() + 15
    while not terminal.ended():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_bytes_that_are_no_utf8_end_nothing(stage: Stage, open_terminal) -> None:  # type: ignore[no-untyped-def]
    terminal = open_terminal()
    terminal.read(b"TRAINING")
    dice = random.Random(7)
    harmless = list(range(0x80, 0x100))
    os.write(terminal.master, b"\xe9")
    for _ in range(40):
        os.write(terminal.master, bytes(dice.choices(harmless, k=dice.randrange(1, 40))))
    os.write(terminal.master, b"\xc3")  # the first half of a character, whose other half never comes
    time.sleep(0.5)
    os.write(terminal.master, b"m")
    terminal.read("┤".encode())  # the metrics view has come
    os.write(terminal.master, b"q")
    last = terminal.read()
    assert terminal.status == 0 and b"Traceback" not in terminal.seen and is_restored(terminal), last
    assert stage.verbs() == []


def test_what_is_pasted_is_shown_and_not_obeyed(open_terminal) -> None:  # type: ignore[no-untyped-def]
    terminal = open_terminal()
    terminal.read(b"TRAINING")
    os.write(terminal.master, b":")
    time.sleep(0.5)
    os.write(terminal.master, b"\x1b[200~set \xe2\x80\xae\xc2\x9b2J\x1b[201~")
    seen = terminal.read(b"\\u202e\\x9b2J")
    assert b"\xe2\x80\xae" not in seen and b"\xc2\x9b" not in seen


def test_an_exported_width_does_not_hold_the_size(open_terminal) -> None:  # type: ignore[no-untyped-def]
    terminal = open_terminal(COLUMNS="40", LINES="10")
    terminal.read(b"detach")
    assert width(terminal.seen) == 80
    fcntl.ioctl(terminal.master, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 150, 0, 0))
    end = time.monotonic() + 20
    while width(terminal.seen) != 150:
        assert time.monotonic() < end
        terminal.read(b"\x1b[")


def width(seen: bytes) -> int:
    """Of the longest line that was drawn."""
    lines = re.split(rb"\x1b\[\d+;\d+H|\r?\n", seen)
    return max(len(re.sub(rb"\x1b\[[0-9;?>]*[a-zA-Z]", b"", line).decode(errors="replace")) for line in lines)


def test_messages_that_go_to_a_file_do_not_take_the_screen_along(open_terminal) -> None:  # type: ignore[no-untyped-def]
    terminal = open_terminal("import os; os.dup2(os.open(os.devnull, os.O_WRONLY), 2); ", PYTHONIOENCODING="ascii")
    terminal.read(b"TRAINING")
    assert "┄".encode() in terminal.seen or "─".encode() in terminal.seen, "the terminal's encoding, not the files'"
    os.write(terminal.master, b"q")
    terminal.read()
    assert terminal.status == 0 and is_restored(terminal)
