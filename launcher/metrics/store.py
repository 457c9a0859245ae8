"""The controller's metrics: takes frames in, keeps the index level with the chunks, answers queries.

    store = Metrics.open(run / "metrics", index_path, term)
    store.add(frame)            # any number of times
    store.sync()                # now the frames may be acknowledged
    store.columns("train/loss", path, 0, stop, width)

The chunks are the truth. The index is rebuilt from them when it is gone, damaged, or ahead of them, and caught up when
it is behind. Rows gather in memory and reach the index in batches: by count here, by time when the controller calls
`flush`. Every method may be called from any thread, one at a time holds the lock.
"""

import functools
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar, cast

import numpy as np

from launcher.metrics.chunks import FrameEnd, MetricChunkWriter, MetricFrame, holds, read_frames
from launcher.metrics.database import Damaged, Database, Line
from launcher.metrics.dedup import NumberRanges
from launcher.metrics.pyramid import Pyramid
from midwatch.metrics.m4_columns import Columns, LineageSegment, grid, place
from midwatch.metrics.m4_nodes import NODE, ROW, Table

MEMORY = Path(":memory:")
"""SQLite's name for a database that has no file."""
FLUSH_VALUES = 1 << 17  # about 4 MiB of rows in memory

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")


class SeriesInfo(NamedTuple):
    """A series over all its lineages."""

    name: str
    first_step: int
    last_step: int
    rows: int


class Point(NamedTuple):
    """One row of one series."""

    lineage: int
    step: int
    value: float
    tokens: int
    time: float


def _repairing(method: Callable[Concatenate["MetricStore", P], R]) -> Callable[Concatenate["MetricStore", P], R]:
    """Holds the lock; if the index turns out to be damaged, rebuilds it from the chunks and tries once more."""

    @functools.wraps(method)
    def guarded(self: "MetricStore", *args: P.args, **kwargs: P.kwargs) -> R:
        with self._lock:
            try:
                return method(self, *args, **kwargs)
            except Damaged as damage:
                self._rebuild(damage)
                return method(self, *args, **kwargs)

    return cast(Callable[Concatenate["MetricStore", P], R], guarded)


