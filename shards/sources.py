"""Documents out of a source, in an order that never changes, and the records that had to be left out.

A broken record never ends a build: it is counted by its reason and kept aside.
"""

from __future__ import annotations

import glob
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec
import xxhash
import zstandard

from shards import stdlib
from shards.errors import SpecError
from shards.records import Document, in_record
from shards.spec import Source

SUFFIXES = {"jsonl": (".jsonl", ".ndjson"), "text": (".txt", ".text", ".md", ".markdown", ".rst")}
COMPRESSED = (".gz", ".zst")
LONGEST_RECORD = 64 << 20  # bytes of one line, and of one text file's document
KEPT_ASIDE = 4096  # characters of a broken record that are kept


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that is no document."""

    where: str  # file and line
    reason: str
    record: str  # its beginning
    rest: bool = False  # with it the rest of its file is lost


@dataclass
class Reading:
    """How far a source was read; the iterator moves `done`."""

    unit: str = "bytes"
    total: int = 0
    done: int = 0
    paths: list[Path] = field(default_factory=list)


def is_held_out(key: str, share: float, seed: int) -> bool:
    """Whether documents of this key are held out: a pure function, so that all sources and builds agree."""
    return xxhash.xxh3_64_intdigest(key.encode(), seed=seed) < share * 2**64


def files(source: Source) -> list[Path]:
    """The files of a jsonl or text source, sorted; SpecError if there are none."""
    assert source.path is not None
    path, where = Path(source.path), f'source "{source.name}"'
    suffixes = tuple(suffix + end for suffix in SUFFIXES[source.origin] for end in ("", *COMPRESSED))
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(suffixes) and file.is_file())
        if not found:
            raise SpecError(f"{where}: {path}: no files ending in {', '.join(SUFFIXES[source.origin])} (or these + .gz, .zst)")
        return found
    if path.is_file():
        return [path]
    found = sorted(Path(name) for name in glob.glob(source.path, recursive=True) if Path(name).is_file())
    if not found:
        raise SpecError(f"{where}: {path}: no such file, directory or glob match (correct the path; now in {Path.cwd()})")
    return found


def fingerprint(source: Source) -> str:
    """Changes when a source's files do: names, sizes, times. Empty for the standard library."""
    if source.path is None:
        return ""
    seen = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files(source)]
    return xxhash.xxh3_64_hexdigest(repr(seen).encode())


def describe(source: Source) -> str:
    """Where the text comes from, for the manifest."""
    if source.path is None:
        import platform

        return f"{source.origin} of Python {platform.python_version()}"
    found = files(source)
    return f"{source.origin}: {source.path} ({len(found)} files, {sum(path.stat().st_size for path in found)} bytes)"


@dataclass(frozen=True)
class Unit:
    """What is read as one."""

    name: str
    size: int
    paths: tuple[str, ...]


def units(source: Source) -> list[Unit]:
    return [Unit(str(path), path.stat().st_size, (str(path),)) for path in files(source)]


def read_unit(source: Source, unit: Unit, reading: Reading) -> Iterator[Document | Rejected]:
    path = Path(unit.paths[0])
    with path.open("rb") as raw:
        records = _json_lines(path, raw, source) if source.origin == "jsonl" else _texts(path, raw)
        for record in records:
            yield record if isinstance(record, Rejected) or _not_empty(record) else _empty(path, record)


def documents(
    source: Source, reading: Reading, held_out: Callable[[str], bool], wanted: stdlib.Wanted
) -> Iterator[Document | Rejected]:
    """All records of a source, in order."""
    if source.path is None:
        yield from _stdlib(source, reading, held_out, wanted)
        return
    paths = files(source)
    reading.total = sum(path.stat().st_size for path in paths)
    before = 0
    for path in paths:
        with path.open("rb") as raw:
            records = _json_lines(path, raw, source) if source.origin == "jsonl" else _texts(path, raw)
            for record in records:
                reading.done = before + raw.tell()
                yield record if isinstance(record, Rejected) or _not_empty(record) else _empty(path, record)
            before += path.stat().st_size


