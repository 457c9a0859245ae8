"""Which directory a run is in: tells a directory from its copies, and notices that it was moved or deleted."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from midwatch.processes import boot_id


class DirectoryId(msgspec.Struct, frozen=True):
    """A directory as the kernel knows it: a move within the file system keeps it, a copy has another."""

    boot: str
    """The boot of the kernel that gave the device its number."""
    device: int
    inode: int

    @classmethod
    def of(cls, root: Path) -> DirectoryId:
        """Raises OSError."""
        found = os.stat(root)
        return cls(boot_id(), found.st_dev, found.st_ino)

    def same(self, other: DirectoryId) -> bool:
        """Device numbers differ between the hosts of a shared file system, and after a boot: there the inode alone decides."""
        return self.inode == other.inode and (self.boot != other.boot or self.device == other.device)

    @property
    def key(self) -> str:
        """Names this directory on this machine, until it boots."""
        return f"{self.device:x}-{self.inode:x}"


class DirectoryWatch:
    """Holds a run's directory open and tells when it is no longer at its path.

    A directory that is out of sight for less than `seconds` is not reported: storage may be away for a moment, and editors replace
    a recipe in two steps. Storage that answers with any other error than "there is no such file" is not reported at all.
    """

    def __init__(self, root: Path, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises OSError where there is no such directory."""
        self._root, self._seconds, self._clock = root, seconds, clock
        self._handle = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._missing_since: float | None = None

    def missing(self) -> str:
        """What has become of the directory, as of now; empty while the run is at its path."""
        try:
            there = os.stat(self._root)
            if not os.path.samestat(there, os.fstat(self._handle)):
                return f"{self._root}: another directory is there now{self._whereabouts()}"
            for name, is_kind in (("recipe.toml", stat.S_ISREG), ("journal", stat.S_ISDIR)):
                if not is_kind(os.stat(self._root / name).st_mode):
                    raise FileNotFoundError
        except (FileNotFoundError, NotADirectoryError):
            return f"{self._root}: the run directory was deleted or moved{self._whereabouts()}"
        except OSError:
            return ""
        return ""

    def lost(self) -> str:
        """As `missing`, once that has been so for the whole of the seconds."""
        why = self.missing()
        now = self._clock()
        if not why:
            self._missing_since = None
            return ""
        if self._missing_since is None:
            self._missing_since = now
        return why if now - self._missing_since >= self._seconds else ""

    def close(self) -> None:
        os.close(self._handle)

    def _whereabouts(self) -> str:
        """Where the directory is now, as far as the kernel knows."""
        with contextlib.suppress(OSError, ValueError):
            found = os.readlink(f"/proc/self/fd/{self._handle}")
            if found != str(self._root) and os.path.samestat(os.stat(found), os.fstat(self._handle)):
                return f" (it is at {found})"
        return ""
