"""Step `clean`: of a chunk's documents those that stay, as they stay, and what became of the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from shards.build.checksummed_files import save_bytes
from shards.build.chunks import DocumentChunk, DocumentChunkWriter, StoredDocument, size_of
from shards.build.duplicates import MASK, Duplicates, exact, near
from shards.build.filter_stats import Count, Funnel, Sample
from shards.build.judge import SourceFilters
from shards.build.workspace import DOCUMENT_BITS, Work


class Cleaning:
    """One task a chunk: the chunk that is left, and its part of the funnel."""

    name = "clean"
    about = "cleaning"

    def tasks(self, work: Work) -> list[tuple[int]]:
        return [(number,) for number in range(len(work.chunks))]

    def weight(self, work: Work, task: tuple[int]) -> int:
        return work.sizes[task[0]][1]

    def output(self, work: Work, task: tuple[int]) -> Path:
        return work.path(self.name, work.chunks[task[0]], ".json")

    def do(self, work: Work, task: tuple[int]) -> None:
        number = task[0]
        name = work.chunks[number]
        source = work.sources[name.source]
        gone = [duplicates(work, number) for duplicates in (exact, near)]
        judges = SourceFilters.of(work, source)
        funnel = Funnel({step: Count() for step in ("read", "exact", "near", *judges.steps)})
        chunk = work.chunk(number)
        with DocumentChunkWriter(work.path(self.name, name, ".docs")) as writer:
            for frame in range(len(chunk.frames)):
                own = list(self._own(work, chunk, frame, gone, funnel))
                for before, (after, reason) in zip(own, judges.apply(own, funnel), strict=True):
                    if after is None:
                        funnel.dropped(reason, size_of(before))
                        if funnel.wants(reason):
                            funnel.show(reason, Sample(before.where, reason, _shown(before)))
                        continue
                    writer.add(after, size_of(after))
            writer.close()
        save_bytes(self.output(work, task), msgspec.json.encode(funnel))

    def _own(
        self, work: Work, chunk: DocumentChunk, frame: int, gone: Sequence[Duplicates], funnel: Funnel
    ) -> Iterator[StoredDocument]:
        """The documents of a frame that no earlier document says."""
        for place, document in enumerate(chunk.frame(frame), chunk.frames[frame].first):
            size = size_of(document)
            funnel.passed("read", size)
            for step, duplicates in zip(("exact", "near"), gone, strict=True):
                if place in duplicates:
                    reason, earlier = duplicates[place]
                    funnel.dropped(f"{step} duplicate", size)
                    if funnel.wants(f"{step} duplicate"):
                        said = f"{reason} as {_where(work, earlier)}"
                        funnel.show(f"{step} duplicate", Sample(document.where, said, _shown(document)))
                    break
                funnel.passed(step, size)
            else:
                yield document


def _where(work: Work, document: int) -> str:
    """Of a document by its id: source and place in its files."""
    number, place = document >> DOCUMENT_BITS, document & MASK
    where = work.chunk(number).document(place).where
    return f"{work.sources[work.chunks[number].source].name}, {where or f'document {place}'}"


def _shown(document: Any) -> str:
    return "\n".join(document.parts)[: Sample.LENGTH]
