"""The peers' part of `bench.shards`, run by the Python of an environment that has them: `_peer_readers.py TOKENS.npy DIR`.

Writes the same tokens as each peer stores them, says how large that is, and then reads them all once for each line on stdin
that names a way, answering with seconds of its own CPU time and the tokens read. It knows nothing of Midwatch.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

WINDOW = 8_192
CHUNK_BYTES = 64 << 20
PARQUET_WINDOWS = 60
"""Each costs a whole row group: all of them would take minutes."""
INDEXED_WINDOWS = 200
"""Each costs a frame of 256 windows."""


def windows(file: str) -> Any:
    tokens = np.load(file, mmap_mode="r")
    return tokens[: len(tokens) // WINDOW * WINDOW].reshape(-1, WINDOW)


def write_mds(rows: Any, directory: Path) -> int:
    from streaming import MDSWriter

    columns = {"tokens": f"ndarray:uint16:{WINDOW}"}
    with MDSWriter(out=str(directory), columns=columns, compression="zstd:9", size_limit=CHUNK_BYTES) as out:
        for row in rows:
            out.write({"tokens": np.ascontiguousarray(row)})
    return sum(path.stat().st_size for path in directory.glob("*.zstd"))


def iterate_mds(directory: Path) -> int:
    """Shuffled, after the first round from shards that it has inflated beside the compressed ones."""
    from streaming import StreamingDataset

    data = StreamingDataset(local=str(directory), shuffle=True, batch_size=1, keep_zip=True, validate_hash=None)
    return sum(len(sample["tokens"]) for sample in data)


def row_of(at: tuple[str, int]) -> Any:
    return np.ascontiguousarray(windows(at[0])[at[1]])


def write_litdata(file: str, directory: Path) -> int:
    from litdata import optimize

    count = len(windows(file))
    optimize(
        fn=row_of, inputs=[(file, number) for number in range(count)], output_dir=str(directory), chunk_bytes=CHUNK_BYTES,
        compression="zstd:9", num_workers=1,
    )  # fmt: skip
    return sum(path.stat().st_size for path in directory.glob("*.bin"))


def iterate_litdata(directory: Path) -> int:
    from litdata import StreamingDataset

    return sum(len(row) for row in StreamingDataset(str(directory), shuffle=True))


def index_litdata(directory: Path) -> int:
    """Windows out of order over all of the data, as shards' order has them; its own shuffle stays within chunks."""
    from litdata import StreamingDataset

    data = StreamingDataset(str(directory))
    return sum(len(data[number]) for number in np.random.default_rng(0).permutation(len(data))[:INDEXED_WINDOWS].tolist())


def write_parquet(rows: Any, file: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"tokens": pa.array(np.asarray(rows).reshape(-1))})
    pq.write_table(table, file, compression="zstd", compression_level=9, use_dictionary=False, row_group_size=1 << 20)
    return file.stat().st_size


def windows_of_parquet(file: Path) -> int:
    import pyarrow.parquet as pq

    data = pq.ParquetFile(file)
    group = data.metadata.row_group(0).num_rows
    starts = np.random.default_rng(0).permutation(data.metadata.num_rows // WINDOW)[:PARQUET_WINDOWS] * WINDOW
    found = 0
    for start in starts.tolist():
        column = data.read_row_group(start // group, use_threads=False).column("tokens")
        found += len(column.slice(start % group, WINDOW).to_numpy())
    return found


def main() -> None:
    file, place = sys.argv[1], Path(sys.argv[2])
    said = sys.stdout
    sys.stdout = sys.stderr  # where the peers' own words go
    rows = windows(file)
    sizes = {"mds": write_mds(rows, place / "mds"), "litdata": write_litdata(file, place / "litdata")}
    sizes["parquet"] = write_parquet(rows, place / "tokens.parquet")
    ways: dict[str, Callable[[], int]] = {
        "mds": lambda: iterate_mds(place / "mds"),
        "litdata": lambda: iterate_litdata(place / "litdata"),
        "litdata-index": lambda: index_litdata(place / "litdata"),
        "parquet": lambda: windows_of_parquet(place / "tokens.parquet"),
    }
    print(json.dumps(sizes), file=said, flush=True)
    for line in sys.stdin:
        started = time.process_time()
        count = ways[line.strip()]()
        print(json.dumps([time.process_time() - started, count]), file=said, flush=True)
    shutil.rmtree(place, ignore_errors=True)


if __name__ == "__main__":
    main()
