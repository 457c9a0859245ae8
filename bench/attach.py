"""How soon `midwatch attach` paints, over a hello-world Textual app; what standing watch costs afterwards.

    python -m bench.attach [--seconds 15] [--tries 7]

Both run as processes of their own on a pseudo-terminal of 80x24, turn about; a first frame is the first bytes that hold a word of
it. The controller is the tests' stage: a step every 0.2 s. Then one attached screen is watched: CPU, bytes, memory.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import statistics
import struct
import sys
import termios
import threading
import time

import psutil
from rich.console import Console
from rich.table import Table

from tests.tui.stage import Stage

HELLO = """
from textual.app import App
from textual.widgets import Static
class Hello(App):
    def compose(self):
        yield Static("hello world")
Hello().run()
"""
ATTACH = "import sys, pathlib; from tui.app import run; sys.exit(run(pathlib.Path(sys.argv[1])))"


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, code: str, *arguments: str, columns: int = 80, rows: int = 24) -> None:
        self.began = time.perf_counter()
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            os.environ.update(TERM="xterm-256color", COLORTERM="truecolor", LANG="C.UTF-8")
            os.execv(sys.executable, [sys.executable, "-c", code, *arguments])
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def until(self, word: bytes, seconds: float = 30.0) -> float:
        """Seconds from the start until the word was painted. Raises TimeoutError."""
        seen = b""
        while word not in seen:
            if time.perf_counter() - self.began > seconds:
                raise TimeoutError(f"{word!r} was never painted")
            if select.select([self.terminal], [], [], 0.05)[0]:
                seen += os.read(self.terminal, 1 << 16)
        return time.perf_counter() - self.began

    def drain(self, seconds: float) -> int:
        """Bytes painted in so long."""
        total, end = 0, time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if select.select([self.terminal], [], [], left)[0]:
                total += len(os.read(self.terminal, 1 << 16))
        return total

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)
        os.close(self.terminal)
        os.waitpid(self.pid, 0)


def first_paints(stage: Stage, tries: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds to hello world's first frame, to ours, and to ours with the run in it; one after the other, `tries` times."""
    hello, frame, whole = [], [], []
    for _ in range(tries + 1):
        for code, arguments, words in (
            (HELLO, (), [(b"hello world", hello)]),
            (ATTACH, (str(stage.directory),), [(b"checkpoints", frame), (b"TRAINING", whole)]),
        ):
            terminal = Terminal(code, *arguments)
            try:
                for word, found in words:
                    found.append(terminal.until(word))
            finally:
                terminal.close()
    return hello[1:], frame[1:], whole[1:]


def watching(stage: Stage, seconds: float, columns: int, rows: int) -> tuple[float, float, float]:
    """Per cent of a core, kB/s to the terminal and MB of one screen, while a step comes every 0.2 s."""
    terminal = Terminal(ATTACH, str(stage.directory), columns=columns, rows=rows)
    over = threading.Event()

    def train() -> None:
        while not over.wait(0.2):
            step = stage.snapshot.step + 1
            stage.send(
                step=step, time=stage.snapshot.time + 0.2, latest={**stage.snapshot.latest, "train/loss": 0.46 + step % 9 / 1e3}
            )

    trainer = threading.Thread(target=train, name="steps", daemon=True)
    try:
        terminal.until(b"TRAINING")
        trainer.start()
        terminal.drain(3.0)
        process = psutil.Process(terminal.pid)
        before = sum(process.cpu_times()[:2])
        began = time.monotonic()
        sent = terminal.drain(seconds)
        elapsed = time.monotonic() - began
        spent = sum(process.cpu_times()[:2]) - before
        return spent / elapsed * 100, sent / elapsed / 1e3, process.memory_info().rss / 1e6
    finally:
        over.set()
        trainer.join(5)
        terminal.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--tries", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    with Stage() as stage:
        hello, frame, whole = (statistics.median(found) for found in first_paints(stage, arguments.tries))
        small = watching(stage, arguments.seconds, 80, 24)
        large = watching(stage, arguments.seconds, 200, 50)
    if arguments.json:
        keys = ("hello_seconds", "first_paint_seconds", "run_shown_seconds", "watch_80x24", "watch_200x50")
        print(json.dumps(dict(zip(keys, (hello, frame, whole, small, large), strict=True))))
        return
    table = Table(title="attach: first paint, over a hello-world Textual app")
    for heading in ("", "measured", "ratio", "target"):
        table.add_column(heading, justify="right" if heading else "left")
    table.add_row("hello world, seconds", f"{hello:.2f}", "1.00", "")
    table.add_row("midwatch attach, first paint", f"{frame:.2f}", f"{frame / hello:.2f}", "1.40")
    table.add_row("midwatch attach, the run shown", f"{whole:.2f}", f"{whole / hello:.2f}", "")
    Console().print(table)
    table = Table(title="standing watch, five steps a second")
    for heading in ("", "80x24", "200x50", "nvitop, 64 GPUs"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, here, there, peer in zip(
        ("% of a core", "kB/s to the terminal", "resident memory, MB"), small, large, ("6", "4.3", "29"), strict=True
    ):
        table.add_row(name, f"{here:.1f}", f"{there:.1f}", peer)
    Console().print(table)


if __name__ == "__main__":
    main()
