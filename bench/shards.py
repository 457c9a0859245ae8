"""What reading shards costs beside zstd alone and beside other formats' readers, and what finding one's place costs as data grows.

python -m bench.shards

The limit is zstd decompressing the very same frames from memory, checksums verified, nothing else. Peers are installed into an
environment of the bench's own (bench/requirements-shards.txt) and read the same tokens there, as each does by itself. Seconds are
of each process's own CPU time (all of its threads; files are in memory); rounds are run in turn, their medians shown.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import zstandard
from rich.console import Console
from rich.table import Table

from bench._peers import Peers
from shards.format.seekable_zstd import Cache, ColumnReader, ColumnWriter
from shards.readers import stdlib
from shards.sampling.batches import BatchFeed
from shards.sampling.order import SampleOrder
from shards.tokenization.tokenizer import Tokenizer, train

TOKENS = 24_000_000
FRAMES = (8_192, 16_384, 65_536)
FRAME = 16_384
WINDOW = 8_192
ROUNDS = 5
Work = Callable[[], float]
"""CPU seconds of one round."""


def _texts() -> Iterator[str]:
    """The standard library's code, then that of what is installed beside it."""
    for _, path in stdlib.files():
        yield path.read_bytes().decode("utf-8", "replace")
    for path in sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py")):
        yield path.read_bytes().decode("utf-8", "replace")


def library_tokens() -> np.ndarray:
    """Real tokens, none twice but where code repeats itself; of code, which compresses better than prose."""
    texts = _texts()
    first = list(itertools.islice(texts, 600))
    tokenizer = Tokenizer(train(first[::4], vocab=32_000))
    parts, count = [], 0
    for text in itertools.chain(first, texts):
        ids = np.array([*tokenizer.encode(text), tokenizer.eos], np.uint16)
        parts.append(ids)
        count += len(ids)
        if count >= TOKENS:
            break
    return np.resize(np.concatenate(parts), TOKENS)


def timed(function: Callable[[], object]) -> Work:
    def work() -> float:
        started = time.process_time()
        function()
        return time.process_time() - started

    return work


def zstd_alone(raw: bytes, offsets: list[int]) -> int:
    """Decompress every frame; returns the bytes."""
    decompressor = zstandard.ZstdDecompressor()
    return sum(len(decompressor.decompress(raw[a:b])) for a, b in itertools.pairwise(offsets))


def sequential(path: Path, frame: int) -> int:
    reader = ColumnReader(path, "uint16", frame, cache=Cache(1 << 20))
    return sum(len(reader.read(start, min(start + WINDOW, TOKENS))) for start in range(0, TOKENS, WINDOW))


