"""Whether the files of a checkpoint are those that were written: by their sizes, or by every byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import xxhash

from midwatch.checkpoint_format.manifest import (
    NOT_AS_WRITTEN,
    PIECE,
    CheckpointError,
    FileEntry,
    ManifestHeader,
    read,
    read_header,
)

Progress = Callable[[int], None]


def check_sizes(directory: Path, digest: str | None = None) -> ManifestHeader:
    """Reads the manifest and checks that each file is there in full length. Raises CheckpointError."""
    header = read_header(directory, digest)
    for name, entry in header.files.items():
        if problem := _size_problem(directory / name, entry):
            raise CheckpointError(problem)
    return header


def verify(directory: Path, digest: str | None = None, progress: Progress = lambda count: None) -> ManifestHeader:
    """Reads every byte. Raises CheckpointError naming the first file that is not as it was written.

    digest: of the manifest, as the journal has it (None: any). progress: called with each number of bytes that was read.
    """
    header = check_sizes(directory, digest)
    for name, entry in header.files.items():
        if problem := _content_problem(directory / name, entry, progress):
            raise CheckpointError(problem)
    return header


def problems(directory: Path) -> list[str]:
    """Reads every byte, and names each file that is not as it was written, and why. Empty: all is well."""
    try:
        manifest, _ = read(directory)
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name, entry in sorted(manifest.files.items()):
        file = directory / name
        if problem := _size_problem(file, entry) or _content_problem(file, entry, lambda count: None):
            found.append(problem)
    return found


def _size_problem(file: Path, entry: FileEntry) -> str:
    try:
        size = file.stat().st_size
    except OSError as error:
        return f"{file}: cannot be read: {error.strerror}"
    return "" if size == entry.bytes else f"{file}: corrupted: {size} bytes, {entry.bytes} were written"


def _content_problem(file: Path, entry: FileEntry, progress: Progress) -> str:
    digest = xxhash.xxh3_128()
    try:
        with file.open("rb", buffering=0) as source:
            while piece := source.read(PIECE):
                digest.update(piece)
                progress(len(piece))
    except OSError as error:
        return f"{file}: cannot be read: {error.strerror}"
    return "" if digest.hexdigest() == entry.xxh3 else f"{file}: corrupted: {NOT_AS_WRITTEN}"
