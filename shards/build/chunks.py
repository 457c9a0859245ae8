"""Chunks of documents on disk, between the steps of a build: compressed, checksummed, with random access.

A chunk is zstd frames of about 1 MB of text each, every one a msgpack list of documents, then the index,
where each frame begins and its first document, with its length and hash. A chunk under its final name is whole.
"""

from __future__ import annotations

import os
import struct
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import msgspec
import xxhash
import zstandard

from shards.build.checksummed_files import damaged
from shards.common.files import TEMPORARY
from shards.tokenization.records import Document, SampledAnswer

FRAME_BYTES = 1 << 20  # of text in a frame
LEVEL = 1
TAIL = struct.Struct("<Q16s")  # the length of the index before it, and its XXH3-128


class StoredDocument(msgspec.Struct, array_like=True, frozen=True):
    """A document as a chunk stores it."""

    key: str | None  # None: the document's only part
    parts: tuple[str, ...]
    roles: tuple[str, ...]
    where: str
    label: str = ""
    masked: tuple[int, ...] = ()
    sampled: tuple[tuple[tuple[int, ...], bool], ...] = ()
    desirable: bool = True

    def document(self) -> Document:
        key = self.parts[0] if self.key is None else self.key
        sampled = tuple(SampledAnswer(*each) for each in self.sampled)
        return Document(key, self.parts, self.roles, self.where, masked=self.masked, sampled=sampled, desirable=self.desirable)


class ChunkFrame(msgspec.Struct, array_like=True, frozen=True):
    offset: int
    size: int
    first: int  # number of its first document


class ChunkIndex(msgspec.Struct, array_like=True, frozen=True):
    frames: list[ChunkFrame]
    documents: int
    text_bytes: int


def stored(document: Document) -> StoredDocument:
    """A document in the form that chunks store."""
    alone = len(document.parts) == 1 and document.key == document.parts[0]
    key = None if alone else document.key
    sampled = tuple((each.ids, each.ended) for each in document.sampled)
    about = document.label, document.masked, sampled, document.desirable
    return StoredDocument(key, document.parts, document.roles, document.where, *about)


def size_of(document: Document | StoredDocument) -> int:
    """Bytes of UTF-8 of its parts. Raises UnicodeEncodeError for half a surrogate pair."""
    return sum(len(part) if part.isascii() else len(part.encode()) for part in document.parts)


class DocumentChunkWriter:
    """Writes one chunk. A context: left early, it removes what it wrote."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.documents = self.text_bytes = 0
        self._temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
        self._file = self._temporary.open("wb")
        self._compressor = zstandard.ZstdCompressor(level=LEVEL, write_checksum=True, write_content_size=True)
        self._encoder = msgspec.msgpack.Encoder()
        self._frames: list[ChunkFrame] = []
        self._pending: list[StoredDocument] = []
        self._pending_bytes = self._offset = 0

    def add(self, document: StoredDocument, size: int) -> None:
        """One more document, of `size` bytes of UTF-8."""
        self._pending.append(document)
        self._pending_bytes += size
        self.documents += 1
        self.text_bytes += size
        if self._pending_bytes >= FRAME_BYTES:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        raw = self._compressor.compress(self._encoder.encode(self._pending))
        self._frames.append(ChunkFrame(self._offset, len(raw), self.documents - len(self._pending)))
        self._file.write(raw)
        self._offset += len(raw)
        self._pending, self._pending_bytes = [], 0

    def close(self) -> None:
        """Write the index, sync, and rename into place."""
        self._flush()
        index = self._encoder.encode(ChunkIndex(self._frames, self.documents, self.text_bytes))
        self._file.write(index + TAIL.pack(len(index), xxhash.xxh3_128_digest(index)))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)

    def __enter__(self) -> DocumentChunkWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if not self._file.closed:
            self._file.close()
            with suppress(OSError):
                self._temporary.unlink(missing_ok=True)


class DocumentChunk:
    """Reads a chunk: all of it, or single frames. Raises ShardError for one that is missing or damaged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                end = file.seek(-TAIL.size, os.SEEK_END)
                length, seal = TAIL.unpack(file.read(TAIL.size))
                file.seek(max(0, end - length))
                raw = file.read(min(length, end))
        except OSError as error:  # one that is too short for a tail among them
            raise damaged(path, error.strerror) from None
        if xxhash.xxh3_128_digest(raw) != seal:
            raise damaged(path, "not as it was written")
        index = msgspec.msgpack.decode(raw, type=ChunkIndex)
        self.frames = index.frames
        self.documents = index.documents
        self.text_bytes = index.text_bytes
        self._decoder = msgspec.msgpack.Decoder(list[StoredDocument])

    def frame(self, number: int) -> list[StoredDocument]:
        """The documents of one frame."""
        frame = self.frames[number]
        try:
            with self.path.open("rb") as file:
                file.seek(frame.offset)
                return self._decoder.decode(zstandard.ZstdDecompressor().decompress(file.read(frame.size)))
        except OSError as error:
            raise damaged(self.path, error.strerror) from None
        except (zstandard.ZstdError, msgspec.MsgspecError):
            raise damaged(self.path, "not as it was written") from None

    def document(self, number: int) -> StoredDocument:
        """One document, by its place in the chunk."""
        at = bisect_right(self.frames, number, key=lambda frame: frame.first) - 1
        return self.frame(at)[number - self.frames[at].first]

    def __iter__(self) -> Iterator[StoredDocument]:
        for number in range(len(self.frames)):
            yield from self.frame(number)

    def __len__(self) -> int:
        return self.documents
