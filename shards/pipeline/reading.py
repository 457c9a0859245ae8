"""Step `read`: a unit of a source into chunks of documents."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec

from shards.container import write_atomically
from shards.errors import ShardError
from shards.pipeline.store import ChunkWriter, size_of, stored
from shards.pipeline.work import Name, ReadUnit, Work
from shards.records import Document
from shards.sources import Reading, Rejected, Unit, documents, is_held_out, read_unit, units
from shards.spec import Source

CHUNK_DOCUMENTS = 16_384

Task = tuple[int, int]  # source, unit


def all_units(source: Source) -> list[Unit | None]:
    """A source's units; of what has no path one, without a name."""
    return [None] if source.path is None else list(units(source))


class Read:
    """One task a unit. A unit that was being read when a build was killed is read again."""

    name = "read"
    about = "reading"

    def tasks(self, work: Work) -> list[Task]:
        return [(number, unit) for number, source in enumerate(work.sources) for unit in range(len(all_units(source)))]

    def weight(self, work: Work, task: Task) -> int:
        """Bytes of the unit's files."""
        unit = all_units(work.sources[task[0]])[task[1]]
        return unit.size if unit is not None else 1

    def output(self, work: Work, task: Task) -> Path:
        return work.path(self.name, f"{task[0]:03d}-{task[1]:06d}", ".json")

    def do(self, work: Work, task: Task) -> None:
        number, place = task
        source = work.sources[number]
        unit = all_units(source)[place]
        read = _Reader(work, number, place)
        for record in _records(work, source, unit):
            read.take(record)
        write_atomically(self.output(work, task), msgspec.json.encode(read.close()))


def _records(work: Work, source: Source, unit: Unit | None) -> Iterator[Document | Rejected]:
    if unit is not None:
        return read_unit(source, unit, Reading())

    def held_out(key: str) -> bool:
        return is_held_out(key, work.build.data.held_out, work.build.seed)

    return documents(source, Reading(), held_out, lambda key: True)


class _Reader:
    """The chunks of one unit, and what was left out of them."""

    def __init__(self, work: Work, source: int, unit: int) -> None:
        self._work = work
        self._place = source, unit
        self._chunks: list[tuple[int, int]] = []
        self._rejected: dict[str, int] = {}
        self._broken = ""
        self._writer: ChunkWriter | None = None
        self._aside = work.path("read", f"{source:03d}-{unit:06d}", ".rejected.jsonl")
        self._temporary = self._aside.with_name(f"{self._aside.name}.{os.getpid()}.tmp")
        self._file = self._temporary.open("wb")

    def take(self, record: Document | Rejected) -> None:
        if isinstance(record, Document):
            try:
                self._add(record, size_of(record))
                return
            except UnicodeEncodeError:
                record = Rejected(record.where, "half a surrogate pair", "")
        self._rejected[record.reason] = self._rejected.get(record.reason, 0) + 1
        if record.rest:
            self._broken = f"{record.where}: {record.reason}: {record.record}"
        self._file.write(msgspec.json.encode(record) + b"\n")

    def _add(self, document: Document, size: int) -> None:
        if self._writer is None:
            self._writer = ChunkWriter(self._work.path("read", Name(*self._place, len(self._chunks)), ".docs"))
        self._writer.add(stored(document), size)
        if self._writer.text_bytes >= self._work.clean.chunk_bytes or self._writer.documents >= CHUNK_DOCUMENTS:
            self._end_chunk()

    def _end_chunk(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._chunks.append((self._writer.documents, self._writer.text_bytes))
            self._writer = None

    def close(self) -> ReadUnit:
        self._end_chunk()
        self._file.close()
        os.replace(self._temporary, self._aside)
        return ReadUnit(self._chunks, self._rejected, self._broken)


def refuse_broken(work: Work) -> None:
    """Raises ShardError where more of a source's units are broken than it allows."""
    for number, source in enumerate(work.sources):
        read = [unit for of, _, unit in work.units if of == number]
        broken = [unit.broken for unit in read if unit.broken]
        if len(broken) > source.broken_files * len(read):
            more = f", and {len(broken) - 3} more" if len(broken) > 3 else ""
            raise ShardError(
                f'source "{source.name}": {len(broken)} of {len(read)} files are broken, more than broken_files ='
                f" {source.broken_files} allows: {'; '.join(broken[:3])}{more} (mend them, or allow more)"
            )
