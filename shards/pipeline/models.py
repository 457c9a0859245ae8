"""Step `model`: what judges learn from text that the recipe names, before any document is judged.

Kept in OUT/models when the build is done: a perplexity or quality score says little without the model that gave it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

from shards.container import sync_directory
from shards.pipeline.work import Work
from shards.records import Document
from shards.sources import read_unit, units
from shards.spec import Clean, Origin, Source

PERPLEXITY, QUALITY, CONTAMINATION = "perplexity.arpa", "quality.model", "contamination.index"


def as_source(purpose: str, path: str) -> Source:
    """Text that a recipe names by its path alone: JSON lines, Parquet, or text files, told by their names."""
    place = Path(path)
    names = [place.name] if not place.is_dir() else [each.name for each in sorted(place.rglob("*")) if each.is_file()]
    origin: Origin = "text"
    if any(name.split(".")[-1] == "parquet" for name in names):
        origin = "parquet"
    elif any(".jsonl" in name or ".ndjson" in name for name in names):
        origin = "jsonl"
    return Source(name=purpose, kind="text", origin=origin, path=path)


def _texts(purpose: str, path: str) -> Iterator[str]:
    source = as_source(purpose, path)
    for unit in units(source):
        for record in read_unit(source, unit):
            if isinstance(record, Document):
                yield record.parts[0]


def model(work: Work, name: str) -> Path:
    """Where a model lies."""
    return Path(work.build.out, "models", name)


class Model:
    """One task a model."""

    name = "model"
    about = "training judges"

    def tasks(self, work: Work) -> list[tuple[str]]:
        clean = work.clean
        wanted = {PERPLEXITY: clean.perplexity, QUALITY: clean.quality, CONTAMINATION: clean.contamination}
        return [(name,) for name, settings in wanted.items() if settings is not None]

    def weight(self, work: Work, task: tuple[str]) -> int:
        return 1

    def output(self, work: Work, task: tuple[str]) -> Path:
        return model(work, task[0])

    def do(self, work: Work, task: tuple[str]) -> None:
        final = model(work, task[0])
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f"{final.name}.{os.getpid()}.tmp")
        try:
            _train(work.clean, task[0], temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, final)
            sync_directory(final.parent)
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def described(work: Work) -> dict[str, str]:
    """What each model is, for people: how large, and how well it does."""
    found = {}
    for (name,) in Model().tasks(work):
        path = model(work, name)
        if name == QUALITY:
            from shards.judging.quality import Classifier

            report = Classifier.load(path).report
            examples = f"{report.good:,} good and {report.bad:,} bad documents"
            scores = f"accuracy {report.accuracy:.3f}, AUC {report.auc:.3f} on {report.held_out:,} held out"
            found["quality"] = f"trained on {examples}: {scores}"
        elif name == PERPLEXITY:
            with path.open(encoding="utf-8") as file:
                counts = [line.split("=")[1].strip() for line in islice(file, 8) if line.startswith("ngram ")]
            found["perplexity"] = f"n-grams of 1 to {len(counts)} words: {', '.join(f'{int(count):,}' for count in counts)}"
        else:
            from shards.judging.contamination import Index

            index = Index.load(path)
            sets = ", ".join(f"{each} ({size:,} texts)" for each, size in zip(index.names, index.sizes, strict=True))
            found["contamination"] = f"looked for {sets or 'nothing'}"
    return found


def _train(clean: Clean, name: str, path: Path) -> None:
    if name == PERPLEXITY and clean.perplexity is not None:
        from shards.judging import perplexity

        perplexity.train(_texts("perplexity.reference", clean.perplexity.reference), clean.perplexity, path)
    elif name == QUALITY and clean.quality is not None:
        from shards.judging.quality import Classifier

        good, bad = _texts("quality.good", clean.quality.good), _texts("quality.bad", clean.quality.bad)
        Classifier.train(good, bad, clean.quality).save(path)
    elif clean.contamination is not None:
        from shards.judging.contamination import Index

        sets = {each: _texts(f"contamination.sets.{each}", path) for each, path in clean.contamination.sets.items()}
        Index.build(sets, clean.contamination).save(path)
