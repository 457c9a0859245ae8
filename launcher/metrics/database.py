"""The index on disk: blocks of rows and nodes in SQLite, keyed so that a stretch of steps is one range scan.

A block is up to 256 records of one line (a series on a lineage) at one level; level 0 holds rows, level k nodes of 4^k
steps. Its key packs (line, level, block number) into SQLite's integer row id, so neighbours in time are neighbours on
disk. The index can be rebuilt, so it never waits for the disk: WAL without a sync at each commit is consistent after a
crash of the process or the machine, at worst behind the chunks.
"""

import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import zstandard

from launcher.metrics.chunks import FrameEnd
from launcher.metrics.dedup import NumberRanges
from midwatch.metrics.m4_columns import FANOUT, pack, unpack
from midwatch.metrics.m4_nodes import NODE, ROW, Table

FORMAT = 1
BLOCK = 256  # records a block
_LEVEL_BITS, _BLOCK_BITS = 5, 36

_SCHEMA = """
CREATE TABLE chunk (name TEXT PRIMARY KEY, offset INTEGER, header BLOB);
CREATE TABLE source (name TEXT PRIMARY KEY, ranges BLOB);
CREATE TABLE line (id INTEGER PRIMARY KEY, series TEXT, lineage INTEGER, first INTEGER, last INTEGER, rows INTEGER,
                   top INTEGER, UNIQUE (series, lineage));
CREATE TABLE block (id INTEGER PRIMARY KEY, data BLOB);
"""


class Damaged(Exception):
    """The index is not what was written; the chunks have it all."""


@dataclass
class Line:
    """A series on one lineage, as far as it is in the database; `top` is its highest level."""

    id: int
    series: str
    lineage: int
    first: int = -1
    last: int = -1
    rows: int = 0
    top: int = 0


class Database:
    """Opens or creates the index at `path`. Raises Damaged when what is there cannot be read."""

    def __init__(self, path: Path) -> None:
        if str(path) != ":memory:":
            path.parent.mkdir(parents=True, exist_ok=True)
        self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        try:
            self._open()
        except BaseException:
            self._connection.close()
            raise

    def _open(self) -> None:
        try:
            self._connection.execute("PRAGMA page_size = 8192")
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute("PRAGMA cache_size = -16384")
            (version,) = self._connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._connection.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;")
            elif version != FORMAT:
                raise Damaged(f"the index has format {version}, this version reads {FORMAT}")
        except sqlite3.DatabaseError as error:
            raise self._named(error) from error

    def copy_from(self, path: Path) -> None:
        """Takes over what another index holds, without writing beside it; nothing where that one is absent or being written.

        Raises Damaged for an index of another format, and sqlite3.Error for one that cannot be read.
        """
        if not path.is_file() or Path(f"{path}-wal").exists():
            return
        other = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            (version,) = other.execute("PRAGMA user_version").fetchone()
            if version != FORMAT:
                raise Damaged(f"the index has format {version}, this version reads {FORMAT}")
            other.backup(self._connection)
        finally:
            other.close()

    def check_writable(self) -> None:
        """Writes what is there already: a disk that is full or read-only shows now. Raises sqlite3.Error."""
        self._execute(f"PRAGMA user_version = {FORMAT}")

    def lines(self) -> list[Line]:
        fields = "id, series, lineage, first, last, rows, top"
        return [Line(*row) for row in self._select(f"SELECT {fields} FROM line")]

    def chunks(self) -> dict[str, FrameEnd]:
        return {name: FrameEnd(*mark) for name, *mark in self._select("SELECT name, offset, header FROM chunk")}

    def sources(self) -> dict[str, NumberRanges]:
        found = self._select("SELECT name, ranges FROM source")
        return {name: NumberRanges(msgspec.msgpack.decode(ranges, type=list[tuple[int, int]])) for name, ranges in found}

    def begin(self) -> None:
        self._execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self._execute("COMMIT")

    def rollback(self) -> None:
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")

    def put_line(self, line: Line) -> None:
        values = (line.id, line.series, line.lineage, line.first, line.last, line.rows, line.top)
        self._execute("REPLACE INTO line VALUES (?, ?, ?, ?, ?, ?, ?)", values)

    def put_chunk(self, name: str, mark: FrameEnd) -> None:
        self._execute("REPLACE INTO chunk VALUES (?, ?, ?)", (name, *mark))

    def put_source(self, name: str, seen: NumberRanges) -> None:
        self._execute("REPLACE INTO source VALUES (?, ?)", (name, msgspec.msgpack.encode(seen.ranges)))

    def put_block(self, line: int, level: int, block: int, records: Table) -> None:
        self._execute("REPLACE INTO block VALUES (?, ?)", (_key(line, level, block), pack(records)))

    def records(self, line: int, level: int, first: int, last: int) -> Table:
        """The records of the blocks from number `first` to `last`, joined."""
        try:
            return unpack(self._blobs(line, level, first, last), NODE if level else ROW)
        except (ValueError, zstandard.ZstdError) as error:
            raise Damaged(f"a block of the index cannot be read: {error}") from error

    def blocks(self, line: int, level: int, first: int, last: int, descending: bool = False) -> Iterator[Table]:
        """The non-empty blocks from number `first` to `last`, read as they are asked for."""
        for blob in self._blobs(line, level, first, last, descending):
            try:
                yield unpack([blob], NODE if level else ROW)
            except (ValueError, zstandard.ZstdError) as error:
                raise Damaged(f"a block of the index cannot be read: {error}") from error

    def _blobs(self, line: int, level: int, first: int, last: int, descending: bool = False) -> Iterator[bytes]:
        order = "DESC" if descending else "ASC"
        query = f"SELECT data FROM block WHERE id BETWEEN ? AND ? ORDER BY id {order}"
        for (data,) in self._select(query, (_key(line, level, first), _key(line, level, last))):
            yield data

    def close(self) -> None:
        self._connection.close()

    def _select(self, query: str, values: tuple[object, ...] = ()) -> Iterator[tuple[Any, ...]]:
        try:
            yield from self._connection.execute(query, values)
        except sqlite3.DatabaseError as error:
            raise self._named(error) from error

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> None:
        try:
            self._connection.execute(statement, values)
        except sqlite3.DatabaseError as error:
            raise self._named(error) from error

    @staticmethod
    def _named(error: sqlite3.DatabaseError) -> Exception:
        """Damage as Damaged; a full disk or a lock stays what it is, for rebuilding would not help."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        broken_schema = code == sqlite3.SQLITE_ERROR  # a table or column of ours is missing
        if broken_schema or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
            return Damaged(f"the index cannot be read: {error}")
        return error


def block_of(step: int, level: int) -> int:
    """The number of the block that holds a step."""
    number: int = int(step) // (BLOCK * FANOUT**level)
    return number


def _key(line: int, level: int, block: int) -> int:
    key: int = (line << (_LEVEL_BITS + _BLOCK_BITS)) | (level << _BLOCK_BITS) | block
    return key
