"""Signals that are not meant for a process of a run: it lives through them, and so do the processes that it starts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal

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
