"""Statistics of cleaning: documents left after each step, what was removed by reason, and samples of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import msgspec

SAMPLES = 5  # kept for each reason


class Count(msgspec.Struct):
    """A number of documents, and the bytes of their text in UTF-8."""

    documents: int = 0
    bytes: int = 0

    def add(self, documents: int, size: int) -> None:
        self.documents += documents
        self.bytes += size


class Sample(msgspec.Struct, frozen=True):
    """One document that was removed."""

    LENGTH: ClassVar[int] = 400  # characters of its text that are kept

    where: str
    reason: str
    text: str


class Funnel(msgspec.Struct):
    """Statistics of one chunk or of a whole source."""

    steps: dict[str, Count]  # what was left after each step, in order; "read" first
    reasons: dict[str, Count] = {}  # what was removed, by reason
    samples: dict[str, list[Sample]] = {}
    changed: dict[str, Count] = {}  # what was changed and kept, by reason
    told: dict[str, dict[str, Count]] = {}  # results of each filter for all documents, kept or not, by result

    def passed(self, step: str, size: int) -> None:
        self.steps[step].add(1, size)

    def dropped(self, reason: str, size: int) -> None:
        self.reasons.setdefault(reason, Count()).add(1, size)

    def wants(self, reason: str) -> bool:
        """Whether more samples of a reason are needed."""
        return len(self.samples.get(reason, ())) < SAMPLES

    def show(self, reason: str, sample: Sample) -> None:
        self.samples.setdefault(reason, []).append(sample)

    def altered(self, reason: str, size: int) -> None:
        """Count a document that was changed and kept; `size`: the bytes that it lost."""
        self.changed.setdefault(reason, Count()).add(1, size)

    def tell(self, judge: str, answer: str, size: int, count: int = 1) -> None:
        self.told.setdefault(judge, {}).setdefault(answer, Count()).add(count, size)


def together(funnels: Iterable[Funnel]) -> Funnel:
    """The funnel of a source: the sum over its chunks, in their order."""
    total = Funnel({})
    for funnel in funnels:
        for step, count in funnel.steps.items():
            total.steps.setdefault(step, Count()).add(count.documents, count.bytes)
        pairs = [(total.reasons, funnel.reasons), (total.changed, funnel.changed)]
        pairs += [(total.told.setdefault(judge, {}), answers) for judge, answers in funnel.told.items()]
        for mine, theirs in pairs:
            for reason, count in theirs.items():
                mine.setdefault(reason, Count()).add(count.documents, count.bytes)
        for reason, samples in funnel.samples.items():
            kept = total.samples.setdefault(reason, [])
            kept += samples[: SAMPLES - len(kept)]
    return total
