"""Recognises a process by its number and its birth, which a step of the system's clock cannot change.

A process number is used again. The time at which a process was created, as `ps` and psutil give it, is computed from the wall
clock: it moves when the clock is set. Linux counts the start of each process in ticks since boot, and every boot has an id.
"""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path

import psutil

_STARTED = 19
"""Place of the start time in /proc/PID/stat, counted from the field after the command's name (proc(5): field 22)."""


@functools.cache
def boot_id() -> str:
    """Names this boot of this machine's kernel; empty where the system has no such name."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def birth_of(pid: int) -> str:
    """What no other process with this number ever has; empty where there is no such process, or only a zombie."""
    if not boot_id():
        return _birth_by_clock(pid)
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in (b"Z", b"X") else f"{boot_id()}/{int(fields[_STARTED])}"


def lives(pid: int, birth: str) -> bool:
    """Whether the process of that number and birth runs."""
    return bool(birth) and birth_of(pid) == birth


def own_birth() -> str:
    return birth_of(os.getpid())


def _birth_by_clock(pid: int) -> str:
    """For systems without /proc, as macOS: the kernel there keeps the start time itself, in microseconds."""
    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.6f}"
    except psutil.Error:
        return ""
