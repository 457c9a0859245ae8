"""A checkpoint's manifest: which files there must be, which tensors lie in them, and the state of the run.

`manifest.msgpack` is a map: format, id, generation, world, files {name: {bytes, xxh3}}, tensors, state. Its own xxh3-128 is the
checkpoint's digest, which the journal keeps. It is read without torch, checked before it is used, and nothing in it is run.
`trainer.checkpoint.storage` describes the data files.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, TypeVar

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
NOT_AS_WRITTEN = "its content is not what was written"

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


class FileEntry(msgspec.Struct, frozen=True):
    """A file of the checkpoint, as it was written."""

    bytes: int
    xxh3: str


class CheckpointPosition(msgspec.Struct, frozen=True):
    """The part of the state that says where in the run the checkpoint was made."""

    lineage: int = 1
    step: int = 0
    stage_name: str = ""
    stage_step: int = 0
    ended: bool = False
    settings: dict[str, float] = {}


class ManifestHeader(msgspec.Struct, frozen=True, kw_only=True):
    """A manifest without its tensors, which take long to read where there are many: enough to check and to list checkpoints."""

    format: int
    id: str
    generation: int
    files: dict[str, FileEntry]
    state: dict[str, Any] = {}

    @property
    def position(self) -> CheckpointPosition:
        """Raises msgspec.ValidationError for a state of other types; `read_header` has checked it."""
        return msgspec.convert(self.state, CheckpointPosition)


class Manifest(ManifestHeader, frozen=True, kw_only=True):
    """All of it."""

    tensors: dict[str, TensorEntry]
    world: int


Header = TypeVar("Header", bound=ManifestHeader)


def read(directory: Path, digest: str | None = None) -> tuple[Manifest, str]:
    """The manifest and its digest. Raises CheckpointError naming the file, also where the digest is not the one asked for."""
    manifest, found = _read(directory, Manifest, digest)
    for name, entry in manifest.tensors.items():
        if problem := _problem(entry, manifest.files):
            raise CheckpointError(f"{directory / FILE_NAME}: tensor {name!r}: {problem} (use another checkpoint)")
    return manifest, found


def read_header(directory: Path, digest: str | None = None) -> ManifestHeader:
    """As `read`, without the tensors."""
    header, _ = _read(directory, ManifestHeader, digest)
    try:
        _ = header.position
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{directory / FILE_NAME}: not a manifest: state: {error} (use another checkpoint)") from None
    return header


def digest_of(directory: Path) -> str:
    """The digest of a manifest, whatever it says. Raises CheckpointError."""
    return xxhash.xxh3_128_hexdigest(_content(directory / FILE_NAME))


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror} (use another checkpoint)") from None


def _read(directory: Path, kind: type[Header], digest: str | None) -> tuple[Header, str]:
    file = directory / FILE_NAME
    raw = _content(file)
    found = xxhash.xxh3_128_hexdigest(raw)
    if digest is not None and found != digest:
        raise CheckpointError(f"{file}: is not what was committed (hash {found}, journal {digest}; use another checkpoint)")
    try:
        version = msgspec.msgpack.decode(raw, type=_Version).format
        if version != FORMAT:
            raise CheckpointError(f"{file}: format {version}, this release reads format {FORMAT} ({OTHER_FORMAT})")
        manifest = msgspec.msgpack.decode(raw, type=kind)
    except UNDECODABLE as error:
        raise CheckpointError(f"{file}: not a manifest: {error} (use another checkpoint)") from None
    for name in manifest.files:
        if not _is_plain_name(name):
            raise CheckpointError(f"{file}: names a file outside its directory: {name!r} (use another checkpoint)")
    return manifest, found


class _Version(msgspec.Struct):
    format: int


def _is_plain_name(name: str) -> bool:
    """Whether it is a visible file's own name, on any system."""
    return 0 < len(name) < 256 and not name.startswith(".") and not any(letter in "/\\\0" for letter in name)


def _problem(entry: TensorEntry, files: dict[str, FileEntry]) -> str | None:
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


def read_chunk(directory: Path, chunk: TensorChunk, into: memoryview) -> None:
    """Fills `into`, of as many bytes as the chunk has. Raises CheckpointError where they are not those that were written."""
    file = directory / chunk.file
    digest = xxhash.xxh3_128()
    try:
        with file.open("rb", buffering=0) as source:
            source.seek(chunk.start)
            at = 0
            while at < chunk.bytes:
                count = source.readinto(into[at : at + PIECE])
                if not count:
                    raise CheckpointError(f"{file}: corrupted: it ends early (use another checkpoint)")
                digest.update(into[at : at + count])
                at += count
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror} (use another checkpoint)") from None
    if digest.hexdigest() != chunk.xxh3:
        raise CheckpointError(f"{file}: corrupted: {NOT_AS_WRITTEN} (use another checkpoint)")
