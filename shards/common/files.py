"""Writing files so that neither a crash nor a reader meets half of one."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

TEMPORARY = ".tmp"
"""The end of the name of a file that is still being written."""


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable: new, renamed and removed ones survive a loss of power. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomically(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Replace a file, so that every reader, and whoever looks after a crash, sees the old content or the new one.

    Makes the file's directory and nothing above it: a run directory that was deleted or moved must not appear again.
    mode: permissions of the file, less what the umask takes. Raises OSError.
    """
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{TEMPORARY}")
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_directory(path.parent)


@contextmanager
def kept_if_written(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when the block ends without an error, if anything was written to it."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            yield file
        if temporary.stat().st_size:
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
