"""What only Linux can do for a process; elsewhere these do nothing. Light: ranks import it before torch."""

from __future__ import annotations

import ctypes
import signal
from contextlib import suppress

_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>
_PR_SET_NAME = 15


def kill_with_parent() -> None:
    """Have the kernel kill this process when its parent ends. The parent may have ended before: compare `os.getppid()` after it."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def name_process(name: str) -> None:
    """Set the name that `top` and `ps -o comm` show, of which the kernel keeps 15 bytes."""
    _prctl(_PR_SET_NAME, name.encode())


def _prctl(option: int, value: int | bytes) -> None:
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
