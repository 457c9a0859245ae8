"""Signals of the processes of a run: those that are not meant for them, which they live through, and those that ask them to end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

STRAY = (
    signal.SIGHUP,  # a terminal or a login has ended; runs outlive both
    signal.SIGUSR1,  # Slurm's warning of the time limit, which is for the batch job's keeper
    signal.SIGUSR2,
    signal.SIGALRM,
    signal.SIGIO,
    signal.SIGTSTP,  # stopped by a terminal it does not belong to
    signal.SIGTTIN,
    signal.SIGTTOU,
    *([signal.SIGPWR] if hasattr(signal, "SIGPWR") else []),
)
"""What ends or stops a process by default, and says nothing about whether the run should go on.

SIGTERM and SIGINT ask for an end; SIGQUIT, SIGXCPU and the signals of faults keep their meaning.
"""
SHELL_TRAP = "trap '' HUP USR1 USR2"
"""The same for the moment before Python runs: what a shell ignores, the program that it becomes ignores."""


def ignore_stray() -> None:
    """Ignored, not handled: a handler would interrupt system calls in libraries, and would not be inherited."""
    for number in STRAY:
        signal.signal(number, signal.SIG_IGN)


def send_signal(process: asyncio.subprocess.Process, number: int) -> None:
    """Signals a child of asyncio's; nothing where it has ended.

    Not by its own `terminate` and `kill`: they ask whether it lives in a way that takes its exit status from asyncio, which then
    warns of an "Unknown child process".
    """
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


_NAMES = ("HUP", "INT", "QUIT", "TERM", "USR1", "USR2", "ALRM", "VTALRM", "PROF", "XCPU", "PWR", "IO")
ENDING = tuple(signal.Signals[f"SIG{name}"] for name in _NAMES if f"SIG{name}" in signal.Signals.__members__)
"""Those that end a process unless it handles them, and that others send: `kill`, a closed terminal, a batch system's time limit."""

SAME_SECONDS = 1.0
"""Signals within this time are one request: `timeout` and batch systems signal a process and then its whole group."""


def handled() -> list[signal.Signals]:
    """The ENDING signals without those that the caller has had ignored, as `nohup` does with SIGHUP."""
    always = (signal.SIGTERM, signal.SIGINT)
    return [number for number in ENDING if number in always or signal.getsignal(number) is not signal.SIG_IGN]


class EndingSignals:
    """Takes the signals from the moment it is made; they wait until `call`, `listen` or `interrupting` acts on them.

    It must be made in the main thread. The handlers stay until the process ends.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last = float("-inf")
        self._waiting: list[signal.Signals] = []
        self._numbers = handled()
        self._react: Callable[[signal.Signals], None] = self._waiting.append
        for number in self._numbers:
            signal.signal(number, self._arrives)

    @property
    def waiting(self) -> bool:
        """Whether a signal has come that nobody has acted on."""
        return bool(self._waiting)

    def _arrives(self, number: int, frame: FrameType | None = None) -> None:
        now = self._clock()
        if now - self._last >= SAME_SECONDS:
            self._last = now
            self._react(signal.Signals(number))

    def call(self, react: Callable[[signal.Signals], None]) -> None:
        """Calls `react` in the signal handler itself for each request, those that wait first."""
        self._react = react
        self._hand_over()

    def listen(self, react: Callable[[signal.Signals], None]) -> None:
        """Calls `react` in the running event loop for each request, those that wait first."""
        loop = asyncio.get_running_loop()
        for number in self._numbers:
            loop.add_signal_handler(number, self._arrives, number)
        self._react = react
        self._hand_over()

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """In it a request raises KeyboardInterrupt."""

        def interrupt(number: signal.Signals) -> None:
            raise KeyboardInterrupt

        self._react = interrupt
        try:
            self._hand_over()
            yield
        finally:
            self._react = self._waiting.append

    def _hand_over(self) -> None:
        while self._waiting:
            self._react(self._waiting.pop(0))
