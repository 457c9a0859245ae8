"""The way to a run's controller on this machine, which is started where none lives."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

from websockets.exceptions import WebSocketException

from midwatch import protocol
from midwatch.journal.journal import JournalError, read_journal
from midwatch.journal.run_state import Ledger
from midwatch.run_directory import (
    CONNECT_SECONDS,
    Address,
    RunPaths,
    beats,
    controller_lives,
    find_controller,
    host_name,
    is_foreign,
    read_address,
    read_own_address,
)
from midwatch.transport.access import user_name

T = TypeVar("T")

UNREACHABLE = (OSError, WebSocketException, TimeoutError, EOFError, protocol.ProtocolError)
"""What it means that nobody, or nobody of ours, answers at an address."""


ANSWER_SECONDS = 15.0
"""That a controller has to answer."""


class ClientError(Exception):
    """The controller cannot be reached, or refuses; the message says why and what to do."""


class CopyError(ClientError):
    """The directory is a copy of a run whose controller lives."""


class SilentError(ClientError):
    """The controller lives and does not answer."""


Looks = Literal["never", "when over", "always"]
"""Whether a run without a controller is shown from its files: never, where it has ended or was stopped, or always."""


async def reach_controller(
    paths: RunPaths, attempt: Callable[[Address], Awaitable[T]], *, start: bool, looks: Looks = "never", resumes: bool = False
) -> T | None:
    """What `attempt` makes of the controller's address; a controller is started where none lives, if it may be.

    A copy of a live run gets a controller, and becomes a run of its own, only where it `resumes`. None where there is no controller
    and the run is to be shown from its files. Raises ClientError where there is no run, no
    controller, or one that this machine cannot reach.
    """
    if not paths.is_run():
        raise ClientError(f"{paths.root}: not a run directory (midwatch ps lists the runs)")
    if not resumes and (original := await asyncio.to_thread(find_original, paths)) is not None:
        if looks == "always":
            return None
        raise CopyError(
            f"{paths.root}: this is a copy of {original.path}, whose controller lives on {original.host}, and the copy does not "
            f"steer it (midwatch resume {paths.root} makes the copy a run of its own)"
        )
    deadline = time.monotonic() + ANSWER_SECONDS
    started: Starting | None = None
    while True:
        address = read_own_address(paths)
        with contextlib.suppress(*UNREACHABLE):
            if address is not None:
                return await attempt(address)
        if started is None:
            try:
                where = await asyncio.to_thread(find_controller, paths, write=looks == "never")
                if where == "nowhere" and start and address is not None and address.host != host_name():
                    where = "elsewhere" if await asyncio.to_thread(beats, paths) else where  # its last one may only look old
            except OSError as error:  # there is no room, or no right, to try the run's lock
                if looks == "never":
                    raise ClientError(f"{error.filename or paths.root}: {error.strerror or error}") from None
                where = "nowhere"
            if where == "nowhere" and await asyncio.to_thread(shows_files, paths, looks):
                return None
            if where == "nowhere" and not start:
                raise ClientError(f"{paths.root}: no controller is running (midwatch attach starts one)") from None
            if where == "nowhere" and (owner := other_owner(paths)) is not None:
                raise ClientError(f"{paths.root}: no controller is running, and only {owner}, whose run it is, can start one")
            if where == "nowhere":
                started = start_controller(paths.root)
                deadline = time.monotonic() + ANSWER_SECONDS
            elif address is not None and (where == "elsewhere" or (where == "silent" and not start)):
                raise ClientError(f"the controller is on {address.host}; from here: ssh://{address.host}/{paths.root.resolve()}")
            elif where == "silent":  # most likely it has just died there
                deadline = max(deadline, time.monotonic() + 1)
            elif address is not None and (stopped := stopped_words(address)):
                raise SilentError(stopped)
        elif started.has_failed() and not controller_lives(paths):
            raise ClientError(started.failure()) from None
        if time.monotonic() > deadline:
            raise SilentError(f"the controller does not answer; see {paths.logs / 'controller.log'}") from None
        await asyncio.sleep(0.05)


def shows_files(paths: RunPaths, looks: Looks) -> bool:
    """Whether a run that has no controller is shown from its files. Raises ClientError where its journal cannot be read."""
    if looks != "when over":
        return looks == "always"
    ledger = Ledger()
    try:
        for term, entry in read_journal(paths.journal).entries:
            ledger.apply(term, entry)
    except JournalError as error:
        raise ClientError(str(error)) from None
    return ledger.state in ("finished", "failed", "released") and not ledger.generation_live


def stopped_words(address: Address) -> str:
    """That the controller's process is suspended, and the way out; empty where it is not, or is not seen from here."""
    with contextlib.suppress(OSError, IndexError):
        state = Path(f"/proc/{address.pid}/stat").read_text().rpartition(")")[2].split()[0]
        if address.host == host_name() and state in "Tt":
            return f"the controller (process {address.pid}) is suspended and does not respond; kill -CONT {address.pid} resumes it"
    return ""


