"""What is asked of each document: every check that a build's `clean` table turns on, in order, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import msgspec

from shards.build.chunks import StoredDocument, size_of
from shards.build.filter_stats import Funnel
from shards.build.models import CONTAMINATION, PERPLEXITY, QUALITY, trained
from shards.build.workspace import Work
from shards.filters.heuristics.families import Rules
from shards.spec import Kind, Source

Verdict = tuple[StoredDocument, str]
"""A document as it is kept, and why it is not, empty where it is."""
Judge = Callable[[Sequence[StoredDocument], Funnel], list[Verdict]]


class SourceFilters:
    """The checks of one source."""

    def __init__(self, judges: dict[str, Judge]) -> None:
        self._judges = judges

    @classmethod
    def of(cls, work: Work, source: Source) -> SourceFilters:
        """Made once a process: models take seconds to load."""
        return _made(work, source.kind, source.split_by)

    @property
    def steps(self) -> list[str]:
        return list(self._judges)

    def apply(self, documents: Sequence[StoredDocument], funnel: Funnel) -> list[tuple[StoredDocument | None, str]]:
        """Each document as it is kept, or None and why; every step is noted in the funnel."""
        verdicts: list[tuple[StoredDocument | None, str]] = [(document, "") for document in documents]
        for step, judge in self._judges.items():
            places = [place for place, (document, _) in enumerate(verdicts) if document is not None]
            standing = [document for document, _ in verdicts if document is not None]
            for place, before, (after, reason) in zip(places, standing, judge(standing, funnel), strict=True):
                if reason:
                    verdicts[place] = None, reason
                    continue
                size = size_of(after)
                if after.parts != before.parts:
                    funnel.altered(step, size_of(before) - size)
                funnel.passed(step, size)
                verdicts[place] = after, ""
        return verdicts


def _text(document: StoredDocument) -> str:
    return document.parts[0] if len(document.parts) == 1 else "\n".join(document.parts)


def _with_parts(document: StoredDocument, parts: tuple[str, ...]) -> StoredDocument:
    """The same document, saying something else; what it is held out by stays what it was."""
    key = document.parts[0] if document.key is None else document.key
    return msgspec.structs.replace(document, key=key, parts=parts)


@lru_cache(maxsize=8)
def _made(work: Work, kind: Kind, split_by: str | None) -> SourceFilters:
    clean = work.clean
    judges: dict[str, Judge] = {}
    if clean.language is not None:
        judges["language"] = _language(clean.language, split_by == "language")
    if kind == "text":
        judges |= _rules(work)
        if clean.perplexity is not None:
            judges["perplexity"] = _perplexity(work, clean.perplexity)
        if clean.quality is not None:
            judges["quality"] = _quality(work, clean.quality, split_by == "quality")
    if clean.pii is not None:
        judges["pii"] = _pii(clean.pii)
    if clean.toxicity is not None:
        judges["toxicity"] = _toxicity(clean.toxicity)
    if clean.contamination is not None:
        judges["contamination"] = _contamination(work)
    return SourceFilters(judges)


def _rules(work: Work) -> dict[str, Judge]:
    """A step for each family of rules."""

    def family(rules: Rules) -> Judge:
        def judge(documents: Sequence[StoredDocument], funnel: Funnel) -> list[Verdict]:
            found = []
            for document in documents:
                text, reason = rules.apply(document.parts[0])
                found.append((document if text == document.parts[0] else _with_parts(document, (text,)), reason))
            return found

        return judge

    settings = {name: getattr(work.clean, name) for name in Rules.__struct_fields__}
    return {name: family(Rules(**{name: value})) for name, value in settings.items() if value is not None}


def _language(settings: Any, split: bool) -> Judge:
    from shards.filters.language import UNKNOWN, Detector, judge

    detector = Detector()

    def languages(documents: Sequence[StoredDocument], funnel: Funnel) -> list[Verdict]:
        found = []
        for document in documents:
            guess = detector.guess(_text(document))
            reason = judge(guess, settings)
            label = "unknown" if guess.code == UNKNOWN else guess.code
            funnel.tell("language", label, size_of(document))
            found.append((msgspec.structs.replace(document, label=label) if split else document, reason))
        return found

    return languages


def _perplexity(work: Work, settings: Any) -> Judge:
    from shards.filters.perplexity import Scorer, judge

    scorer = Scorer(trained(work, PERPLEXITY))

    def perplexities(documents: Sequence[StoredDocument], funnel: Funnel) -> list[Verdict]:
        found = []
        for document in documents:
            value = scorer.perplexity(document.parts[0])
            funnel.tell("perplexity", _power(value), size_of(document))
            found.append((document, judge(value, settings)))
        return found

    return perplexities


def _power(value: float) -> str:
    """The power of two that a perplexity is below, by which they are counted."""
    return f"below {1 << min(40, max(0, int(value)).bit_length()):,}" if value < 1 << 40 else "beyond"


def _quality(work: Work, settings: Any, split: bool) -> Judge:
    from shards.filters.quality import Classifier, bucket, judge

    classifier = Classifier.load(trained(work, QUALITY))

    def qualities(documents: Sequence[StoredDocument], funnel: Funnel) -> list[Verdict]:
        scores = classifier.scores([document.parts[0] for document in documents]) if documents else []
        found = []
        for document, score in zip(documents, scores, strict=True):
            label = bucket(score, settings.edges)
            funnel.tell("quality", label, size_of(document))
            found.append((msgspec.structs.replace(document, label=label) if split else document, judge(score, settings)))
        return found

    return qualities


def _pii(settings: Any) -> Judge:
    from shards.filters.pii import Finder

    finder = Finder(settings)

    def personal(documents: Sequence[StoredDocument], funnel: Funnel) -> list[Verdict]:
        found = []
        for document in documents:
            parts, reason = [], ""
            for part in document.parts:
                text, counts, why = finder.apply(part)
                parts.append(text)
                reason = reason or why
                for kind, count in counts.items():
                    funnel.tell("personal data", kind, 0, count)
            found.append((document if tuple(parts) == document.parts else _with_parts(document, tuple(parts)), reason))
        return found

    return personal


def _toxicity(settings: Any) -> Judge:
    from shards.filters.toxicity import ToxicityScorer

    meter = ToxicityScorer(settings)

    def toxic(documents: Sequence[StoredDocument], funnel: Funnel) -> list[Verdict]:
        measured = meter.measure([_text(document) for document in documents]) if documents else []
        return [(document, meter.judge(each)) for document, each in zip(documents, measured, strict=True)]

    return toxic


def _contamination(work: Work) -> Judge:
    from shards.filters.contamination import NgramIndex

    index = NgramIndex.load(trained(work, CONTAMINATION))

    def contaminated(documents: Sequence[StoredDocument], funnel: Funnel) -> list[Verdict]:
        found = []
        for document in documents:
            seen = index.find(_text(document))
            for name in seen.items:
                funnel.tell("contamination", name, size_of(document))
            found.append((document, index.judge(seen)))
        return found

    return contaminated
