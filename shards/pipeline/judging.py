"""What is asked of a single document: every check that a build's `clean` table turns on, in order."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import msgspec

from shards.pipeline.funnel import Funnel
from shards.pipeline.store import Stored, size_of
from shards.pipeline.work import Work
from shards.spec import Kind

Judge = Callable[[Stored], tuple[Stored, str]]
"""The document as it is kept, and why it is not, empty where it is."""


class Judges:
    """The checks of one kind of source."""

    def __init__(self, judges: dict[str, Judge]) -> None:
        self._judges = judges

    @classmethod
    def of(cls, work: Work, kind: Kind) -> Judges:
        return _made(work, kind)

    @property
    def steps(self) -> list[str]:
        return list(self._judges)

    def apply(self, document: Stored, funnel: Funnel) -> tuple[Stored | None, str]:
        """The document as it is kept, or None and why; each step is noted in the funnel."""
        for step, judge in self._judges.items():
            changed, reason = judge(document)
            if reason:
                return None, reason
            size = size_of(changed)
            if changed is not document:
                funnel.altered(step, size_of(document) - size)
            funnel.passed(step, size)
            document = changed
        return document, ""


@lru_cache(maxsize=8)
def _made(work: Work, kind: Kind) -> Judges:
    return Judges({})


def with_text(document: Stored, text: str) -> Stored:
    """A text document that says something else."""
    return msgspec.structs.replace(document, parts=(text,), key=document.key)
