"""Chunks: the durable truth of a run's metrics, append-only files of checksummed frames.

A chunk file is named by the controller's term, `000001.chunk`, and is created exclusively: nobody appends to another
term's file. It is a sequence of frames, each

    length   u32, little-endian: bytes of the body
    check    u32, little-endian: xxh32 of the body
    body     msgpack array [source, number, rows]
             a row is [lineage, step, tokens, time, {metric: value}]

Reading ends at the first frame that is short or fails its check: the torn tail of a writer that was killed. What came
after it was never acknowledged, so its source sends it again.
"""

import logging
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import xxhash

from shards.common.decoding import UNDECODABLE, Count, Int64, brief

log = logging.getLogger(__name__)

HEADER = struct.Struct("<II")
MAX_BODY = 64 << 20  # a larger length is damage, not data


class StepMetrics(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """The metrics of one step. `time` is Unix seconds; `tokens` counts from the run's first step."""

    lineage: Int64
    step: Int64
    tokens: Int64
    time: float
    values: dict[str, float]


class MetricFrame(msgspec.Struct, array_like=True, frozen=True, gc=False):
    """Rows as one source sent them; (source, number) names the frame for ever."""

    source: str
    number: Count
    rows: list[StepMetrics]


def encode(frame: MetricFrame) -> bytes:
    """The frame's bytes in a chunk, header included."""
    body = _encoder.encode(frame)
    return HEADER.pack(len(body), xxhash.xxh32_intdigest(body)) + body


class FrameEnd(NamedTuple):
    """The end of a frame in a chunk, with the frame's header to tell whether it is still the same frame."""

    end: int
    header: bytes


def read_frames(path: Path, offset: int = 0) -> Iterator[tuple[MetricFrame, FrameEnd]]:
    """Frames from `offset` on, each with its mark; ends quietly at a torn tail."""
    with path.open("rb") as file:
        file.seek(offset)
        while len(header := file.read(HEADER.size)) == HEADER.size:
            length, check = HEADER.unpack(header)
            if length > MAX_BODY:
                return
            body = file.read(length)
            if len(body) < length or xxhash.xxh32_intdigest(body) != check:
                return
            offset += HEADER.size + length
            try:
                frame = _decoder.decode(body)
            except UNDECODABLE as error:
                # Whole, and yet no frame of ours: another version's, or somebody else's. What follows it may be read.
                log.warning("%s: the frame before byte %d is passed over: %s", path, offset, brief(error))
                frame = MetricFrame("", 0, [])
            yield frame, FrameEnd(offset, header)


def holds(path: Path, mark: FrameEnd) -> bool:
    """Whether the marked frame is still where it was."""
    length, check = HEADER.unpack(mark.header)
    start = mark.end - length - HEADER.size
    if start < 0 or not path.exists():
        return False
    with path.open("rb") as file:
        file.seek(start)
        header = file.read(HEADER.size)
        body = file.read(length)
    return header == mark.header and len(body) == length and xxhash.xxh32_intdigest(body) == check


class MetricChunkWriter:
    """Appends frames to one term's chunk. A frame may be acknowledged once `sync` has returned after it."""

    def __init__(self, folder: Path, term: int) -> None:
        """Raises FileExistsError when the term already has a chunk: two controllers believe they hold it."""
        folder.mkdir(exist_ok=True)
        self.path = folder / f"{term:06d}.chunk"
        self._file = self.path.open("xb", buffering=1 << 20)
        self.offset = 0
        self._synced = 0
        folder_descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(folder_descriptor)  # the file's name must survive too
        finally:
            os.close(folder_descriptor)

    def append(self, frame: MetricFrame) -> FrameEnd:
        """Writes without syncing. Raises ValueError for a frame over the limit."""
        data = encode(frame)
        if len(data) - HEADER.size > MAX_BODY:
            raise ValueError(f"{self.path.name}: frame {frame.source}/{frame.number} is over {MAX_BODY >> 20} MiB")
        self._file.write(data)
        self.offset += len(data)
        return FrameEnd(self.offset, data[: HEADER.size])

    def sync(self) -> None:
        """Returns once everything appended is on the disk."""
        if self._synced < self.offset:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._synced = self.offset

    def close(self) -> None:
        self.sync()
        self._file.close()


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(MetricFrame)
