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

from shards.common.decoding import UNDECODABLE, brief

MANIFEST = "manifest.msgpack"
RECORD = "record.json"
"""What the journal says of a checkpoint, in its own directory: it outlives the journal."""
GOLDEN = "GOLDEN"
_CHUNK = 8 * 1024 * 1024

FORMAT = 3
"""Of a checkpoint's directory, as the trainer writes it."""
OTHER_FORMAT = "go on with the release that wrote it, or export the model there and start from it with [model] from"


class FileRecord(msgspec.Struct, frozen=True):
    bytes: int
    xxh3: str


class State(msgspec.Struct, frozen=True):
    """Where in the run it was made."""

    lineage: int = 1
    step: int = 0
    stage_name: str = ""
    stage_step: int = 0
    ended: bool = False
    settings: dict[str, float] = {}


class Manifest(msgspec.Struct, frozen=True):
    """The part of a manifest that tells which files there must be, and where in the run it was made."""

    format: int
    id: str
    generation: int
    files: dict[str, FileRecord]
    state: State = State()


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
        raise CheckpointError(f"{file}: format {manifest.format}, this release reads format {FORMAT} ({OTHER_FORMAT})")
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
    mark = root / name / GOLDEN
    if golden:
        mark.touch()
    else:
        mark.unlink(missing_ok=True)


def digest_of(directory: Path) -> str:
    """The digest of a manifest that was read before. Raises CheckpointError."""
    try:
        return xxhash.xxh3_128_hexdigest((directory / MANIFEST).read_bytes())
    except OSError as error:
        raise CheckpointError(f"{directory / MANIFEST}: {error.strerror}") from None


def discard(root: Path, name: str) -> None:
    """Deletes a writer's directory that came to nothing."""
    shutil.rmtree(root / name, ignore_errors=True)


def remove(root: Path, name: str) -> None:
    """Deletes a checkpoint: first it loses its name, so that a half-deleted one is never mistaken for a whole one."""
    doomed = root / f".deleting-{name}"
    try:
        os.rename(root / name, doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def is_golden(root: Path, name: str) -> bool:
    """Whether the checkpoint's directory says so."""
    return (root / name / GOLDEN).exists()


def listed(root: Path) -> frozenset[str] | None:
    """Names of all directories in the checkpoint directory; None where it cannot be read."""
    try:
        return frozenset(entry.name for entry in os.scandir(root) if entry.is_dir())
    except OSError:
        return None


def unfinished(root: Path, name: str) -> bool:
    """Whether a directory is no whole checkpoint's: half written or half deleted."""
    return name.startswith(".deleting-") or (name.startswith(".") and not (root / name / MANIFEST).exists())


def sweep(root: Path) -> list[str]:
    """Deletes what is half written or half deleted; the names of those deleted. Nobody may be writing."""
    swept = [name for name in sorted(listed(root) or ()) if unfinished(root, name)]
    for name in swept:
        shutil.rmtree(root / name, ignore_errors=True)
    return swept
