"""Checkpoints as files: reading a manifest, and verifying every byte it names, without torch and without running anything.

`manifest.msgpack` is a map: format, id, generation, world, files {name: {bytes, xxh3}}, tensors, state. Its own xxh3-128 is the
checkpoint's digest, which the journal keeps.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import xxhash

from shards.decoding import UNDECODABLE, brief

MANIFEST = "manifest.msgpack"
_CHUNK = 8 * 1024 * 1024

FORMAT = 2
"""Of a checkpoint's directory, as the trainer writes it."""


class FileRecord(msgspec.Struct, frozen=True):
    bytes: int
    xxh3: str


class Manifest(msgspec.Struct, frozen=True):
    """The part of a manifest that tells which files there must be."""

    format: int
    id: str
    generation: int
    files: dict[str, FileRecord]


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message names the file and why."""

    def __init__(self, message: object) -> None:
        super().__init__(brief(message))


def read_manifest(directory: Path, digest: str | None = None) -> Manifest:
    """Reads a manifest; with a digest, only if it is the very one. Raises CheckpointError."""
    file = directory / MANIFEST
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: {error.strerror}") from None
    found = xxhash.xxh3_128_hexdigest(content)
    if digest is not None and found != digest:
        raise CheckpointError(f"{file}: is not what was committed (hash {found}, journal {digest})")
    try:
        manifest = msgspec.msgpack.decode(content, type=Manifest)
    except UNDECODABLE as error:
        raise CheckpointError(f"{file}: not a manifest: {error}") from None
    if manifest.format != FORMAT:
        raise CheckpointError(f"{file}: format {manifest.format} is not known to this version")
    for name in manifest.files:
        if "/" in name or "\0" in name or name in ("", ".", ".."):
            raise CheckpointError(f"{file}: names a file outside its directory: {name!r}")
    return manifest


def check_sizes(directory: Path, digest: str | None = None) -> Manifest:
    """Reads the manifest and checks that each file is there in full length. Raises CheckpointError."""
    manifest = read_manifest(directory, digest)
    for name, record in manifest.files.items():
        try:
            size = (directory / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{directory / name}: {error.strerror}") from None
        if size != record.bytes:
            raise CheckpointError(f"{directory / name}: {size} bytes, {record.bytes} when it was written")
    return manifest


def verify(directory: Path, digest: str | None = None, progress: Callable[[int], None] | None = None) -> Manifest:
    """Hashes every file. Raises CheckpointError naming the first that is not what was written."""
    manifest = check_sizes(directory, digest)
    for name, record in manifest.files.items():
        hasher = xxhash.xxh3_128()
        try:
            with (directory / name).open("rb", buffering=0) as file:
                while block := file.read(_CHUNK):
                    hasher.update(block)
                    if progress is not None:
                        progress(len(block))
        except OSError as error:
            raise CheckpointError(f"{directory / name}: {error.strerror}") from None
        if hasher.hexdigest() != record.xxh3:
            raise CheckpointError(f"{directory / name}: corrupted (its hash is not the one it was written with)")
    return manifest


def commit(root: Path, directory: str, name: str) -> None:
    """Gives a complete checkpoint its name, durably. Harmless when it has it already. Raises CheckpointError."""
    source, target = root / directory, root / name
    if target.exists() and not source.exists():
        return
    try:
        os.rename(source, target)
        handle = os.open(root, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        raise CheckpointError(f"{source}: cannot become {target.name}: {error.strerror}") from None


def mark_golden(root: Path, name: str, golden: bool) -> None:
    """Leaves or takes away the mark in the checkpoint's directory."""
    mark = root / name / "GOLDEN"
    if golden:
        mark.touch()
    else:
        mark.unlink(missing_ok=True)


def remove(root: Path, name: str) -> None:
    """Deletes a checkpoint: first it loses its name, so that a half-deleted one is never mistaken for a whole one."""
    doomed = root / f".deleting-{name}"
    try:
        os.rename(root / name, doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def sweep(root: Path, keep: frozenset[str]) -> list[str]:
    """Deletes unfinished directories of earlier generations and half-deleted checkpoints; the names of those deleted."""
    swept = []
    for entry in root.iterdir():
        if entry.name.startswith(".") and entry.name not in keep:
            shutil.rmtree(entry, ignore_errors=True)
            swept.append(entry.name)
    return swept
