"""One column of numbers in one `.zst` file, compressed, checked and seekable.

The file is zstd frames of a fixed number of items each (the last may hold fewer), every frame with its content size and
checksum in it, then the seek table of the zstd seekable format in a skippable frame. `zstd -d` gives the plain
little-endian items. A reader decompresses only the frames it needs and checks each twice: by zstd's own checksum, and by
the seek table's, so that a frame of another place or file is refused too. docs/shard-format.md describes the bytes.
"""

from __future__ import annotations

import itertools
import os
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash
import zstandard

from shards.common.arrays import Array
from shards.common.decoding import Count
from shards.common.errors import ShardError
from shards.common.files import TEMPORARY, sync_directory

SKIPPABLE_MAGIC = 0x184D2A5E
SEEKABLE_MAGIC = 0x8F92EAB1
CHECKSUM_FLAG = 0x80
CHECKSUM_BYTES = 4
FOOTER = struct.Struct("<IBI")  # frames, descriptor, magic
HEADER = struct.Struct("<II")  # skippable magic, bytes that follow
ENTRY = np.dtype([("compressed", "<u4"), ("plain", "<u4"), ("checksum", "<u4")])
DTYPES = ("uint8", "uint16", "uint32", "uint64")
PASSING = 4  # frames read one after the other, from which on they are not kept: what is decoded into the same memory is faster


class ColumnFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the manifest keeps of one file, enough to refuse any other in its place."""

    file: str  # name within the manifest's directory
    dtype: str  # uint8, uint16, uint32 or uint64, little-endian
    items: Count  # numbers in it
    bytes: Count  # size of the file
    hash: str  # xxh3_128 of the whole file, hex
    table: str  # xxh3_128 of its seek table (skippable header to footer), hex: checked whenever it is opened


class Cache:
    """Decoded frames by (file, frame), the least recently used dropped beyond `limit` bytes. Thread-safe."""

    def __init__(self, limit: int = 16 << 20) -> None:
        self.limit = limit
        self._frames: OrderedDict[tuple[int, int], Array] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: tuple[int, int]) -> Array | None:
        with self._lock:
            frame = self._frames.get(key)
            if frame is not None:
                self._frames.move_to_end(key)
            return frame

    def put(self, key: tuple[int, int], frame: Array) -> None:
        with self._lock:
            if key in self._frames:
                return
            self._frames[key] = frame
            self._bytes += frame.nbytes
            while self._bytes > self.limit and len(self._frames) > 1:
                self._bytes -= self._frames.popitem(last=False)[1].nbytes


class ColumnWriter:
    """Writes one column beside its final name and gives it that name when all of it is on the disk.

    A file under its final name is therefore always whole. Left by an exception, the context removes what it wrote.
    """

    def __init__(self, path: Path, dtype: str, frame_items: int, level: int = 9) -> None:
        if dtype not in DTYPES:
            raise ValueError(f"{dtype} is none of {', '.join(DTYPES)}")
        self.path = path
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.items = 0
        self._frame_bytes = frame_items * self.dtype.itemsize
        self._compressor = zstandard.ZstdCompressor(level=level, write_checksum=True, write_content_size=True)
        self._pending = bytearray()
        self._entries: list[tuple[int, int, int]] = []
        self._hash = xxhash.xxh3_128()
        self._temporary = path.with_name(path.name + TEMPORARY)
        self._file = self._temporary.open("wb")
        self._bytes = 0

    def append(self, values: npt.ArrayLike) -> None:
        """Add items, in order; those that do not fit the dtype raise OverflowError."""
        array = np.asarray(values)
        if array.dtype != self.dtype:
            if array.size and (int(array.min()) < 0 or int(array.max()) > np.iinfo(self.dtype).max):
                raise OverflowError(f"{self.path.name}: a value does not fit {self.dtype.name}")
            array = array.astype(self.dtype)
        self.items += array.size
        self._pending += array.tobytes()
        whole = len(self._pending) - len(self._pending) % self._frame_bytes
        if whole:
            view = memoryview(self._pending)
            for start in range(0, whole, self._frame_bytes):
                self._write_frame(view[start : start + self._frame_bytes])
            view.release()
            del self._pending[:whole]

    def _write_frame(self, plain: memoryview | bytes) -> None:
        frame = self._compressor.compress(plain)
        self._entries.append((len(frame), len(plain), xxhash.xxh64_intdigest(plain) & 0xFFFFFFFF))
        self._write(frame)

    def _write(self, raw: bytes) -> None:
        self._file.write(raw)
        self._hash.update(raw)
        self._bytes += len(raw)

    def close(self) -> ColumnFile:
        """Write the last frame and the seek table, sync, and rename the file into place."""
        if self._pending:
            self._write_frame(bytes(self._pending))
            self._pending.clear()
        entries = np.array(self._entries, dtype=ENTRY).tobytes()
        table = HEADER.pack(SKIPPABLE_MAGIC, len(entries) + FOOTER.size)
        table += entries + FOOTER.pack(len(self._entries), CHECKSUM_FLAG, SEEKABLE_MAGIC)
        self._write(table)
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)
        sync_directory(self.path.parent)
        return ColumnFile(
            file=self.path.name,
            dtype=self.dtype.name,
            items=self.items,
            bytes=self._bytes,
            hash=self._hash.hexdigest(),
            table=xxhash.xxh3_128_hexdigest(table),
        )

    def abort(self) -> None:
        """Give up: close and remove what was written so far."""
        if not self._file.closed:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> ColumnWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.abort()


_decompressors = threading.local()
_readers = itertools.count()


def _decompressor() -> zstandard.ZstdDecompressor:
    """This thread's own: a decompressor must not serve two threads at once."""
    found: zstandard.ZstdDecompressor | None = getattr(_decompressors, "own", None)
    if found is None:
        found = _decompressors.own = zstandard.ZstdDecompressor()
    return found


