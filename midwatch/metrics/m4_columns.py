"""Columns: what a chart draws, one M4 for each dot column; and the grid that fixes where columns begin.

This module needs numpy and zstd only, so that a screen can read columns without the index behind them.
"""

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import zstandard
from numpy.typing import NDArray

from midwatch.metrics.m4_nodes import NODE, Table, between, fold, from_rows

FANOUT = 4  # nodes of one level that make one of the next
NODES_A_COLUMN = 16  # at least so many, so that rounding a column to whole nodes costs at most 1/16 of the chart


class LineageSegment(NamedTuple):
    """A stretch of a surviving line: the steps of `lineage` after `after` (exclusive) up to `last` (None: open)."""

    lineage: int
    after: int
    last: int | None


class Grid(NamedTuple):
    """Where a chart's columns lie: column i holds the steps [start + i * column_width, start + (i + 1) * column_width)."""

    start: int
    column_width: int
    length: int
    level: int  # of the pyramid, whose nodes tile every column exactly

    @property
    def stop(self) -> int:
        return self.start + self.length * self.column_width


def grid(start: int, stop: int, width: int) -> Grid:
    """The grid of at most `width` columns for the steps [start, stop).

    Columns are whole multiples of a node of the pyramid, and begin on one: no column cuts a node, so its M4 is exact
    without reading finer levels. In return the chart may begin up to a node early and end a few per cent short of its
    right edge. The grid depends on no data: every series of a chart shares it, and it stays while a live run grows
    within its last column.
    """
    width = max(1, width)
    stop = max(stop, start + 1)
    level = 0
    while FANOUT ** (level + 1) * NODES_A_COLUMN * width <= stop - start:
        level += 1
    node = FANOUT**level
    start = start // node * node
    column_width = -(-(stop - start) // (width * node)) * node
    return Grid(start, column_width, -(-(stop - start) // column_width), level)


@dataclass(frozen=True)
class Columns:
    """A series on a grid. `table` is [count] of NODE; a column without rows has count 0 and nans 0."""

    series: str
    grid: Grid
    table: Table

    def __getattr__(self, name: str) -> NDArray[Any]:
        """The table's fields by name: first, min, max, last, sum, count, nans, first_tokens, last_time, …: [count]."""
        if name.startswith("_") or name not in NODE.names:  # type: ignore[operator]  # it has fields
            raise AttributeError(name)
        return self.table[name]

    @property
    def step_start(self) -> NDArray[np.int64]:
        """First step of each column: [count]."""
        return self.grid.start + np.arange(self.grid.length) * self.grid.column_width

    @property
    def gap_before(self) -> NDArray[np.bool_]:
        """Whether a gap breaks the line from the last finite value before a column to the column's first: [count].

        True also where nothing finite came before, and in columns without a finite value.
        """
        drawn = np.flatnonzero(self.table["count"])
        gap = np.ones(len(self.table), np.bool_)
        if len(drawn):
            nans = np.cumsum(self.table["nans"] * (self.table["count"] == 0))  # only gap-only columns lie between
            between = nans[drawn[1:]] > nans[drawn[:-1]]
            gap[drawn[1:]] = between | self.table["trail"][drawn[:-1]] | self.table["lead"][drawn[1:]]
        return gap

    def encode(self) -> bytes:
        """For the wire: a header, then the table, byte-shuffled and compressed."""
        name = self.series.encode()
        return _HEADER.pack(*self.grid, len(name)) + name + pack(self.table)

    @staticmethod
    def decode(data: bytes) -> "Columns":
        """Raises ValueError or zstandard.ZstdError on damaged bytes."""
        if len(data) < _HEADER.size:
            raise ValueError("columns: truncated header")
        *lattice, length = _HEADER.unpack_from(data)
        body = _HEADER.size + length
        columns = Columns(data[_HEADER.size : body].decode(), Grid(*lattice), unpack([data[body:]], NODE))
        if len(columns.table) != columns.grid.length:
            raise ValueError(f"columns: {len(columns.table)} rows on a grid of {columns.grid.length}")
        return columns


def place(series: str, lattice: Grid, nodes: Table) -> Columns:
    """Nodes ordered by step, folded onto the grid; nodes outside it are left out."""
    table = np.zeros(lattice.length, NODE)
    for field in ("first", "min", "max", "last"):
        table[field] = np.nan
    table["start"] = lattice.start + np.arange(lattice.length) * lattice.column_width
    table["stop"] = table["start"] + lattice.column_width - 1
    inside = between(nodes, "start", lattice.start, lattice.stop)
    folded = fold(inside, lattice.column_width, lattice.start)
    table[(folded["start"] - lattice.start) // lattice.column_width] = folded
    return Columns(series, lattice, table)


def columns_of(series: str, rows: Table, start: int, stop: int, width: int) -> Columns:
    """The columns of rows in memory: [n] of ROW, ordered by step."""
    return place(series, grid(start, stop, width), from_rows(rows))


def smoothed(columns: Columns, window: int) -> NDArray[np.float64]:
    """The mean of the finite values of the `window` steps up to each column's end: [count], NaN where there are none.

    The window is rounded up to whole columns. A column without a finite value stays a gap.
    """
    taps = np.ones(min(len(columns.table), max(1, -(-window // columns.grid.column_width))))
    # not a difference of cumulative sums: one spike of 1e30 would wipe out everything after it
    sums = np.convolve(columns.table["sum"], taps)[: len(columns.table)]
    counts = np.convolve(columns.table["count"].astype(np.float64), taps)[: len(columns.table)]
    mean = np.full(len(columns.table), np.nan)
    drawn = columns.table["count"] > 0
    mean[drawn] = sums[drawn] / counts[drawn]
    return mean


def pack(table: Table) -> bytes:
    """A structured array as bytes: shuffled, so that equal bytes of neighbours meet, then zstd with a checksum."""
    raw = np.ascontiguousarray(table).view(np.uint8).reshape(len(table), table.dtype.itemsize)
    return zstandard.ZstdCompressor(level=1, write_checksum=True).compress(raw.T.tobytes())


def unpack(blobs: Iterable[bytes], dtype: np.dtype[Any]) -> Table:
    """The inverse of `pack`, for several arrays joined. Raises ValueError or zstandard.ZstdError on damaged bytes."""
    decompressor = zstandard.ZstdDecompressor()
    planes = [np.empty((dtype.itemsize, 0), np.uint8)]
    for blob in blobs:
        raw = np.frombuffer(decompressor.decompress(blob), np.uint8)
        if len(raw) % dtype.itemsize:
            raise ValueError(f"{len(raw)} bytes are no whole number of {dtype.itemsize}-byte records")
        planes.append(raw.reshape(dtype.itemsize, -1))
    return np.ascontiguousarray(np.concatenate(planes, axis=1).T).reshape(-1).view(dtype)


_HEADER = struct.Struct("<qqIBH")
