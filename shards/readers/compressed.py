"""Streams the content of .gz, .zst, .bz2 and .xz, in bounded memory whatever the ratio, and detects truncated files.

Concatenated members are read as one. A damaged file raises one of DAMAGE after all data before the damage was returned.
"""

from __future__ import annotations

import bz2
import io
import lzma
import zlib
from collections.abc import Callable
from typing import IO, Any, Protocol

import zstandard

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
BLOCK = 1 << 20  # bytes of output asked for at a time
STORED = 1 << 18  # bytes of input taken at a time
LARGEST_WINDOW = 1 << 27  # bytes of memory that a .zst may ask for, as `zstd -d` allows
LARGEST_DICTIONARY = 1 << 28  # bytes of memory that an .xz may ask for


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    @property
    def needs_input(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's decompressor under the interface that bz2's and lzma's have; it checks each member's CRC."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    def decompress(self, data: bytes, max_length: int) -> bytes:
        tail = self._inner.unconsumed_tail
        return self._inner.decompress(tail + data if tail else data, max_length)


class _Members(io.RawIOBase):
    """Decompressed bytes of concatenated members. Zeros between and after them, which tapes and `xz` add, are skipped."""

    def __init__(self, raw: IO[bytes], new: Callable[[], Any]) -> None:
        self._raw, self._new = raw, new
        self._member: _Decompressor | None = None
        self._waiting = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        while True:
            if self._member is None:
                while not (start := self._waiting.lstrip(b"\0")):
                    self._waiting = self._raw.read(STORED) or b""
                    if not self._waiting:
                        return 0
                self._waiting, self._member = start, self._new()
            member = self._member
            data, self._waiting = self._waiting, b""
            at_end = False
            if not data and member.needs_input:
                data = self._raw.read(STORED) or b""
                at_end = not data
            found = member.decompress(data, len(view))
            if member.eof:
                self._waiting, self._member = member.unused_data, None
            elif at_end and not found:
                raise EOFError("it ends within compressed data")
            if found:
                view[: len(found)] = found
                return len(found)


class _Frames(io.RawIOBase):
    """Parses the frames of a .zst as its bytes pass by, because the decompressor does not report a truncated file.

    The frame's layout: RFC 8878, section 3.1. Only block headers are looked at: 3 bytes in up to 128 KiB.
    """

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw = raw
        self._have = bytearray()  # of an incomplete header
        self._skip = 0  # bytes up to the next header
        self._inside = False  # a frame, between its header and its last block
        self._checksum = 0
        self._gave_up = False

    @property
    def whole(self) -> bool:
        """Whether the bytes up to here end with a frame."""
        return self._gave_up or not (self._have or self._skip or self._inside)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._raw.read(len(buffer)) or b""
        buffer[: len(data)] = data
        if not self._gave_up:
            self._follow(data)
        return len(data)

    def _follow(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            if self._skip:
                step = min(self._skip, len(data) - at)
                self._skip -= step
                at += step
                continue
            self._have.append(data[at])
            at += 1
            self._header()

    def _header(self) -> None:
        have = self._have
        if self._inside:
            if len(have) == 3:
                block = int.from_bytes(have, "little")
                self._skip = 1 if (block >> 1) & 3 == 1 else block >> 3
                if block & 1:
                    self._inside = False
                    self._skip += self._checksum
                have.clear()
        elif len(have) == 8 and 0x184D2A50 <= int.from_bytes(have[:4], "little") <= 0x184D2A5F:
            self._skip = int.from_bytes(have[4:], "little")
            have.clear()
        elif len(have) >= 5 and int.from_bytes(have[:4], "little") == zstandard.MAGIC_NUMBER:
            descriptor = have[4]
            single = descriptor >> 5 & 1
            content = (single, 2, 4, 8)[descriptor >> 6]
            self._skip = (1 - single) + (0, 1, 2, 4)[descriptor & 3] + content
            self._checksum = 4 if descriptor & 4 else 0
            self._inside = True
            have.clear()
        elif len(have) >= 8:
            self._gave_up = True  # not a frame: the decompressor reports it


class _Zstd(io.RawIOBase):
    def __init__(self, raw: IO[bytes]) -> None:
        self._frames = _Frames(raw)
        decompressor = zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        self._stream = decompressor.stream_reader(self._frames, read_size=STORED, read_across_frames=True, closefd=False)  # type: ignore[arg-type]

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto1(buffer)  # at most one frame, so that none before a damaged one is lost
        if not count and not self._frames.whole:
            raise EOFError("it ends within a zstd frame")
        return count


def opened(name: str, raw: io.BufferedReader[Any]) -> io.BufferedReader[Any]:
    """The decompressed bytes, by the name's ending; for any other ending `raw` itself."""
    if name.endswith(".gz"):
        return io.BufferedReader(_Members(raw, _Gzip), BLOCK)
    if name.endswith(".zst"):
        return io.BufferedReader(_Zstd(raw), BLOCK)
    if name.endswith(".bz2"):
        return io.BufferedReader(_Members(raw, bz2.BZ2Decompressor), BLOCK)
    if name.endswith(".xz"):
        return io.BufferedReader(_Members(raw, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=LARGEST_DICTIONARY)), BLOCK)
    return raw


def plain_name(name: str) -> str:
    """The name without the compression's ending."""
    return next((name.removesuffix(end) for end in COMPRESSED if name.endswith(end)), name)
