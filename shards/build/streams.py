"""What the shards of a build are made of: the documents of each source, in an order that never changes.

Documents that no step works on are read from the source's files as their shards are written: a limited source is read no
further than its limit, and nothing lies on the disk twice. After steps, documents come from the chunks that the last one wrote.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from shards.build import encode
from shards.build.encode import EncodedDocument
from shards.build.workspace import Work
from shards.readers.sources import ReadPosition, Rejected
from shards.readers.sources import documents as read_documents
from shards.readers.splits import Records
from shards.readers.stdlib import Wanted
from shards.spec import Source
from shards.tokenization.records import Document


@dataclass(frozen=True)
class RecordStream:
    """The records of one directory of shards."""

    directory: str  # its name in OUT
    source: Source
    records: Records[Any]  # of Document, or of EncodedDocument where `is_encoded`
    position: ReadPosition = field(default_factory=ReadPosition)  # moves while the source's files are read
    notes: Counter[str] = field(default_factory=Counter)  # on documents that are encoded already
    is_encoded: bool = False  # by a step; else it is done as they are written


def documents(work: Work, number: int, position: ReadPosition | None = None) -> Records[Document]:
    """The documents of the `number`th source: read, or as the steps before the tokenizer left them."""
    if work.has_steps:
        return lambda held_out, wanted: (each.document() for each in encode.clean_documents(work, number))
    return partial(read_documents, work.sources[number], ReadPosition() if position is None else position)


def streams(work: Work) -> Iterator[RecordStream]:
    """All that is to be written, in order; known once the steps are done. A source that is split has a stream for each label."""
    for number in range(len(work.sources)):
        yield from _of_source(work, number)


def _of_source(work: Work, number: int) -> Iterator[RecordStream]:
    source = work.sources[number]
    if not work.has_steps:
        position = ReadPosition()
        yield RecordStream(source.name, source, documents(work, number, position), position)
        return
    for place, label in enumerate(encode.labels(work, number)):
        first = place == 0  # what was left out of the source, and the notes on it, go with its first label
        yield RecordStream(
            directory=f"{source.name}.{label}" if label else source.name,
            source=source,
            records=_encoded(work, number, label, first),
            is_encoded=True,
            notes=encode.notes_of(work, number) if first else Counter(),
        )


def _encoded(work: Work, number: int, label: str, first: bool) -> Records[EncodedDocument]:
    def records(held_out: Callable[[str], bool], wanted: Wanted) -> Iterator[EncodedDocument | Rejected]:
        return encode.encoded_documents(work, number, label, first)

    return records