def find_original(paths: RunPaths) -> Address | None:
    """The living controller of the run that this directory is a copy of; None where it is no copy, or nobody lives there."""
    address = read_address(paths.address)
    if address is None or not is_foreign(paths, address):
        return None
    original = RunPaths(Path(address.path))
    own = read_own_address(original) if original.is_run() else None
    if own is not None and own.run == address.run:
        return own if controller_lives(original) else None
    return address if _listens(address) else None


def _listens(address: Address) -> bool:
    """Whether anybody listens at an address of this machine."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as wire:
        wire.settimeout(CONNECT_SECONDS)
        wire.connect(address.url.removeprefix("unix:"))
        return True
    return False


NOBODY = 65534
"""Owner of what root makes on storage that does not trust root; and of what comes from users this machine does not know."""


def other_owner(paths: RunPaths) -> str | None:
    """Whose run it is, where it is another user's: a controller of ours would take it over and leave files that they cannot use."""
    uid = paths.root.stat().st_uid
    return user_name(uid) if uid not in (os.getuid(), NOBODY) else None


@dataclass
class Starting:
    """A controller that was started, and where in its log its own words begin."""

    process: subprocess.Popen[bytes]
    log: Path
    begin: int

    def has_failed(self) -> bool:
        return bool(self.process.poll())

    def failure(self) -> str:
        """Why it has ended, in the last words of its log."""
        return f"the controller ended at once: {self._last_words() or f'status {self.process.returncode}'} (log: {self.log})"

    def _last_words(self) -> str:
        with contextlib.suppress(OSError):
            lines = self.log.read_bytes()[self.begin :].decode(errors="replace").splitlines()
            errors = [m.group(1) for line in lines if (m := re.match(r"\S+ \S+ (?:ERROR|CRITICAL) +[\w.]+: (.*)", line))]
            return (errors or [line.strip() for line in lines if line.strip()] or [""])[-1]
        return ""


def start_controller(directory: Path) -> Starting:
    """Starts a controller in a session of its own, so that it outlives the terminal. Raises ClientError where it cannot be."""
    paths = RunPaths(directory)
    file = paths.logs / "controller.log"
    try:
        paths.logs.mkdir(exist_ok=True)
        with file.open("ab") as out:
            begin = out.tell()
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "launcher.controller", str(directory.resolve())],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
                cwd="/",
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
    except OSError as error:
        raise ClientError(f"{file}: a controller cannot be started: {error.strerror or error}") from None
    return Starting(process, file, begin)


def wait_for_controller(paths: RunPaths, started: Starting, timeout: float = ANSWER_SECONDS) -> None:
    """Returns when a controller that was started listens. Raises ClientError where it has ended, or does not listen in time."""
    deadline = time.monotonic() + timeout
    while read_address(paths.address) is None:
        if started.has_failed():
            raise ClientError(started.failure())
        if time.monotonic() > deadline:
            raise ClientError(f"the controller does not start; see {started.log}")
        time.sleep(0.02)
