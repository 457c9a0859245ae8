"""One column in one file: what it gives back, who else can read it, and that damage never passes for data."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from shards.common.errors import ShardError
from shards.format.seekable_zstd import (
    CHECKSUM_FLAG,
    ENTRY,
    FOOTER,
    HEADER,
    SEEKABLE_MAGIC,
    SKIPPABLE_MAGIC,
    Array,
    Cache,
    ColumnFile,
    ColumnReader,
    ColumnWriter,
)

FRAME = 256


def write(path: Path, values: Array, frame: int = FRAME) -> ColumnFile:
    with ColumnWriter(path, values.dtype.name, frame) as writer:
        for part in np.array_split(values, 7):
            writer.append(part)
        return writer.close()


def tokens(count: int, dtype: str = "uint16", seed: int = 0) -> Array:
    """Neither constant nor random: like text, it compresses."""
    rng = np.random.default_rng(seed)
    return np.minimum(rng.geometric(0.01, count), 4000).astype(dtype)


@given(count=st.integers(0, 5 * FRAME), dtype=st.sampled_from(["uint8", "uint16", "uint32", "uint64"]), data=st.data())
def test_any_range_reads_back_as_written(tmp_path_factory: pytest.TempPathFactory, count, dtype, data) -> None:
    values = tokens(count, "uint64").astype(dtype)
    path = tmp_path_factory.mktemp("column") / "c.zst"
    known = write(path, values)
    reader = ColumnReader(path, dtype, FRAME, known=known)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    assert reader.items == count
    assert np.array_equal(reader.read(start, stop), values[start:stop])
    reader.close()


def test_the_zstd_program_gives_the_plain_little_endian_items(tmp_path: Path, zstd: str) -> None:
    values = tokens(10 * FRAME + 17, "uint32")
    write(tmp_path / "c.zst", values)
    plain = subprocess.run([zstd, "-dc", str(tmp_path / "c.zst")], check=True, capture_output=True).stdout
    assert plain == values.astype("<u4").tobytes()


def test_the_zstd_program_finds_the_checksums_right(tmp_path: Path, zstd: str) -> None:
    write(tmp_path / "c.zst", tokens(10 * FRAME))
    assert subprocess.run([zstd, "-t", str(tmp_path / "c.zst")], capture_output=True).returncode == 0
    listing = subprocess.run([zstd, "-lv", str(tmp_path / "c.zst")], check=True, capture_output=True, text=True).stdout
    assert "XXH64" in listing


def refused(raw: bytes, path: Path, known: ColumnFile | None, original: Array | None = None) -> bool:
    """Whether reading all of a damaged file raises ShardError. Anything else it raises is a bug and passes through.

    With `original`, damage that changes no item counts as refused where the file's hash betrays it.
    """
    path.write_bytes(raw)
    try:
        reader = ColumnReader(path, "uint16", FRAME, known=known)
        read = [reader.frame(number) for number in range(reader.frames)]
    except ShardError:
        return True
    # A few bits mean nothing to zstd's decoder: then every item must be right, and the whole file's hash still tell.
    if original is not None and np.array_equal(np.concatenate(read), original):
        return known is None or reader.hash() != known.hash
    return False


@pytest.mark.parametrize("with_manifest", [True, False])
def test_a_single_bit_flip_is_refused_or_changes_no_token(tmp_path: Path, with_manifest: bool) -> None:
    values = tokens(12 * FRAME + 5)
    known = write(tmp_path / "c.zst", values)
    raw = (tmp_path / "c.zst").read_bytes()
    assert not refused(raw, tmp_path / "whole.zst", known, values)
    rng = random.Random(1)
    # Every bit of the seek table and of one frame's header, and some of all others.
    table = range((len(raw) - 13 * ENTRY.itemsize - 17) * 8, len(raw) * 8)
    for bit in [*table, *range(96), *rng.sample(range(len(raw) * 8), 250)]:
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        assert refused(bytes(damaged), tmp_path / "d.zst", known if with_manifest else None, values), f"bit {bit}"


def test_a_file_cut_short_or_grown_is_refused(tmp_path: Path) -> None:
    known = write(tmp_path / "c.zst", tokens(12 * FRAME))
    raw = (tmp_path / "c.zst").read_bytes()
    rng = random.Random(2)
    for length in [0, 1, 8, 16, 17, len(raw) - 1, *rng.sample(range(len(raw)), 60)]:
        for manifest in (known, None):
            assert refused(raw[:length], tmp_path / "d.zst", manifest), f"{length} bytes"
    assert refused(raw + b"\0", tmp_path / "d.zst", None)
    assert refused(raw[:100] + raw[101:], tmp_path / "d.zst", None)
    assert refused(raw + raw, tmp_path / "d.zst", None)


def test_frames_that_changed_places_are_refused(tmp_path: Path) -> None:
    """Each is whole by its own checksum, and the sizes in the seek table are made to fit."""
    write(tmp_path / "c.zst", tokens(3 * FRAME))
    raw = (tmp_path / "c.zst").read_bytes()
    reader = ColumnReader(tmp_path / "c.zst", "uint16", FRAME)
    a, b, c, end = reader._offsets.tolist()
    table = bytearray(raw[end:])
    entries = np.frombuffer(table, ENTRY, 3, HEADER.size)
    entries["compressed"] = entries["compressed"][[1, 0, 2]]
    swapped = raw[b:c] + raw[a:b] + raw[c:end] + bytes(table)
    assert zstandard.ZstdDecompressor().decompress(swapped[: c - b])  # a frame that zstd alone would accept
    assert refused(swapped, tmp_path / "d.zst", None)


def test_another_whole_file_in_its_place_is_refused_at_opening(tmp_path: Path) -> None:
    known = write(tmp_path / "a.zst", tokens(4 * FRAME, seed=1))
    other = tokens(4 * FRAME, seed=1)
    other[[5, 6]] = other[[6, 5]]
    write(tmp_path / "b.zst", other)
    raw = (tmp_path / "b.zst").read_bytes()
    (tmp_path / "a.zst").write_bytes(raw)
    with pytest.raises(ShardError, match=r"a\.zst.*manifest"):
        ColumnReader(tmp_path / "a.zst", "uint16", FRAME, known=known)


def test_an_error_names_the_file_the_frame_the_byte_and_the_way_out(tmp_path: Path) -> None:
    path = tmp_path / "c.zst"
    known = write(path, tokens(8 * FRAME))
    offset = int(ColumnReader(path, "uint16", FRAME)._offsets[5])
    raw = bytearray(path.read_bytes())
    raw[offset + 40] ^= 4
    path.write_bytes(raw)
    reader = ColumnReader(path, "uint16", FRAME, known=known)
    with pytest.raises(ShardError) as caught:
        reader.read(0, 8 * FRAME)
    message = str(caught.value)
    assert str(path) in message and f"frame 5 at byte {offset}" in message and "restore the file" in message


def test_only_the_frames_that_are_needed_are_read(tmp_path: Path) -> None:
    path = tmp_path / "c.zst"
    values = tokens(8 * FRAME)
    known = write(path, values)
    raw = bytearray(path.read_bytes())
    raw[int(ColumnReader(path, "uint16", FRAME)._offsets[5]) + 30] ^= 1
    path.write_bytes(raw)
    reader = ColumnReader(path, "uint16", FRAME, known=known)
    assert np.array_equal(reader.read(6 * FRAME, 8 * FRAME), values[6 * FRAME :])
    assert np.array_equal(reader.read(0, 5 * FRAME), values[: 5 * FRAME])
    assert len(list(reader.damaged())) == 1


def test_a_file_cut_while_it_is_open_is_an_error_not_the_end_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "c.zst"
    write(path, tokens(8 * FRAME))
    reader = ColumnReader(path, "uint16", FRAME)
    os.truncate(path, 100)
    with pytest.raises(ShardError, match="ends at byte"):
        reader.read(7 * FRAME, 8 * FRAME)


def test_a_missing_file_is_an_error_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"gone\.zst: No such file.*restore"):
        ColumnReader(tmp_path / "gone.zst", "uint16", FRAME)


def test_offsets_pass_four_gibibytes(tmp_path: Path) -> None:
    """A sparse file whose first two frames are holes of 3 GiB, its last one real."""
    values = tokens(FRAME)
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(values.tobytes())
    import xxhash

    checksum = xxhash.xxh64_intdigest(values.tobytes()) & 0xFFFFFFFF
    sizes = [(3 << 30, 2 * FRAME, 0), (3 << 30, 2 * FRAME, 0), (len(frame), 2 * FRAME, checksum)]
    entries = np.array(sizes, ENTRY).tobytes()
    path = tmp_path / "large.zst"
    with path.open("wb") as file:
        file.seek(6 << 30)
        file.write(frame + HEADER.pack(SKIPPABLE_MAGIC, len(entries) + FOOTER.size) + entries)
        file.write(FOOTER.pack(3, CHECKSUM_FLAG, SEEKABLE_MAGIC))
    assert np.array_equal(ColumnReader(path, "uint16", FRAME).read(2 * FRAME, 3 * FRAME), values)


def test_a_writer_killed_at_any_moment_leaves_no_file_under_the_final_name(tmp_path: Path) -> None:
    script = (
        "import numpy, os, pathlib, sys; from shards.format.seekable_zstd import ColumnWriter\n"
        "w = ColumnWriter(pathlib.Path(sys.argv[1]), 'uint16', 64); w.append(numpy.arange(1000)); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path / "c.zst")], check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["c.zst.tmp"]


def test_a_writer_left_by_an_error_removes_what_it_wrote(tmp_path: Path) -> None:
    with pytest.raises(OverflowError, match="uint8"), ColumnWriter(tmp_path / "c.zst", "uint8", 64) as writer:
        writer.append([1, 2, 256])
    assert list(tmp_path.iterdir()) == []


def test_threads_that_share_a_reader_and_a_tiny_cache_read_what_one_would(tmp_path: Path) -> None:
    values = tokens(64 * FRAME)
    write(tmp_path / "c.zst", values)
    reader = ColumnReader(tmp_path / "c.zst", "uint16", FRAME, cache=Cache(3 * FRAME * 2))
    wrong = []

    def read(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(300):
            start = rng.randrange(len(values) - 1000)
            if not np.array_equal(reader.read(start, start + 1000), values[start : start + 1000]):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_the_cache_keeps_to_its_limit() -> None:
    cache = Cache(1000)
    for number in range(50):
        cache.put((0, number), np.zeros(100, np.uint8))
    assert sum(cache.get((0, number)) is not None for number in range(50)) == 10
    assert cache.get((0, 49)) is not None


@given(values=st.lists(st.integers(0, 3000), max_size=1500), asked=st.integers(0, 3001))
def test_counting_in_a_sorted_column_is_searchsorted(tmp_path_factory: pytest.TempPathFactory, values, asked) -> None:
    ends = np.sort(np.array(values, np.uint64))
    path = tmp_path_factory.mktemp("column") / "c.zst"
    write(path, ends, frame=64)
    assert ColumnReader(path, "uint64", 64).count_up_to(asked) == np.searchsorted(ends, asked, side="right")


def test_the_same_items_give_the_same_bytes_however_they_are_appended(tmp_path: Path) -> None:
    values = tokens(5 * FRAME + 9)
    a = write(tmp_path / "a.zst", values)
    with ColumnWriter(tmp_path / "b.zst", "uint16", FRAME) as writer:
        for value in values:
            writer.append([value])
        b = writer.close()
    assert (a.hash, a.table) == (b.hash, b.table)
