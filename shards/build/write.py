"""Writes the shards of one directory: divides its documents into splits, encodes them in batches, cuts the tokens into shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from shards.build.encode import EncodedDocument, concatenated
from shards.build.split_writer import PROGRESS, SourceProgress, SplitWriter
from shards.build.streams import RecordStream
from shards.build.workspace import Work
from shards.common.files import kept_if_written
from shards.common.progress import ProgressMeter
from shards.format import manifest as manifests
from shards.format.manifest import SPLITS, SplitManifest
from shards.readers.sources import KEPT_ASIDE, Rejected, changed, describe, fingerprint, unreadable
from shards.readers.splits import divide
from shards.tokenization.encode import Encoded, Workers, notes, refusal
from shards.tokenization.records import Document
from shards.tokenization.tokenizer import Tokenizer

BATCH_SIZE = 1 << 19  # characters, or tokens of encoded documents; a source with a limit of tokens is read by whole batches
BATCH_RECORDS = 2048

Writers = tuple[SplitWriter, SplitWriter]  # train, held out
Place = tuple[int, bool]  # a document's number within its source, and whether it is held out


@dataclass
class _Batch:
    """Documents to be written, and what goes with them."""

    documents: list[Any] = field(default_factory=list)  # all Document, or all EncodedDocument
    places: list[Place] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)  # records met between them that are left out
    notes: Counter[str] = field(default_factory=Counter)


def write_source(work: Work, stream: RecordStream, tokenizer: Tokenizer, pool: Workers, meter: ProgressMeter) -> None:
    """One directory's shards and manifests; the second manifest is written last, so that with it the directory is complete.

    Raises ShardError where nothing in the source is a document, or its files changed while they were read.
    """
    spec, source = work.build, stream.source
    directory = Path(spec.out, stream.directory)
    if all((directory / name / manifests.FILE_NAME).exists() for name in SPLITS):
        (directory / PROGRESS).unlink(missing_ok=True)
        return
    for name in SPLITS:
        (directory / name).mkdir(parents=True, exist_ok=True)
    progress = SourceProgress.load(directory, fingerprint(source))
    meter.begin("encode", stream.directory, "bytes")
    rejected: Counter[str] = Counter()
    noted: Counter[str] = Counter()
    with (
        SplitWriter(directory / "train", source, spec.data, tokenizer, progress, held_out=False) as train,
        SplitWriter(directory / "held_out", source, spec.data, tokenizer, progress, held_out=True) as held,
        kept_if_written(directory / "rejected.jsonl") as aside,
    ):
        for encoded, batch in _encoded(stream, pool, _batches(work, stream, (train, held), tokenizer)):
            noted += batch.notes
            for record in batch.rejected:
                rejected[record.reason] += 1
                aside.write(msgspec.json.encode(record) + b"\n")
            _write(encoded, batch.places, train, held)
            _report(meter, stream, train, held)
            if train.full and held.full:
                break
        train.finish()
        held.finish()
        if not work.has_steps and not train.documents + held.documents:
            unreadable(source, rejected)
    if not work.has_steps and fingerprint(source) != progress.inputs:  # steps have compared the files after reading them
        raise changed(source)
    for writer in (train, held):
        SplitManifest(
            source=stream.directory,
            split=writer.name,
            kind=source.kind,
            origin=describe(source),
            tokenizer=tokenizer.hash,
            vocab=tokenizer.vocab,
            dtype=writer.dtype,
            frame_items=spec.data.frame_tokens,
            tokens=writer.tokens,
            documents=writer.documents,
            text_bytes=writer.text_bytes,
            rejected=dict(sorted(rejected.items())),
            notes=dict(sorted(noted.items())),
            shards=tuple(writer.shards),
        ).save(writer.directory)
    (directory / PROGRESS).unlink(missing_ok=True)


def _batches(work: Work, stream: RecordStream, writers: Writers, tokenizer: Tokenizer) -> Iterator[_Batch]:
    """The stream's documents with their places, and the records that are left out.

    Documents that are in a shard already, or for which there is no room, are not written again; but they count for where a
    batch ends, so that batches are the same whenever a build was interrupted and however far it reads ahead.
    """
    source, spec = stream.source, work.build
    batch = _Batch(notes=Counter(stream.notes))
    size = count = 0
    records: Iterator[tuple[int, Document | EncodedDocument | Rejected, bool | None]]
    records = divide(source, spec.data.held_out, spec.seed, stream.records)
    for number, record, held_out in records:
        if isinstance(record, Rejected):
            batch.rejected.append(record)
            size += len(record.record)
        elif held_out is not None:
            size += _size(record)
            writer = writers[held_out]
            # Asked here and not by the worker: a resumed build must count those, too, that it does not encode again.
            if refused := _refusal(tokenizer, stream, record):
                batch.rejected.append(refused)
            else:
                if isinstance(record, Document):
                    batch.notes.update(notes(tokenizer, source.kind, record))
                if number >= writer.next_document and not writer.full:
                    batch.documents.append(record)
                    batch.places.append((number, held_out))
        count += 1
        if size >= BATCH_SIZE or count >= BATCH_RECORDS:
            yield batch
            batch = _Batch()
            size = count = 0
    yield batch


def _size(record: Document | EncodedDocument) -> int:
    return len(record.tokens) if isinstance(record, EncodedDocument) else sum(map(len, record.parts))


def _refusal(tokenizer: Tokenizer, stream: RecordStream, record: Document | EncodedDocument) -> Rejected | None:
    """A document that the tokenizer's template does not take, as a rejected record."""
    if isinstance(record, EncodedDocument):
        return None  # those were left out when it was encoded
    reason = refusal(tokenizer, stream.source.kind, record)
    return Rejected(record.where or stream.source.name, reason, "\n".join(record.parts)[:KEPT_ASIDE]) if reason else None


def _encoded(stream: RecordStream, pool: Workers, batches: Iterator[_Batch]) -> Iterator[tuple[Encoded, _Batch]]:
    """Each batch as tokens, in order: by the workers, or as the step `encode` left its documents."""
    if stream.is_encoded:
        return ((concatenated(batch.documents), batch) for batch in batches)
    return pool.encode(stream.source.kind, ((batch.documents, batch) for batch in batches))


def _write(encoded: Encoded, places: list[Place], train: SplitWriter, held: SplitWriter) -> None:
    start = 0
    for (number, held_out), length, size in zip(places, encoded.lengths, encoded.text_bytes, strict=True):
        stop = start + length
        mask = None if encoded.mask is None else encoded.mask[start:stop]
        (held if held_out else train).add(number, encoded.tokens[start:stop], mask, size)
        start = stop


def _report(meter: ProgressMeter, stream: RecordStream, train: SplitWriter, held: SplitWriter) -> None:
    source, position = stream.source, stream.position
    if source.max_tokens is not None:
        meter.update(train.tokens + held.tokens, source.max_tokens, unit="tokens")
    elif source.max_documents is not None or not position.total:
        meter.update(train.documents + held.documents, source.max_documents, unit="documents")
    else:
        meter.update(position.done, position.total, unit="bytes")
