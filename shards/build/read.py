"""Step `read`: a source's units, small ones together, into chunks of documents."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import msgspec

from shards.build.checksummed_files import Sealed, save_bytes
from shards.build.chunks import DocumentChunkWriter, size_of, stored
from shards.build.workspace import Name, ReadUnit, Work
from shards.common.errors import ShardError
from shards.readers.sources import Rejected, broken, is_held_out, read_unit, unreadable
from shards.tokenization.records import Document

CHUNK_DOCUMENTS = 16_384

Task = tuple[int, int]  # source, group of units


class Read:
    """One task a group of units. What was being read when a build was killed is read again."""

    name = "read"
    about = "reading"

    def tasks(self, work: Work) -> list[Task]:
        return [(number, unit) for number, units in enumerate(work.inputs) for unit in range(len(units))]

    def weight(self, work: Work, task: Task) -> int:
        """Bytes of the files."""
        return max(1, sum(unit.size for unit in work.inputs[task[0]][task[1]]))

    def output(self, work: Work, task: Task) -> Path:
        return work.path(self.name, f"{task[0]:03d}-{task[1]:06d}", ".json")

    def do(self, work: Work, task: Task) -> None:
        number, place = task
        read = _UnitReader(work, number, place)
        for unit in work.inputs[number][place]:
            for record in read_unit(work.sources[number], unit, held_out=partial(_held_out, work)):
                read.take(record)
        save_bytes(self.output(work, task), msgspec.json.encode(read.close()))


def _held_out(work: Work, key: str) -> bool:
    return is_held_out(key, work.build.data.held_out, work.build.seed)


class _UnitReader:
    """The chunks of one group of units, and what was left out of them."""

    def __init__(self, work: Work, source: int, unit: int) -> None:
        self._work = work
        self._place = source, unit
        self._chunks: list[tuple[int, int]] = []
        self._rejected: dict[str, int] = {}
        self._broken: dict[str, None] = {}
        self._notes: Counter[str] = Counter()
        self._writer: DocumentChunkWriter | None = None
        self._aside = Sealed(work.path("read", f"{source:03d}-{unit:06d}", ".rejected.jsonl"))

    def take(self, record: Document | Rejected) -> None:
        if isinstance(record, Document):
            try:
                self._add(record, size_of(record))
                self._notes.update(record.notes)
                return
            except UnicodeEncodeError:
                record = Rejected(record.where, "half a surrogate pair", "")
        self._rejected[record.reason] = self._rejected.get(record.reason, 0) + 1
        if record.rest:
            self._broken[record.where] = None
        self._aside.write(msgspec.json.encode(record) + b"\n")

    def _add(self, document: Document, size: int) -> None:
        if self._writer is None:
            self._writer = DocumentChunkWriter(self._work.path("read", Name(*self._place, len(self._chunks)), ".docs"))
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
        self._aside.close()
        return ReadUnit(self._chunks, self._rejected, list(self._broken), dict(self._notes))


def refuse_broken(work: Work) -> None:
    """Raises ShardError where more of a source's files are broken than it allows, which are then read again the next time.

    Or where nothing in a source is a document.
    """
    for number, source in enumerate(work.sources):
        own = [(unit, read) for of, unit, read in work.units if of == number]
        of_all = sum(max(1, len(unit.paths)) for group in work.inputs[number] for unit in group)
        try:
            broken(source, [name for _, read in own for name in read.broken], of_all)
        except ShardError:
            for unit, read in own:
                if read.broken:
                    Read().output(work, (number, unit)).unlink()
            raise
        if not any(read.chunks for _, read in own):
            rejected: Counter[str] = Counter()
            for _, read in own:
                rejected.update(read.rejected)
            unreadable(source, rejected)
