"""What reading shards costs beside zstd alone, and what finding one's place costs as data grows.

python -m bench.shards

The limit is zstd decompressing the very same frames from memory, checksums verified, nothing else. Seconds are of
this process's own CPU time (readers have one thread and the files are in memory); rounds are run in turn, and their medians shown.
"""

from __future__ import annotations

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zstandard
from rich.console import Console
from rich.table import Table

from shards import stdlib
from shards.container import Cache, ColumnReader, ColumnWriter
from shards.feed import Feed
from shards.order import Order
from shards.tokenizer import Tokenizer, train

TOKENS = 24_000_000
FRAME = 16_384
WINDOW = 8_192
ROUNDS = 5


def library_tokens() -> np.ndarray:
    """Real tokens: the standard library's code, repeated to TOKENS, which no frame is large enough to notice."""
    texts = [path.read_bytes().decode("utf-8", "replace") for _, path in stdlib.files()]
    tokenizer = Tokenizer(train(texts[::4], vocab=8192))
    ids = np.array([number for text in texts for number in [*tokenizer.encode(text), tokenizer.eos]], np.uint16)
    return np.resize(ids, TOKENS)


def zstd_alone(raw: bytes, offsets: list[int]) -> int:
    """Decompress every frame; returns the bytes."""
    decompressor = zstandard.ZstdDecompressor()
    return sum(len(decompressor.decompress(raw[a:b])) for a, b in itertools.pairwise(offsets))


def sequential(path: Path) -> int:
    reader = ColumnReader(path, "uint16", FRAME, cache=Cache(1 << 20))
    return sum(len(reader.read(start, min(start + WINDOW, TOKENS))) for start in range(0, TOKENS, WINDOW))


def shuffled(path: Path) -> int:
    """Every window once, none where it was; the cache is a small part of the file, as with real data.

    Each decodes a whole frame for half of its tokens: 0.50 is the most there is.
    """
    reader = ColumnReader(path, "uint16", FRAME, cache=Cache(1 << 20))
    starts = np.random.default_rng(0).permutation(TOKENS // WINDOW) * WINDOW
    return sum(len(reader.read(start, start + WINDOW)) for start in starts.tolist())


def medians(work: dict[str, Callable[[], object]]) -> dict[str, float]:
    """CPU seconds of each, the median of rounds in turn."""
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(ROUNDS):
        for name, function in work.items():
            started = time.process_time()
            function()
            taken[name].append(time.process_time() - started)
    return {name: statistics.median(times) for name, times in taken.items()}


def resume(samples: int) -> Callable[[], object]:
    """Open an order, go to a position in the middle of it, and take the next 512 samples."""

    def work() -> object:
        order = Order(int(time.perf_counter_ns()) % 2**40, {"a": samples, "b": samples // 10}, {"a": 10, "b": 1})
        return order.span(samples // 2 + 17, samples // 2 + 17 + 512)

    return work


def resident(code: str) -> float:
    """MB of memory that a process held at its most when it ran `code` (not by getrusage, which counts its parent's)."""
    script = f"{code}\nprint(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])"
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout) / 1024


def feed_memory(root: Path) -> float:
    """MB over its imports that a feed holds after 2,000 rows of 1,024 tokens."""
    imports = "from shards.feed import Feed\n"
    read = f"f = Feed({str(root)!r}, 'train', 'text', 1024, {{'code': 1}}, 0)\nfor p in range(0, 2000, 8): f.read(p, p + 8)"
    return resident(imports + read) - resident(imports)


def batches(root: Path) -> Callable[[], object]:
    """Shuffled training batches, [8, 1024], with segments, positions and masks."""
    feed = Feed(root, "train", "text", 1024, {"code": 1}, 0, cache_bytes=1 << 20)
    return lambda: [feed.read(start, start + 8) for start in range(0, 2000, 8)]


def main() -> None:
    """Measure, and print one table."""
    from shards.build import build
    from shards.spec import Build, Data, Source
    from shards.spec import Tokenizer as TokenizerSpec

    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "tokens.zst"
        with ColumnWriter(path, "uint16", FRAME) as writer:
            writer.append(library_tokens())
            size = writer.close().bytes
        raw = path.read_bytes()
        offsets = ColumnReader(path, "uint16", FRAME)._offsets.tolist()
        source = Source(name="code", kind="text", origin="stdlib-code")
        spec = Build(data=Data(source=(source,)), tokenizer=TokenizerSpec(vocab=8192), out=f"{name}/shards")
        root = build(spec)
        taken = medians(
            {
                "limit": lambda: zstd_alone(raw, offsets),
                "sequential": lambda: sequential(path),
                "shuffled": lambda: shuffled(path),
                "batches": batches(root),
                "1e5": resume(10**5),
                "1e10": resume(10**10),
            }
        )
        memory = feed_memory(root)

    table = Table(title=f"Shards: {TOKENS / 1e6:.0f}M tokens, {size / 1e6:.1f} MB on disk, frames of {FRAME:,}")
    for column in ("what", "measured", "beside"):
        table.add_column(column, justify="left" if column == "what" else "right")
    rate = {name: TOKENS / taken[name] / 1e6 for name in ("limit", "sequential", "shuffled")}
    table.add_row("zstd alone, the same frames", f"{rate['limit']:,.0f} Mtok/s", "1.00 x the limit")
    table.add_row("sequential", f"{rate['sequential']:,.0f} Mtok/s", f"{rate['sequential'] / rate['limit']:.2f} x the limit")
    shuffled_ratio = f"{rate['shuffled'] / rate['limit']:.2f} x the limit"
    table.add_row(f"shuffled windows of {WINDOW:,}", f"{rate['shuffled']:,.0f} Mtok/s", shuffled_ratio)
    rows = 2000 * 1024 / taken["batches"] / 1e6
    table.add_row("shuffled batches [8, 1024], with masks", f"{rows:,.1f} Mtok/s", f"{rows / rate['limit']:.3f} x the limit")
    table.add_row("open, seek, 512 samples of 1e5", f"{taken['1e5'] * 1e3:.2f} ms", "1.00 x")
    ratio = f"{taken['1e10'] / taken['1e5']:.2f} x that of 1e5"
    table.add_row("open, seek, 512 samples of 1e10", f"{taken['1e10'] * 1e3:.2f} ms", ratio)
    table.add_row("memory of a feed over its imports", f"{memory:.0f} MB", "")
    Console().print(table)


if __name__ == "__main__":
    main()
