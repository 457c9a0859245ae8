"""Files between a build's steps that end with a hash of all before it, so that no changed or lost byte decides anything."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from shards.common.errors import ShardError
from shards.common.files import TEMPORARY, sync_directory

SEAL = 16  # bytes of XXH3-128
BLOCK = 1 << 20  # bytes that are hashed at once


class Sealed:
    """A file that is being written, under its final name once it is closed whole. A context: left early, nothing stays."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
        self._file = self._temporary.open("wb")
        self._hash = xxhash.xxh3_128()

    def write(self, data: Any, /) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def close(self) -> None:
        """Seal it, sync it, and rename it into place."""
        self._file.write(self._hash.digest())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self._path)
        sync_directory(self._path.parent)

    def __enter__(self) -> Sealed:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._file.closed:
            with suppress(OSError):
                self._file.close()
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)


def damaged(path: Path, why: object) -> ShardError:
    """The error for any file of OUT/work that is not as it was written."""
    return ShardError(f"{path}: {why} (delete {_work(path)}: the same command then begins anew; check this disk)")


def _work(path: Path) -> Path:
    """The directory `work` that holds a file of a step."""
    return path.parent.parent


def save_bytes(path: Path, raw: bytes | memoryview) -> None:
    with Sealed(path) as file:
        file.write(raw)
        file.close()


def save_array(path: Path, array: npt.NDArray[Any]) -> None:
    """As numpy's .npy, which does not mind what follows."""
    with Sealed(path) as file:
        np.save(file, array, allow_pickle=False)
        file.close()


def load_bytes(path: Path) -> bytes:
    """What was saved. Raises ShardError if it is not that."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise damaged(path, error.strerror) from None
    if xxhash.xxh3_128_digest(raw[:-SEAL]) != raw[-SEAL:]:
        raise damaged(path, "not as it was written")
    return raw[:-SEAL]


def load_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Of a file that numpy's savez wrote."""
    with np.load(io.BytesIO(load_bytes(path))) as arrays:
        return dict(arrays)


def map_array(path: Path) -> npt.NDArray[Any]:
    """An array, of which only what is looked at is read; all of it is checked when a process first opens it."""
    try:
        _check(path, path.stat().st_mtime_ns)
        found: npt.NDArray[Any] = np.load(path, mmap_mode="r")
    except OSError as error:
        raise damaged(path, error.strerror) from None
    return found


def lines(path: Path) -> Iterator[bytes]:
    """The lines of a file that may be larger than the memory, checked before the first."""
    try:
        _check(path, path.stat().st_mtime_ns)
        left = path.stat().st_size - SEAL
        with path.open("rb") as file:
            while left > 0 and (line := file.readline(left)):
                left -= len(line)
                yield line
    except OSError as error:
        raise damaged(path, error.strerror) from None


@lru_cache(maxsize=1 << 20)
def _check(path: Path, changed: int) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - SEAL))
        seal = file.read()
    if hash_of(path, size - SEAL) != seal:
        raise damaged(path, "not as it was written")


def hash_of(path: Path, size: int | None = None) -> bytes:
    """XXH3-128 of a file's first `size` bytes (None: of all), in little memory. Raises OSError."""
    hashed = xxhash.xxh3_128()
    left = path.stat().st_size if size is None else size
    with path.open("rb", buffering=0) as file:
        while left > 0 and (block := file.read(min(BLOCK, left))):
            hashed.update(block)
            left -= len(block)
    return hashed.digest()
