"""Step `model`: what judges learn from text that the recipe names, before any document is judged.

Kept in OUT/models when the build is done: a perplexity or quality score says little without the model that gave it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO

import msgspec

from shards.build.checksummed_files import hash_of, load_bytes, save_bytes
from shards.build.workspace import Work
from shards.common.errors import ShardError, SpecError
from shards.common.files import kept_if_written, sync_directory
from shards.readers.hidden import is_hidden
from shards.readers.sources import Rejected, read_unit, units
from shards.spec import Clean, Origin, Source
from shards.tokenization.records import Document

SEALED = ".seal"
ASIDE = "rejected.jsonl"
TOO_SHORT = "too short to be looked for"
PERPLEXITY, QUALITY, CONTAMINATION = "perplexity.arpa", "quality.model", "contamination.index"


def beside(clean: Clean) -> list[Source]:
    """Text beside the sources that decides what is kept, as sources."""
    return [as_source(purpose, path) for purpose, path in clean.references().items()]


def as_source(purpose: str, path: str) -> Source:
    """Text that a recipe names by its path alone: JSON lines, Parquet, or text files, told by their names."""
    place = Path(path)
    seen = [each for each in sorted(place.rglob("*")) if each.is_file() and not is_hidden(each.relative_to(place).parts)]
    names = [place.name] if not place.is_dir() else [each.name for each in seen]
    origin: Origin = "text"
    if any(name.split(".")[-1] == "parquet" for name in names):
        origin = "parquet"
    elif any(".jsonl" in name or ".ndjson" in name for name in names):
        origin = "jsonl"
    return Source(name=purpose, kind="text", origin=origin, path=path)


def _texts(purpose: str, path: str, aside: IO[bytes]) -> Iterator[str]:
    """What a judge learns from. Records that are no text are kept aside; SpecError if nothing else is there."""
    source = as_source(purpose, path)
    first: Rejected | None = None
    found = 0
    for unit in units(source):
        for record in read_unit(source, unit):
            if isinstance(record, Document):
                found += 1
                yield record.parts[0]
            else:
                first = first or record
                aside.write(msgspec.json.encode(record) + b"\n")
    if not found:
        why = f"{first.where}: {first.reason}" if first else "no records"
        raise SpecError(f'clean.{purpose}: {path}: nothing in it is text: {why} (give text files, or records with a field "text")')


def model(work: Work, name: str) -> Path:
    """Where a model lies."""
    return Path(work.build.out, "models", name)


def trained(work: Work, name: str) -> Path:
    """A model that is what this build made. Raises ShardError for any other."""
    path = model(work, name)
    try:
        if hash_of(path) == load_bytes(work.path(FilterModel.name, name, SEALED)):
            return path
        why = "not as it was written"
    except OSError as error:
        why = str(error.strerror)
    raise ShardError(f"{path}: {why} (delete {work.root}: the same command then begins anew; check this disk)")


class FilterModel:
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
        return work.path(self.name, task[0], SEALED)

    def do(self, work: Work, task: tuple[str]) -> None:
        final = model(work, task[0])
        final.parent.mkdir(parents=True, exist_ok=True)
        temporary = final.with_name(f"{final.name}.{os.getpid()}.tmp")
        try:
            with kept_if_written(final.with_name(f"{final.name}.{ASIDE}")) as aside:
                _train(work.clean, task[0], temporary, aside)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, final)
            sync_directory(final.parent)
            save_bytes(self.output(work, task), hash_of(final))
        finally:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)


def described(work: Work) -> dict[str, str]:
    """What each model is, for people: how large, and how well it does."""
    found = {}
    for (name,) in FilterModel().tasks(work):
        path = model(work, name)
        if name == QUALITY:
            from shards.filters.quality import Classifier

            report = Classifier.load(path).report
            examples = f"{report.good:,} good and {report.bad:,} bad documents"
            scores = f"accuracy {report.accuracy:.3f}, AUC {report.auc:.3f} on {report.held_out:,} held out"
            found["quality"] = f"trained on {examples}: {scores}"
        elif name == PERPLEXITY:
            with path.open(encoding="utf-8") as file:
                counts = [line.split("=")[1].strip() for line in islice(file, 8) if line.startswith("ngram ")]
            found["perplexity"] = f"n-grams of 1 to {len(counts)} words: {', '.join(f'{int(count):,}' for count in counts)}"
        else:
            from shards.filters.contamination import NgramIndex

            index = NgramIndex.load(path)
            sets = []
            for each, size, short in zip(index.names, index.sizes, index.too_short, strict=True):
                sets.append(f"{each} ({size:,} texts{f', {short:,} of them {TOO_SHORT}' if short else ''})")
            found["contamination"] = f"looked for {', '.join(sets) or 'nothing'}"
    return found


def _train(clean: Clean, name: str, path: Path, aside: IO[bytes]) -> None:
    if name == PERPLEXITY and clean.perplexity is not None:
        from shards.filters import perplexity

        perplexity.train(_texts("perplexity.reference", clean.perplexity.reference, aside), clean.perplexity, path)
    elif name == QUALITY and clean.quality is not None:
        from shards.filters.quality import Classifier

        given = {"good": clean.quality.good, "bad": clean.quality.bad}
        good, bad = (_texts(f"quality.{each}", where, aside) for each, where in given.items())
        Classifier.train(good, bad, clean.quality).save(path)
    elif clean.contamination is not None:
        from shards.filters.contamination import NgramIndex

        sets = {each: _texts(f"contamination.sets.{each}", where, aside) for each, where in clean.contamination.sets.items()}
        NgramIndex.build(sets, clean.contamination).save(path)