class ColumnReader:
    """Random access to one column file: `reader.read(start, stop)` gives items, checked. Thread-safe.

    Reads with `pread`, not through a mapping: a file cut short under a mapping would kill the process instead of raising.
    `known` is what the manifest says of the file; any difference is refused when the file is opened.
    """

    def __init__(
        self, path: Path, dtype: str, frame_items: int, *, known: ColumnFile | None = None, cache: Cache | None = None
    ) -> None:
        self._handle = -1
        self.path = path
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.frame_items = frame_items
        self._full = frame_items * self.dtype.itemsize  # bytes of a whole frame's items
        self._cache = cache if cache is not None else Cache()
        self._number = next(_readers)  # not id(), which a later reader may get again
        self._nothing = np.empty(0, self.dtype)
        self._latest = -1, self._nothing  # the frame that was asked for last, which mostly is asked for again
        self._run = 0  # frames asked for one after the other; of several threads' reading it is a guess
        self._header = b""  # of a frame that was found well; all whole ones of a writer begin alike
        try:
            self._handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ShardError(f"{path}: {error.strerror} (restore the file, or build these shards again)") from None
        try:
            self._read_table(known)
        except BaseException:
            self.close()
            raise

    def _refuse(self, what: str) -> ShardError:
        return ShardError(f"{self.path}: {what} (restore the file from a copy, or delete its source and build again)")

    def _read_table(self, known: ColumnFile | None) -> None:
        size = os.fstat(self._handle).st_size
        if known is not None and size != known.bytes:
            raise self._refuse(f"{size} bytes, but the manifest says {known.bytes}")
        smallest = HEADER.size + FOOTER.size
        if size < smallest:
            raise self._refuse(f"only {size} bytes, too short for a seek table")
        frames, descriptor, magic = FOOTER.unpack(self._pread(FOOTER.size, size - FOOTER.size))
        if magic != SEEKABLE_MAGIC:
            raise self._refuse(f"no seek table at byte {size - 4}: the file is cut short or not a shard")
        if descriptor != CHECKSUM_FLAG:
            raise self._refuse(f"seek table descriptor {descriptor:#x} at byte {size - 5}, expected {CHECKSUM_FLAG:#x}")
        length = smallest + frames * ENTRY.itemsize
        if length > size:
            raise self._refuse(f"the seek table at byte {size - FOOTER.size} names {frames} frames, more than fit")
        table = self._pread(length, size - length)
        if HEADER.unpack_from(table) != (SKIPPABLE_MAGIC, length - HEADER.size):
            raise self._refuse(f"damaged seek table header at byte {size - length}")
        if known is not None and xxhash.xxh3_128_hexdigest(table) != known.table:
            raise self._refuse(f"the seek table at byte {size - length} is not the one of the manifest")
        entries = np.frombuffer(table, ENTRY, frames, HEADER.size)
        # Offsets in 64 bits: the table holds only 32-bit sizes, and a shard may well pass 4 GiB.
        self._offsets = np.zeros(frames + 1, np.uint64)
        np.cumsum(entries["compressed"], out=self._offsets[1:], dtype=np.uint64)
        if int(self._offsets[-1]) != size - length:
            raise self._refuse(f"its frames add up to {int(self._offsets[-1])} bytes, not {size - length}")
        plain = entries["plain"].astype(np.int64)
        if frames and (np.any(plain[:-1] != self._full) or not 0 < plain[-1] <= self._full or plain[-1] % self.dtype.itemsize):
            raise self._refuse(f"its frames do not hold {self.frame_items} items of {self.dtype.name} each")
        # Views that give Python's own numbers: a look into an array takes several times as long.
        self._starts, self._checksums = self._offsets.data, entries["checksum"].astype(np.uint32).data
        self.frames = frames
        self.bytes = size
        self.items = int(plain.sum()) // self.dtype.itemsize
        if known is not None and self.items != known.items:
            raise self._refuse(f"{self.items} items, but the manifest says {known.items}")
        self._last_plain = int(plain[-1]) if frames else 0
        self._firsts: dict[int, int] = {}

    def _pread(self, count: int, offset: int) -> bytes:
        """Exactly `count` bytes at `offset`; a short read means that the file was cut."""
        try:
            raw = os.pread(self._handle, count, offset)
            while len(raw) < count:
                more = os.pread(self._handle, count - len(raw), offset + len(raw))
                if not more:
                    raise self._refuse(f"ends at byte {offset + len(raw)}, within what should be there")
                raw += more
        except OSError as error:
            raise self._refuse(f"cannot be read at byte {offset}: {error.strerror}") from None
        return raw

    def frame(self, number: int) -> Array:
        """The items of one frame, read-only, checked; cached, but for those of a file that is read from one end to the other."""
        latest, found = self._latest
        if latest == number:
            return found
        self._run = self._run + 1 if number == latest + 1 else 0
        key = self._number, number
        cached = self._cache.get(key)
        if cached is None and self._run >= PASSING:
            self._latest = -1, self._nothing
            del latest, found  # whose memory the next one may have
            cached = self.decode_frame(number)
        elif cached is None:
            cached = self.decode_frame(number)
            self._cache.put(key, cached)
        self._latest = number, cached
        return cached

    def decode_frame(self, number: int) -> Array:
        """The items of one frame, read from the file, past the cache."""
        offset = self._starts[number]
        raw = self._pread(self._starts[number + 1] - offset, offset)
        last = number == self.frames - 1
        expected = self._last_plain if last else self._full
        try:
            # What was found well once need not be taken apart again.
            if last or not self._header or not raw.startswith(self._header):
                self._check_header(raw, expected, number, keep=not last)
            # A frame ends with its content's checksum, which is the very number that the table has, and which zstd checks:
            # so one hash is enough to know both damage and a frame of another place.
            if int.from_bytes(raw[-CHECKSUM_BYTES:], "little") != self._checksums[number]:
                raise self._refuse(f"{self._where(number)}: its content is not what the seek table says")
            plain = _decompressor().decompress(raw, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise self._refuse(f"{self._where(number)} is damaged: {error}") from None
        if len(plain) != expected:
            raise self._refuse(f"{self._where(number)}: its content is not what the seek table says")
        return np.frombuffer(plain, self.dtype)

    def _where(self, number: int) -> str:
        return f"frame {number} at byte {self._starts[number]}"

    def _check_header(self, raw: bytes, expected: int, number: int, *, keep: bool) -> None:
        """That a frame's header asks for what the table says. keep: it is that of a whole frame, to be known again."""
        header = zstandard.get_frame_parameters(raw)
        # A flipped bit in a frame's own header could ask for gigabytes, or turn its checksum off: look first.
        unused = raw[4] & 0x18  # bits of the header's descriptor that no encoder sets and no decoder looks at
        if header.content_size != expected or not header.has_checksum or header.dict_id or unused:
            raise self._refuse(f"{self._where(number)}: its header is damaged")
        if keep:
            self._header = raw[: zstandard.frame_header_size(raw)]

    def read(self, start: int, stop: int) -> Array:
        """Items [start, stop); may be a read-only view of a cached frame. Raises IndexError outside [0, items]."""
        if not 0 <= start <= stop <= self.items:
            raise IndexError(f"{self.path}: items {start} to {stop} of {self.items}")
        first, offset = divmod(start, self.frame_items)
        if stop - start + offset <= self.frame_items:
            if stop == start:
                return np.empty(0, self.dtype)
            number, latest = self._latest
            return (latest if number == first else self.frame(first))[offset : offset + stop - start]
        out = np.empty(stop - start, self.dtype)
        done = 0
        for number in range(first, -(-stop // self.frame_items)):
            part = self.frame(number)[offset : offset + stop - start - done]
            out[done : done + len(part)] = part
            done += len(part)
            offset = 0
        return out

    def count_up_to(self, value: int) -> int:
        """How many items are <= `value`, in a column that never falls: bisects frames, then within one."""
        low, high = 0, self.frames
        while low < high:
            middle = (low + high) // 2
            if self._first(middle) <= value:
                low = middle + 1
            else:
                high = middle
        if low == 0:
            return 0
        within = np.searchsorted(self.frame(low - 1), self.dtype.type(value), side="right")
        return (low - 1) * self.frame_items + int(within)

    def _first(self, number: int) -> int:
        found = self._firsts.get(number)
        if found is None:
            found = self._firsts[number] = int(self.frame(number)[0])
        return found

    def damaged(self, tell: Callable[[int], None] = lambda count: None) -> Iterable[str]:
        """Read every frame; yield a message for each that is refused. tell: called with the bytes of each."""
        for number in range(self.frames):
            try:
                self.decode_frame(number)
            except ShardError as error:
                yield str(error)
            tell(self._starts[number + 1] - self._starts[number])

    def hash(self) -> str:
        """xxh3_128 of the whole file, hex."""
        digest = xxhash.xxh3_128()
        for offset in range(0, self.bytes, 1 << 20):
            digest.update(self._pread(min(1 << 20, self.bytes - offset), offset))
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the file. Frames already decoded stay valid."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def __del__(self) -> None:
        self.close()
