"""JSON lines: one record on each line."""

from __future__ import annotations

import io
from collections.abc import Iterator

import msgspec

from shards.readers.base import DAMAGED, LONGEST_RECORD, ReadPosition, Record, Rejected, Unit, not_utf8, shown
from shards.readers.compressed import DAMAGE
from shards.readers.files import stream
from shards.readers.layouts import Placed, documents
from shards.spec import Source

SUFFIXES = (".jsonl", ".ndjson")
KINDS = ("text", "sft", "preference", "unpaired")
OPTIONS = ("layout", "suffixes")
_BOM = b"\xef\xbb\xbf"


def read(source: Source, unit: Unit, reading: ReadPosition) -> Iterator[Record]:
    """A file's records as documents."""
    for path in unit.paths:
        try:
            with stream(path, reading) as lines:
                yield from documents(_records(path, lines), source)
        except DAMAGE as error:
            yield Rejected(path, DAMAGED, str(error), rest=True)


def _records(path: str, lines: io.BufferedReader) -> Iterator[Placed]:
    decode = msgspec.json.Decoder().decode
    number = 0
    try:
        while line := lines.readline(LONGEST_RECORD):
            number += 1
            if number == 1:
                if line.startswith(_BOM):
                    line = line.removeprefix(_BOM)
                elif line.startswith((b"\xff\xfe", b"\xfe\xff")) or (b"\0" in line[:4] and "UTF" in _of_nuls(line)):
                    yield Rejected(path, not_utf8(line), shown(line), rest=True)
                    return
            if len(line) == LONGEST_RECORD and not line.endswith(b"\n"):
                while (rest := lines.readline(1 << 20)) and not rest.endswith(b"\n"):
                    pass
                yield Rejected(f"{path}:{number}", f"longer than {LONGEST_RECORD >> 20} MiB", shown(line))
                continue
            try:
                record = decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                if line.strip():
                    yield Rejected(f"{path}:{number}", _why(error, line), shown(line))
                continue
            if isinstance(record, dict):
                yield f"{path}:{number}", record
            else:
                yield Rejected(f"{path}:{number}", "not an object", shown(line))
    except DAMAGE as error:
        yield Rejected(path, DAMAGED, str(error), rest=True)


def _of_nuls(line: bytes) -> str:
    """The reason for a line with NULs, which JSON does not allow."""
    return not_utf8(line) if b"\0" in line else ""


def _why(error: Exception, line: bytes) -> str:
    if b"\0" in line:
        return not_utf8(line)
    said = str(error).lower()
    if isinstance(error, UnicodeDecodeError) or "utf-8" in said:
        return "not UTF-8"
    if "surrogate" in said:
        return "a lone surrogate, which is not a character"
    return "not JSON"
