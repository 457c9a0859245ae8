"""What a checkpoint's manifest says, how it is read without trusting it, and how the files it names are checked.

No torch here: whoever only looks at checkpoints needs none. The format is described in `trainer.checkpoint.storage`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from shards.common.decoding import UNDECODABLE, brief

FORMAT = 3
"""3: live settings and recipe keys have the field's names.

2: queries, keys and values of a group of heads lie together; one step count for all parameters."""
OTHER_FORMAT = "go on with the release that wrote it, or export the model there and start from it with [model] from"
FILE_NAME = "manifest.msgpack"
PIECE = 8 * 1024 * 1024
"""Bytes read, hashed or written at a time."""

ITEM_BYTES = {
    "float32": 4,
    "float64": 8,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}


class CheckpointError(Exception):
    """A checkpoint cannot be read or written; the message names the file, what is wrong, and the way out."""

    def __init__(self, message: object) -> None:
        super().__init__(brief(message))


class MismatchError(CheckpointError):
    """The checkpoint is whole, and of another model."""


class TensorChunk(msgspec.Struct, frozen=True):
    """A box of a tensor, contiguous in one file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    bytes: int
    xxh3: str


class TensorEntry(msgspec.Struct, frozen=True):
    """A tensor, in chunks that together cover it."""

    shape: tuple[int, ...]
    dtype: str
    chunks: tuple[TensorChunk, ...]


class File(msgspec.Struct, frozen=True):
    bytes: int
    xxh3: str


class Manifest(msgspec.Struct, frozen=True):
    format: int
    files: dict[str, File]
    tensors: dict[str, TensorEntry]
    state: dict[str, Any]
    generation: int
    id: str
    world: int


def read(directory: Path) -> tuple[Manifest, str]:
    """The manifest and its digest. Raises CheckpointError naming the file; runs nothing of what it reads."""
    file = directory / FILE_NAME
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror} (use another checkpoint)") from None
    try:
        manifest = msgspec.msgpack.decode(raw, type=Manifest)
    except UNDECODABLE as error:
        raise CheckpointError(f"{file}: is not a manifest: {error} (use another checkpoint)") from None
    if manifest.format != FORMAT:
        raise CheckpointError(f"{file}: format {manifest.format}, this release reads format {FORMAT} ({OTHER_FORMAT})")
    for name, entry in manifest.tensors.items():
        problem = _problem(entry, manifest.files)
        if problem:
            raise CheckpointError(f"{file}: tensor {name!r}: {problem} (use another checkpoint)")
    for name in manifest.files:
        if "/" in name or "\\" in name or name.startswith(".") or "\0" in name:
            raise CheckpointError(f"{file}: names a file outside its directory: {name!r}")
    return manifest, xxhash.xxh3_128_hexdigest(raw)


def _problem(entry: TensorEntry, files: dict[str, File]) -> str | None:
    item = ITEM_BYTES.get(entry.dtype)
    if item is None:
        return f"its type is {entry.dtype!r}"
    if any(size < 0 for size in entry.shape):
        return f"its shape is {entry.shape}"
    for chunk in entry.chunks:
        if not len(chunk.offsets) == len(chunk.sizes) == len(entry.shape):
            return "a chunk has another number of dimensions"
        if any(o < 0 or s < 0 or o + s > n for o, s, n in zip(chunk.offsets, chunk.sizes, entry.shape, strict=True)):
            return "a chunk lies outside it"
        if chunk.bytes != math.prod(chunk.sizes) * item:
            return "a chunk has another number of bytes than its shape needs"
        file = files.get(chunk.file)
        if file is None or chunk.start < 0 or chunk.start + chunk.bytes > file.bytes:
            return f"a chunk lies outside the file {chunk.file!r}"
    # Chunks that overlap could cover the count and leave a hole; a writer never makes them.
    if sum(math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.shape):
        return "its chunks do not cover it"
    return None


def hash_file(file: Path, stop: Callable[[], bool] = lambda: False) -> tuple[int, str]:
    """Bytes and xxh3_128 of a file, read in pieces. `stop` is asked between pieces; CheckpointError when it says so."""
    digest = xxhash.xxh3_128()
    size = 0
    with file.open("rb", buffering=0) as source:
        while piece := source.read(PIECE):
            if stop():
                raise CheckpointError(f"{file}: no longer needed")
            digest.update(piece)
            size += len(piece)
    return size, digest.hexdigest()


def read_chunk(directory: Path, chunk: TensorChunk, into: memoryview) -> None:
    """Fills `into`, bytes as many as the chunk's, with what was written. Raises CheckpointError where that is no longer there."""
    file = directory / chunk.file
    digest = xxhash.xxh3_128()
    try:
        with file.open("rb", buffering=0) as source:
            source.seek(chunk.start)
            at = 0
            while at < chunk.bytes:
                count = source.readinto(into[at : at + PIECE])
                if not count:
                    raise CheckpointError(f"{file}: ends early, it was cut short (use another checkpoint)")
                digest.update(into[at : at + count])
                at += count
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror} (use another checkpoint)") from None
    if digest.hexdigest() != chunk.xxh3:
        raise CheckpointError(f"{file}: its content is not what was written (use another checkpoint)")


def verify(directory: Path) -> list[str]:
    """Reads everything and names each file that is not as it was written, and why. Empty: all is well."""
    try:
        manifest, _ = read(directory)
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name, known in sorted(manifest.files.items()):
        file = directory / name
        try:
            size, digest = hash_file(file)
        except OSError as error:
            found.append(f"{file}: cannot be read: {error.strerror}")
            continue
        if size != known.bytes:
            found.append(f"{file}: {size} bytes where {known.bytes} were written")
        elif digest != known.xxh3:
            found.append(f"{file}: its content is not what was written")
    return found