def shuffled(path: Path, frame: int, more: int = 0) -> int:
    """Every window once, none where it was; the cache is a small part of the file, as with real data.

    Each decodes a whole frame: with frames of two windows, 0.50 is the most there is. more: tokens of each past its end.
    """
    reader = ColumnReader(path, "uint16", frame, cache=Cache(1 << 18))
    starts = np.random.default_rng(0).permutation(TOKENS // WINDOW - 1) * WINDOW
    return sum(len(reader.read(start, start + WINDOW + more)) for start in starts.tolist())


def medians(work: dict[str, Work]) -> dict[str, float]:
    """The median of rounds in turn."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, one in work.items():
            taken[name].append(one())
    return {name: statistics.median(times) for name, times in taken.items()}


def resume(samples: int) -> Callable[[], object]:
    """Open an order, go to a position in the middle of it, and take the next 512 samples."""

    def work() -> object:
        order = SampleOrder(int(time.perf_counter_ns()) % 2**40, {"a": samples, "b": samples // 10}, {"a": 10, "b": 1})
        return order.span(samples // 2 + 17, samples // 2 + 17 + 512)

    return work


def resident(code: str) -> float:
    """MB of memory that a process held at its most when it ran `code` (not by getrusage, which counts its parent's)."""
    script = f"{code}\nprint(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout) / 1024


def feed_memory(root: Path) -> float:
    """MB over its imports that a feed holds after 2,000 rows of 1,024 tokens."""
    imports = "from shards.sampling.batches import Feed\n"
    read = f"f = BatchFeed({str(root)!r}, 'train', 'text', 1024, {{'code': 1}}, 0)\nfor p in range(0, 2000, 8): f.read(p, p + 8)"
    return resident(imports + read) - resident(imports)


def batches(root: Path, context: int) -> Callable[[], object]:
    """Shuffled training batches, [8, context], of 2 million tokens, with segments, positions and masks."""
    feed = BatchFeed(root, "train", "text", context, {"code": 1}, 0, cache_bytes=1 << 18)
    return lambda: [feed.read(start, start + 8) for start in range(0, 2_048_000 // context, 8)]


def main() -> None:
    """Measure, and print one table."""
    from shards.build.build import build
    from shards.spec import Build, Data, Source
    from shards.spec import TokenizerSpec as TokenizerSpec

    with tempfile.TemporaryDirectory() as name:
        place, tokens = Path(name), library_tokens()
        np.save(place / "tokens.npy", tokens)
        sizes, work = {}, {}
        for frame in FRAMES:
            path = place / f"tokens-{frame}.zst"
            with ColumnWriter(path, "uint16", frame) as writer:
                writer.append(tokens)
                sizes[frame] = writer.close().bytes
            raw, offsets = path.read_bytes(), ColumnReader(path, "uint16", frame)._offsets.tolist()
            work[f"limit {frame}"] = timed(lambda raw=raw, offsets=offsets: zstd_alone(raw, offsets))  # type: ignore[misc]  # a lambda's default
            work[f"sequential {frame}"] = timed(lambda path=path, frame=frame: sequential(path, frame))  # type: ignore[misc]  # a lambda's default
            work[f"shuffled {frame}"] = timed(lambda path=path, frame=frame: shuffled(path, frame))  # type: ignore[misc]  # a lambda's default
            work[f"shuffled {frame} + 1"] = timed(lambda path=path, frame=frame: shuffled(path, frame, 1))  # type: ignore[misc]  # a lambda's default
        source = Source(name="code", kind="text", origin="stdlib-code")
        root = build(Build(data=Data(source=(source,)), tokenizer=TokenizerSpec(vocab=8192), out=f"{name}/shards"))
        work |= {f"batches {context}": timed(batches(root, context)) for context in (1024, 8192)}
        work |= {"1e5": timed(resume(10**5)), "1e10": timed(resume(10**10))}
        counts: dict[str, int] = {}
        with Peers(place / "tokens.npy", place / "peers") as peers:

            def of_peer(way: str) -> Work:
                def one() -> float:
                    seconds, counts[way] = peers.read(way)
                    return seconds

                return one

            ways = ("mds", "litdata", "litdata-index", "parquet")
            for way in ways:
                peers.read(way)  # MDS inflates its shards
            taken = medians(work | {way: of_peer(way) for way in ways})
            stored = dict(peers.sizes)
        memory = feed_memory(root)

    rate = {key: TOKENS / seconds / 1e6 for key, seconds in taken.items()}
    rate |= {way: counts[way] / taken[way] / 1e6 for way in ways}
    table = Table(title=f"Shards: {TOKENS / 1e6:.0f}M tokens of code; seconds are CPU seconds, medians of {ROUNDS} rounds in turn")
    for column in ("what", "measured", "beside", "goal"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for frame, wanted in zip(FRAMES, ("0.80", "0.45", ""), strict=True):
        of = f"frames of {frame // 1024}Ki"
        limit = rate[f"limit {frame}"]
        table.add_row(f"zstd alone, {of}", f"{limit:,.0f} Mtok/s", "1.00 x the limit", "")
        for way, goal in (("sequential", "0.90"), ("shuffled", wanted)):
            found = rate[f"{way} {frame}"]
            label = f"{way}, {of}" if way == "sequential" else f"{way} windows of {WINDOW // 1024}Ki, {of}"
            table.add_row(label, f"{found:,.0f} Mtok/s", f"{found / limit:.2f} x the limit", goal)
        found = rate[f"shuffled {frame} + 1"]
        table.add_row("  with the one target past each window", f"{found:,.0f} Mtok/s", f"{found / limit:.2f} x the limit", "")
    labels = {
        "mds": ("MDS iterated, inflated, its own shuffle", "3"),
        "litdata": ("litData iterated, zstd frames, its own shuffle", ""),
        "litdata-index": ("litData by index, zstd frames, shuffled", "8"),
        "parquet": ("Parquet, zstd, shuffled", "100"),
    }
    for way, (label, goal) in labels.items():
        ours = rate[f"shuffled {FRAME}"] / rate[way]
        table.add_row(label, f"{rate[way]:,.1f} Mtok/s", f"shards read {ours:.1f} x", goal)
    for frame in FRAMES:
        beside = f"{sizes[frame] / stored['mds']:.2f} x MDS zstd 9"
        table.add_row(f"size, frames of {frame // 1024}Ki", f"{sizes[frame] / 1e6:.1f} MB", beside, "1.15")
    for way in ("mds", "litdata", "parquet"):
        table.add_row(f"size, {way}", f"{stored[way] / 1e6:.1f} MB", f"{stored[way] / stored['mds']:.2f} x MDS zstd 9", "")
    for context in (1024, 8192):
        seconds = taken[f"batches {context}"] / (2_048_000 // context)
        table.add_row(
            f"batches [8, {context}], with masks",
            f"{2.048 / taken[f'batches {context}']:,.1f} Mtok/s",
            f"{1e6 * seconds:,.0f} us a row",
            "",
        )
    for samples in ("1e5", "1e10"):
        table.add_row(f"open, seek, 512 samples of {samples}", f"{taken[samples] * 1e3:.2f} ms", "", "5 ms")
    table.add_row("memory of a feed over its imports", f"{memory:.0f} MB", "", "80 MB")
    Console(width=130).print(table)


if __name__ == "__main__":
    main()
