"""The way to a run's controller on this machine, which is started where none lives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from websockets.exceptions import WebSocketException

from launcher import protocol
from launcher.paths import Address, RunPaths, controller_lives, find_controller, read_address
from launcher.roles import user_name
from shards.terminal import safe

T = TypeVar("T")

UNREACHABLE = (OSError, WebSocketException, TimeoutError, EOFError, protocol.ProtocolError)
"""What it means that nobody, or nobody of ours, answers at an address."""


class ClientError(Exception):
    """The controller cannot be reached, or refuses; the message says why and what to do."""


async def reach_controller(paths: RunPaths, attempt: Callable[[Address], Awaitable[T]], *, start: bool) -> T:
    """What `attempt` makes of the controller's address; a controller is started where none lives, if it may be.

    Raises ClientError where there is no run, no controller, or one that this machine cannot reach.
    """
    if not paths.is_run():
        raise ClientError(f"{paths.root}: not a run directory (midwatch ps lists the runs)")
    log_file = paths.logs / "controller.log"
    deadline = time.monotonic() + 15
    started: subprocess.Popen[bytes] | None = None
    while True:
        address = read_address(paths.address)
        with contextlib.suppress(*UNREACHABLE):
            if address is not None:
                return await attempt(address)
        if started is None:
            where = await asyncio.to_thread(find_controller, paths)
            if where == "nowhere" and not start:
                raise ClientError(f"{paths.root}: no controller is running (midwatch attach starts one)") from None
            if where == "nowhere" and (owner := other_owner(paths)) is not None:
                raise ClientError(f"{paths.root}: no controller is running, and only {owner}, whose run it is, can start one")
            if where == "nowhere":
                started = start_controller(paths.root)
                deadline = time.monotonic() + 15
            elif address is not None and (where == "elsewhere" or (where == "silent" and not start)):
                raise ClientError(f"the controller is on {address.host}; from here: ssh://{address.host}/{paths.root.resolve()}")
            elif where == "silent":  # most likely it has just died there
                deadline = max(deadline, time.monotonic() + 1)
        elif started.poll() is not None and started.returncode != 0 and not controller_lives(paths):
            raise ClientError(f"the controller ended at once{_last_error(log_file)} (see {log_file})") from None
        if time.monotonic() > deadline:
            raise ClientError(f"the controller does not answer; see {log_file}") from None
        await asyncio.sleep(0.05)


def _last_error(log_file: Path) -> str:
    """Why it ended, by the last line of its log, where that line tells of an error."""
    with contextlib.suppress(OSError), log_file.open("rb") as opened:
        opened.seek(max(0, opened.seek(0, os.SEEK_END) - 4096))
        lines = opened.read().decode(errors="replace").strip().splitlines()
        if lines and (found := re.search(r" ERROR +\S+: (.+)", lines[-1])):
            return f": {safe(found.group(1))[:500]}"
    return ""


NOBODY = 65534
"""Owner of what root makes on storage that does not trust root; and of what comes from users this machine does not know."""


def other_owner(paths: RunPaths) -> str | None:
    """Whose run it is, where it is another user's: a controller of ours would take it over and leave files that they cannot use."""
    uid = paths.root.stat().st_uid
    return user_name(uid) if uid not in (os.getuid(), NOBODY) else None


def start_controller(directory: Path) -> subprocess.Popen[bytes]:
    """Starts a controller in a session of its own, so that it outlives the terminal."""
    paths = RunPaths(directory)
    paths.logs.mkdir(parents=True, exist_ok=True)
    with (paths.logs / "controller.log").open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "launcher.controller", str(directory.resolve())],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
            cwd="/",
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )


def wait_for_controller(paths: RunPaths, timeout: float = 15.0) -> None:
    """Returns when a controller that was started listens. Raises ClientError where it does not in time."""
    deadline = time.monotonic() + timeout
    while read_address(paths.address) is None:
        if time.monotonic() > deadline:
            raise ClientError(f"the controller does not start; see {paths.logs / 'controller.log'}")
        time.sleep(0.02)