def _stdlib(
    source: Source, reading: Reading, held_out: Callable[[str], bool], wanted: stdlib.Wanted
) -> Iterator[Document | Rejected]:
    iterators = {
        "stdlib-code": lambda: stdlib.code(wanted),
        "stdlib-docs": lambda: stdlib.docs(wanted),
        "stdlib-topics": lambda: stdlib.topics(wanted),
        "stdlib-sft": lambda: stdlib.questions(wanted),
        "stdlib-preference": lambda: stdlib.preferences(wanted, held_out),
    }
    reading.unit = "documents"
    for key, parts in iterators[source.origin]():
        reading.done += 1
        if _not_empty(document := Document(key, parts)):
            yield document


def _not_empty(document: Document) -> bool:
    return all(part.strip() for part in document.parts)


def _empty(path: Path, document: Document) -> Rejected:
    return Rejected(str(path), "empty", document.key[:KEPT_ASIDE])


def _open(path: Path, raw: IO[bytes]) -> IO[bytes]:
    if path.name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)  # type: ignore[return-value]  # reads as one
    if path.name.endswith(".zst"):
        stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False)
        return io.BufferedReader(stream, 1 << 20)
    return raw


def _lines(path: Path, raw: IO[bytes]) -> Iterator[bytes | Rejected]:
    """Lines with their ends; one too long, or a damaged compressed file, as a Rejected."""
    try:
        stream = _open(path, raw)
        number = 0
        while line := stream.readline(LONGEST_RECORD):
            number += 1
            if len(line) == LONGEST_RECORD and not line.endswith(b"\n"):
                while (rest := stream.readline(1 << 20)) and not rest.endswith(b"\n"):
                    pass
                yield Rejected(f"{path}:{number}", f"longer than {LONGEST_RECORD >> 20} MiB", _shown(line))
            else:
                yield line
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        yield Rejected(str(path), "damaged file, read up to there", str(error), True)


def _json_lines(path: Path, raw: IO[bytes], source: Source) -> Iterator[Document | Rejected]:
    decoder = msgspec.json.Decoder()
    for number, line in enumerate(_lines(path, raw), 1):
        if isinstance(line, Rejected):
            yield line
        elif line.strip():
            where = f"{path}:{number}"
            record = _object(decoder, line)
            found = record if isinstance(record, str) else in_record(record, source, where)
            yield found if isinstance(found, Document) else Rejected(where, found, _shown(line))


def _object(decoder: msgspec.json.Decoder[Any], line: bytes) -> dict[str, Any] | str:
    """One JSON line, or why it is rejected."""
    try:
        record = decoder.decode(line)
    except UnicodeDecodeError:
        return "not UTF-8"
    except msgspec.DecodeError as error:
        return "not UTF-8" if "utf-8" in str(error).lower() else "not JSON"
    except RecursionError:
        return "not JSON"
    return record if isinstance(record, dict) else "not an object"


def _texts(path: Path, raw: IO[bytes]) -> Iterator[Document | Rejected]:
    """A file as one document; a very large one as several, cut at line ends."""
    lines: list[bytes] = []
    size = 0
    for line in _lines(path, raw):
        if isinstance(line, Rejected):
            yield line
            continue
        lines.append(line)
        size += len(line)
        if size >= LONGEST_RECORD // 4:
            yield _text(path, b"".join(lines))
            lines, size = [], 0
    if lines:
        yield _text(path, b"".join(lines))


def _text(path: Path, raw: bytes) -> Document | Rejected:
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Rejected(str(path), "not UTF-8", f"{error.reason} at byte {error.start}")
    return Document(text, (text,))


def _shown(raw: bytes) -> str:
    return raw[:KEPT_ASIDE].decode("utf-8", errors="backslashreplace")
