"""One agent for each run directory and node, by a lock that its process holds for as long as it lives."""

from __future__ import annotations

import fcntl
import json
import os
import time

import msgspec

from midwatch.processes import own_birth
from midwatch.run_directory import RunPaths, runtime_directory

LEAVE_SECONDS = 30.0
"""That an agent which is leaving has to be gone: its ranks may be writing a checkpoint."""
POLL_SECONDS = 0.05


class Holder(msgspec.Struct, frozen=True):
    """Who holds a place."""

    pid: int
    birth: str
    leaving: bool = False


class Place:
    """The place of a node's agent. Raises OSError where there is no such directory."""

    def __init__(self, paths: RunPaths, node: str) -> None:
        self.name = f"{paths.lock_key}.{node.replace('/', '_')}"
        self._handle = os.open(runtime_directory() / f"{self.name}.agent", os.O_RDWR | os.O_CREAT, 0o600)

    def take(self, seconds: float = LEAVE_SECONDS) -> bool:
        """Whether it is ours now. An agent that is leaving is waited for; one that stays keeps it."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = self.holder()
                if time.monotonic() > deadline or (holder is not None and not holder.leaving):
                    return False
                time.sleep(POLL_SECONDS)
            else:
                return True

    def sign(self, leaving: bool = False) -> str:
        """Writes down who holds it, and returns that."""
        said = json.dumps({"pid": os.getpid(), "birth": own_birth(), "leaving": leaving})
        os.pwrite(self._handle, said.encode().ljust(200) + b"\n", 0)
        return said

    def holder(self) -> Holder | None:
        """Who has signed last; None where nobody has, as in the moment after the lock was taken."""
        try:
            return msgspec.json.decode(os.pread(self._handle, 1000, 0), type=Holder)
        except msgspec.DecodeError:
            return None

    def close(self) -> None:
        os.close(self._handle)


def holder_of(paths: RunPaths, node: str) -> Holder | None:
    """The agent of this machine that holds a node's place and stays; None where it is free, or about to be. Raises OSError."""
    place = Place(paths, node)
    try:
        try:
            fcntl.flock(place._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = place.holder()
            return holder if holder is not None and not holder.leaving else None
        return None
    finally:
        place.close()