class MetricStore:
    """Use `open`. `path` in the queries is the surviving line: segments in order of their steps."""

    def __init__(self, folder: Path, index: Path, writer: MetricChunkWriter | None) -> None:
        self._folder, self._index, self._writer = folder, index, writer
        self._lock = threading.RLock()
        self._rebuilding = False
        self._series: dict[str, dict[int, Pyramid]]
        self._waiting: dict[tuple[str, int], Pyramid]  # with rows in memory
        self._marks: dict[str, FrameEnd]  # how far each chunk has been taken in
        self._sources: dict[str, NumberRanges]
        try:
            self._database = Database(index)
            self._load()
        except Damaged as damage:
            log.warning("%s; rebuilding it from the chunks", damage)
            _remove(index)
            self._database = Database(index)
            self._load()

    @classmethod
    def open(cls, folder: Path, index: Path, term: int | None = None) -> "MetricStore":
        """Opens the index at `index` for the chunks in `folder`, and with a `term` a new chunk to write to.

        Raises FileExistsError when that term has a chunk already. Without a term it only reads.
        """
        store = cls(folder, index, None if term is None else MetricChunkWriter(folder, term))
        store.catch_up()
        return store

    @classmethod
    def read(cls, folder: Path, index: Path) -> "MetricStore":
        """Only reads, and writes nowhere: its index is in memory, begun from the one at `index` where that can be read."""
        store = cls(folder, MEMORY, None)
        try:
            store._database.copy_from(index)
            store._load()
            store.catch_up()
        except (Damaged, sqlite3.Error) as problem:
            store._rebuild(problem if isinstance(problem, Damaged) else Damaged(f"{index}: {problem}"))
        return store

    # Taking in

    @_repairing
    def add(self, frame: MetricFrame) -> bool:
        """Takes a frame in; False, and no change, when it was taken before. Raises ValueError for a negative step."""
        if self._writer is None:
            raise ValueError(f"{self._folder}: opened for reading")
        if any(row.step < 0 for row in frame.rows):
            raise ValueError(f"frame {frame.source}/{frame.number}: a step is negative")
        if frame.number in self._sources.get(frame.source, _NONE):
            return False
        mark = self._writer.append(frame)
        if not self._behind:
            self._take(frame, self._writer.path.name, mark)
        return True

    def sync(self) -> None:
        """Returns once every frame added so far would survive a loss of power: they may be acknowledged."""
        with self._lock:
            if self._writer is not None:
                self._writer.sync()

    @_repairing
    def flush(self) -> None:
        """Moves what is in memory to the index, in one transaction. The controller calls it every few seconds.

        When the index cannot be written (a full disk), it is left behind the chunks, and the next call tries again.
        """
        if self._behind:
            self.catch_up()
        elif self._dirty_chunks:
            self._flush()

    @_repairing
    def catch_up(self) -> None:
        """Takes in what the chunks hold and the index does not, other terms' late frames included."""
        if self._writer is not None:
            self._writer.sync()
        self._behind = False
        paths = sorted(self._folder.glob("*.chunk"))
        if gone := set(self._marks) - {path.name for path in paths}:
            raise Damaged(f"{self._index} was made from chunks that are gone: {', '.join(sorted(gone))}")
        for path in paths:
            known = self._marks.get(path.name)
            if known and not holds(path, known):
                raise Damaged(f"{self._index} was not made from this {path.name}")
            for frame, mark in read_frames(path, known.end if known else 0):
                self._take(frame, path.name, mark)
                if self._behind:
                    return
        self._flush()

    def close(self) -> None:
        with self._lock:
            self.flush()
            if self._writer is not None:
                self._writer.close()
            self._database.close()

    @_repairing
    def load_rows(self, series: str, lineage: int, rows: Table) -> None:
        """Puts rows ordered by step, [n] of ROW, straight into the index, past the chunks: for benchmarks and imports."""
        self._flush()
        self._database.begin()
        for start in range(0, len(rows), FLUSH_VALUES):
            self._pyramid(series, lineage).insert(rows[start : start + FLUSH_VALUES])
        self._database.commit()

    # Queries

    @_repairing
    def names(self) -> list[SeriesInfo]:
        """Every series, by name, with its steps over all lineages."""
        found = []
        for name in sorted(self._series):
            pyramids = self._series[name].values()
            rows = sum(pyramid.line.rows + pyramid.pending for pyramid in pyramids)
            found.append(SeriesInfo(name, min(p.first for p in pyramids), max(p.last for p in pyramids), rows))
        return found

    @_repairing
    def columns(self, series: str, path: Sequence[LineageSegment], start: int, stop: int, width: int) -> Columns:
        """The series over the steps [start, stop) in at most `width` columns, each an exact M4 of its rows on `path`.

        See `grid` for where the columns lie. Reads at most some 64 nodes a column, however long the run.
        """
        lattice = grid(start, stop, width)
        along = self._along(series, path, lattice.start, lattice.stop)
        parts = [pyramid.nodes(lattice.level, low, high) for pyramid, low, high in along] or [np.empty(0, NODE)]
        return place(series, lattice, parts[0] if len(parts) == 1 else np.concatenate(parts))

    @_repairing
    def latest(self, series: str, path: Sequence[LineageSegment] | None = None) -> Point | None:
        """The last row on the path; without one, of the newest lineage that has the series."""
        found = self._last(series, 1, path)
        return found[-1] if found else None

    @_repairing
    def last(self, series: str, n: int, path: Sequence[LineageSegment] | None = None) -> list[Point]:
        """The last `n` rows on the path, in order of steps; without a path, of the newest lineage with the series."""
        return self._last(series, n, path)

    @_repairing
    def row_near(self, series: str, path: Sequence[LineageSegment], step: int) -> Point | None:
        """The row nearest to the step; of two as near, the earlier."""
        before = next(self._backward(series, path, 0, step + 1), None)
        after = next(self._forward(series, path, step + 1, None), None)
        if before is None or after is None:
            return before or after
        return before if step - before.step <= after.step - step else after

    @_repairing
    def rows(self, series: str, path: Sequence[LineageSegment], start: int, stop: int, limit: int) -> Table:
        """The rows of the steps [start, stop) on the path, at most the first `limit`: [n] of ROW."""
        parts, room = [np.empty(0, ROW)], limit
        for pyramid, low, high in self._along(series, path, start, stop):
            for block in pyramid.rows(low, high):
                if room <= 0:
                    break
                parts.append(block[:room])
                room -= len(parts[-1])
        return np.concatenate(parts)

    # Inside

    def _load(self) -> None:
        """The state as the database has it."""
        self._series = {}
        self._waiting = {}
        self._dirty_chunks: set[str] = set()
        self._dirty_sources: set[str] = set()
        self._values = 0
        self._behind = False
        self._lines = 0
        for line in self._database.lines():
            self._series.setdefault(line.series, {})[line.lineage] = Pyramid(self._database, line)
            self._lines = max(self._lines, line.id)
        self._marks = self._database.chunks()
        self._sources = self._database.sources()

    def _rebuild(self, damage: Damaged) -> None:
        """Raises the damage again when it shows while rebuilding: then it is the disk's."""
        if self._rebuilding:
            raise damage
        log.warning("%s; rebuilding it from the chunks", damage)
        self._rebuilding = True
        try:
            self._database.close()
            _remove(self._index)
            self._database = Database(self._index)
            self._load()
            self.catch_up()
        finally:
            self._rebuilding = False

    def _take(self, frame: MetricFrame, chunk: str, mark: FrameEnd) -> None:
        self._marks[chunk] = mark
        self._dirty_chunks.add(chunk)
        if not self._sources.setdefault(frame.source, NumberRanges()).add(frame.number):
            return
        self._dirty_sources.add(frame.source)
        waiting = self._waiting
        for row in frame.rows:
            lineage, step, tokens, time = row.lineage, row.step, row.tokens, row.time
            for name, value in row.values.items():
                pyramid = waiting.get((name, lineage))
                if pyramid is None:
                    pyramid = waiting[name, lineage] = self._pyramid(name, lineage)
                pyramid.append(step, value, tokens, time)
            self._values += len(row.values)
        if self._values >= FLUSH_VALUES:
            self._flush()

    def _flush(self) -> None:
        self.sync()  # the index must never be ahead of the chunks
        try:
            self._database.begin()
            for pyramid in self._waiting.values():
                pyramid.flush()
            for name in self._dirty_chunks:
                self._database.put_chunk(name, self._marks[name])
            for source in self._dirty_sources:
                self._database.put_source(source, self._sources[source])
            self._database.commit()
        except sqlite3.Error as error:
            log.warning("%s: cannot be written (%s); the charts wait, the chunks do not", self._index, error)
            self._database.rollback()
            self._load()  # undone in the database means undone in memory
            self._behind = True
            return
        self._waiting.clear()
        self._dirty_chunks.clear()
        self._dirty_sources.clear()
        self._values = 0

    def _pyramid(self, series: str, lineage: int) -> Pyramid:
        lineages = self._series.setdefault(series, {})
        if lineage not in lineages:
            self._lines += 1
            lineages[lineage] = Pyramid(self._database, Line(self._lines, series, lineage))
        return lineages[lineage]

    def _along(
        self, series: str, path: Sequence[LineageSegment], start: int, stop: int | None
    ) -> Iterator[tuple[Pyramid, int, int]]:
        """The pyramids that the path crosses in the steps [start, stop), each with its stretch of them, in order."""
        if any(pyramid.late for pyramid in self._series.get(series, {}).values()):
            self._flush()
        lineages = self._series.get(series, {})
        for lineage, after, last in path:
            pyramid = lineages.get(lineage)
            if pyramid is None:
                continue
            low = max(start, after + 1)
            high = pyramid.last + 1
            high = high if last is None else min(high, last + 1)
            high = high if stop is None else min(high, stop)
            if low < high:
                yield pyramid, low, high

    def _forward(self, series: str, path: Sequence[LineageSegment], start: int, stop: int | None) -> Iterator[Point]:
        for pyramid, low, high in self._along(series, path, start, stop):
            for block in pyramid.rows(low, high):
                for row in block:
                    yield _point(pyramid.line.lineage, row)

    def _backward(self, series: str, path: Sequence[LineageSegment], start: int, stop: int | None) -> Iterator[Point]:
        for pyramid, low, high in reversed(list(self._along(series, path, start, stop))):
            for block in pyramid.rows(low, high, descending=True):
                for row in block[::-1]:
                    yield _point(pyramid.line.lineage, row)

    def _last(self, series: str, n: int, path: Sequence[LineageSegment] | None) -> list[Point]:
        if path is None:
            newest = max(self._series.get(series, {}), default=None)
            path = [] if newest is None else [LineageSegment(newest, -1, None)]
        newest_first = self._backward(series, path, 0, None)
        return [point for _, point in zip(range(n), newest_first, strict=False)][::-1]


def _point(lineage: int, row: np.void) -> Point:
    return Point(lineage, int(row["step"]), float(row["value"]), int(row["tokens"]), float(row["time"]))


def usable_index(places: Sequence[Path]) -> Path:
    """The first place where an index can be kept; in memory where there is none. A run never waits for what can be rebuilt."""
    for candidate in places:
        try:
            try:
                database = Database(candidate)
            except Damaged:
                _remove(candidate)
                database = Database(candidate)
            try:
                database.check_writable()
            finally:
                database.close()
            return candidate
        except (OSError, sqlite3.Error, Damaged) as error:
            log.warning("%s: cannot be used (%s); another place is tried", candidate, error)
    log.warning("the index of the metrics is kept in memory")
    return MEMORY


def _remove(index: Path) -> None:
    for suffix in ("", "-wal", "-shm"):
        Path(f"{index}{suffix}").unlink(missing_ok=True)


_NONE = NumberRanges()
