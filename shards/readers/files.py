"""The files behind a path: found in a fixed order, their sizes and stamps, and opened as streams that count what was read."""

from __future__ import annotations

import glob
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from shards.common.errors import SpecError
from shards.readers import remote
from shards.readers.base import ReadPosition
from shards.readers.compressed import opened
from shards.readers.hidden import is_hidden, is_hidden_match


class InputFile(NamedTuple):
    """A file: path or URL, bytes as stored, and what changes when its content does."""

    path: str
    size: int
    stamp: str | int


def find(path: str, where: str, wanted: Callable[[str], bool], endings: str, *, dotted: bool = True) -> list[InputFile]:
    """The files of a path, sorted: itself, the wanted ones beneath it, or a glob's matches. SpecError if there are none.

    dotted: whether files and directories whose names begin with a dot are hidden, like the others that `hidden` knows.
    """
    if remote.is_remote(path):
        return [InputFile(*each) for each in remote.find(path, where, wanted, endings, dotted)]
    root = Path(path)
    try:
        if root.is_dir():
            found = sorted(file for file in _beneath(root, dotted) if wanted(file.name))
            if not found:
                raise SpecError(f"{where}: {path}: no files ending in {endings} (hidden ones are not read)")
        elif root.is_file():
            found = [root]
        else:
            names = (name for name in glob.glob(path, recursive=True) if not is_hidden_match(name, path, dotted=dotted))
            found = sorted(Path(name) for name in names if Path(name).is_file())
            if not found:
                raise SpecError(f"{where}: {path}: no such file, directory or glob match (correct the path; now in {Path.cwd()})")
        return [stat(file) for file in found]
    except OSError as error:
        raise SpecError(f"{where}: {error.filename}: {error.strerror} (give access to it, or a path without it)") from None


def _beneath(root: Path, dotted: bool) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error  # os.walk would leave out what it cannot look into without a word

    for directory, inner, names in os.walk(root, onerror=refuse):
        inner[:] = [name for name in inner if not is_hidden((name,), dotted=dotted)]
        for name in names:
            if not is_hidden((name,), dotted=dotted) and (file := Path(directory, name)).is_file():
                yield file


def stat(file: Path) -> InputFile:
    told = file.stat()
    return InputFile(str(file), told.st_size, told.st_mtime_ns)


def beneath(path: str, top: str) -> str:
    """The path within a directory; "" for one that is not in it. A store's own spelling of a URL may have more slashes."""
    path, top = (re.sub(r"\A([A-Za-z][A-Za-z0-9+.-]*):/+", r"\1:/", each) for each in (path, top.rstrip("/")))
    return path[len(top) + 1 :] if path.startswith(f"{top}/") else ""


class _CountingStream(io.RawIOBase):
    """A raw stream that moves `reading.done` by what is read from it: once a block, which costs records nothing."""

    def __init__(self, raw: io.RawIOBase, reading: ReadPosition) -> None:
        self._raw, self._reading = raw, reading

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._raw.readinto(buffer) or 0
        self._reading.done += count
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()


@contextmanager
def stream(path: str, reading: ReadPosition, *, inflate: bool = True) -> Iterator[io.BufferedReader]:
    """A file's bytes, decompressed by its ending. Raises OSError; reading it raises one of compressed.DAMAGE."""
    with io.BufferedReader(_CountingStream(raw_file(path), reading), 1 << 20) as raw:
        yield opened(path.partition("?")[0] if inflate else "", raw)


def raw_file(path: str) -> io.RawIOBase:
    """The stored bytes, seekable. Raises OSError."""
    return remote.RemoteFile(path) if remote.is_remote(path) else open(path, "rb", buffering=0)
