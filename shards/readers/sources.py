"""Documents out of a source, in an order that never changes, and the records that had to be left out.

A broken record never ends a build: it is counted by its reason and kept aside. A broken file does so where it is one of more
than the source's share of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from types import ModuleType

import xxhash

from shards.common.errors import ShardError, SpecError
from shards.readers import stdlib
from shards.readers.base import KEPT_ASIDE, LONGEST_RECORD, NULS, ReadPosition, Record, Rejected, Unit, shown
from shards.readers.compressed import COMPRESSED
from shards.readers.files import InputFile, find
from shards.spec import STDLIB_KINDS, Source
from shards.tokenization.records import Document

__all__ = [
    "KEPT_ASIDE", "LONGEST_RECORD", "ReadPosition", "Rejected", "Unit",
    "broken", "changed", "describe", "documents", "files", "fingerprint", "is_held_out", "read_unit", "units", "unreadable",
]  # fmt: skip

READERS = ("jsonl", "text", "parquet", "code", "warc", "wet", "wikipedia", "stackexchange", "latex", "gutenberg")
NAMED = 5  # broken files that an error names


def is_held_out(key: str, share: float, seed: int) -> bool:
    """Whether documents of this key are held out: a pure function, so that all sources and builds agree."""
    return xxhash.xxh3_64_intdigest(key.encode(errors="surrogatepass"), seed=seed) < share * 2**64


def _reader(source: Source) -> ModuleType:
    if source.origin not in READERS:
        raise SpecError(f'source "{source.name}": origin {source.origin} is not read from files (the run makes it)')
    return import_module(f"shards.readers.{source.origin}")


def files(source: Source) -> list[InputFile]:
    """The files of a source, sorted; SpecError if there are none."""
    assert source.path is not None
    reader = _reader(source)
    suffixes: tuple[str, ...] = source.suffixes or reader.SUFFIXES
    whole = tuple(suffix + end for suffix in suffixes for end in ("", *COMPRESSED))
    wanted: Callable[[str], bool] = getattr(reader, "wanted", None) or (lambda name: name.lower().endswith(whole))
    if source.suffixes:
        wanted = lambda name: name.lower().endswith(whole)  # noqa: E731
    endings = f"{', '.join(suffixes[:8])}{', ...' if len(suffixes) > 8 else ''} (or these + {', '.join(COMPRESSED)})"
    dotted: bool = getattr(reader, "DOTTED_ARE_HIDDEN", True)
    return find(source.path, f'source "{source.name}"', wanted, endings, dotted=dotted)


def units(source: Source) -> list[Unit]:
    """What is read as one, in the order of reading: mostly a file. Raises SpecError if there are none, or a library is missing."""
    if source.origin == "made":
        return []
    if source.path is None:
        return [Unit(source.origin, 0, ())]
    reader = _reader(source)
    if hasattr(reader, "units"):
        found: list[Unit] = reader.units(source, files(source))
        return found
    return [Unit(each.path, each.size, (each.path,)) for each in files(source)]


def fingerprint(source: Source) -> str:
    """Changes when a source's files do: names, sizes, times or tags. Empty for the standard library."""
    if source.path is None:
        return ""
    check = getattr(_reader(source), "check", None)
    if check is not None:
        check(source)
    seen = [tuple(each) for each in files(source)]
    return xxhash.xxh3_64_hexdigest(repr(seen).encode(errors="surrogateescape"))


def changed(source: Source) -> ShardError:
    """The error for a source whose fingerprint is another after it was read."""
    return ShardError(
        f'source "{source.name}": {source.path}: files changed, came or went while they were read'
        " (leave them alone while the build runs; the same command begins anew with what is there then)"
    )


def describe(source: Source) -> str:
    """Where the text comes from, for the manifest."""
    if source.origin == "made":
        return f"made: {source.made} of {', '.join(source.of)}, {source.characters:,} characters or more each"
    if source.path is None:
        import platform

        return f"{source.origin} of Python {platform.python_version()}"
    found = files(source)
    return f"{source.origin}: {source.path} ({len(found)} files, {sum(each.size for each in found)} bytes)"


def read_unit(
    source: Source,
    unit: Unit,
    reading: ReadPosition | None = None,
    *,
    held_out: Callable[[str], bool] = lambda key: False,
    wanted: stdlib.Wanted = lambda key: True,
) -> Iterator[Record]:
    """A unit's records, in order, streamed. `reading.done` grows by the bytes read; the rest is for the standard library."""
    reading = ReadPosition() if reading is None else reading
    if source.path is None:
        yield from _stdlib(source, reading, held_out, wanted)
        return
    for record in _reader(source).read(source, unit, reading):
        if not record.where.isascii():
            record = replace(record, where=shown(record.where))  # a file's name need not be UTF-8
        if isinstance(record, Document) and any("\0" in part for part in record.parts):
            yield Rejected(record.where or shown(unit.name), NULS, shown(record.key))
        elif isinstance(record, Rejected) or all(part.strip() for part in record.parts):
            yield record
        else:
            yield Rejected(record.where or shown(unit.name), "empty", record.key[:KEPT_ASIDE])


def broken(source: Source, names: Sequence[str], of: int) -> None:
    """Raises a ShardError naming the files, if so many broken ones, of all that are to be read, are more than the share."""
    if names and len(names) > source.broken_files * of:
        some = ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
        raise ShardError(
            f'source "{source.name}": {len(names)} of {of} files are broken, which is more than broken_files = '
            f"{source.broken_files:g}: {some} (fetch them again, take them away, or raise broken_files)"
        )


def unreadable(source: Source, rejected: Mapping[str, int]) -> None:
    """Raises ShardError for a source of which no record is a document, where there were any."""
    if rejected:
        most = sorted(rejected.items(), key=lambda item: (-item[1], item[0]))[:3]
        reasons = ", ".join(f"{reason}: {count:,}" for reason, count in most)
        raise ShardError(
            f'source "{source.name}": none of its {sum(rejected.values()):,} records is a document ({reasons})'
            " (see that path, kind and the names of its fields are right)"
        )


def documents(
    source: Source, reading: ReadPosition, held_out: Callable[[str], bool], wanted: stdlib.Wanted
) -> Iterator[Document | Rejected]:
    """All records of a source, in order. Raises ShardError where too many files are broken."""
    found = units(source)
    of = sum(max(1, len(unit.paths)) for unit in found)
    reading.total = sum(unit.size for unit in found)
    before = 0
    bad: dict[str, None] = {}
    for unit in found:
        for record in read_unit(source, unit, reading, held_out=held_out, wanted=wanted):
            yield record
            if isinstance(record, Rejected) and record.rest:
                bad[record.where] = None
                broken(source, list(bad), of)
        if source.path is not None:
            before += unit.size
            reading.done = before


def _stdlib(source: Source, reading: ReadPosition, held_out: Callable[[str], bool], wanted: stdlib.Wanted) -> Iterator[Record]:
    iterators = {
        "stdlib-code": lambda: stdlib.code(wanted),
        "stdlib-docs": lambda: stdlib.docs(wanted),
        "stdlib-topics": lambda: stdlib.topics(wanted),
        "stdlib-sft": lambda: stdlib.questions(wanted),
        "stdlib-preference": lambda: stdlib.preferences(wanted, held_out),
    }
    assert source.origin in STDLIB_KINDS
    reading.unit = "documents"
    for key, parts in iterators[source.origin]():
        reading.done += 1
        if all(part.strip() for part in parts):
            yield Document(key, parts)
