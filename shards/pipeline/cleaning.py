"""Step `clean`: of a chunk's documents those that stay, as they stay, and what became of the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from shards.container import write_atomically
from shards.pipeline.duplicates import MASK, exact, near
from shards.pipeline.funnel import Count, Funnel, Sample
from shards.pipeline.judging import Judges
from shards.pipeline.store import ChunkWriter, size_of
from shards.pipeline.work import DOCUMENT_BITS, Work


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
        gone: list[dict[int, tuple[str, int]]] = [duplicates(work, number) for duplicates in (exact, near)]
        judges = Judges.of(work, source.kind)
        funnel = Funnel({step: Count() for step in ("read", "exact", "near", *judges.steps)})
        with ChunkWriter(work.path(self.name, name, ".docs")) as writer:
            for place, document in enumerate(work.chunk(number)):
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
                    kept, reason = judges.apply(document, funnel)
                    if kept is None:
                        funnel.dropped(reason, size)
                        if funnel.wants(reason):
                            funnel.show(reason, Sample(document.where, reason, _shown(document)))
                    else:
                        writer.add(kept, size_of(kept))
            writer.close()
        write_atomically(self.output(work, task), msgspec.json.encode(funnel))


def _where(work: Work, document: int) -> str:
    """Of a document by its id: source and place in its files."""
    number, place = document >> DOCUMENT_BITS, document & MASK
    where = work.chunk(number).document(place).where
    return f"{work.sources[work.chunks[number].source].name}, {where or f'document {place}'}"


def _shown(document: Any) -> str:
    return "\n".join(document.parts)[: Sample.LENGTH]
