"""CSV and TSV: a record a row, whose fields the header row names (RFC 4180).

Files that end in `.tsv` or `.tab` have tabs between fields, others commas. A row with another number of fields than the header is
left out. Where a quote is not closed, everything after it might belong to one field, so the rest of the file is left out: what a
lenient reader makes of it is not what was written.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator

from shards.readers.base import DAMAGED, LONGEST_RECORD, ReadPosition, Record, Rejected, Unit, not_utf8, shown
from shards.readers.compressed import COMPRESSED, DAMAGE
from shards.readers.files import stream
from shards.readers.layouts import Placed, documents
from shards.spec import Source

SUFFIXES = (".csv", ".tsv", ".tab")
KINDS = ("text", "sft", "preference", "unpaired")
OPTIONS = ("layout", "suffixes")
TABS = (".tsv", ".tab")
LIKELY = (",", "\t", ";", "|")
"""Delimiters that a header of one field is looked through for."""
TOO_LONG = f"longer than {LONGEST_RECORD >> 20} MiB, or a quote that is not closed"


def read(source: Source, unit: Unit, reading: ReadPosition) -> Iterator[Record]:
    """A file's rows as documents."""
    for path in unit.paths:
        try:
            with stream(path, reading) as raw:
                yield from documents(_rows(path, raw), source)
        except DAMAGE as error:
            yield Rejected(path, DAMAGED, str(error), rest=True)


def _rows(path: str, raw: io.BufferedReader) -> Iterator[Placed]:
    head = raw.peek(4)[:4]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head:
        yield Rejected(path, not_utf8(raw.read(1 << 12)), shown(head), rest=True)
        return
    csv.field_size_limit(LONGEST_RECORD)
    # Bytes that are no UTF-8 become surrogates, so that they reject their row and not the file.
    text = io.TextIOWrapper(raw, "utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(_lines(text), delimiter="\t" if _is_tabbed(path) else ",", strict=True)
    names: list[str] | None = None
    try:
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if not row:
                continue  # an empty line
            if names is None:
                if (problem := _problem(row)) is not None:
                    yield Rejected(path, problem, shown(", ".join(row)), rest=True)
                    return
                names = row
            elif len(row) != len(names):
                yield Rejected(where, f"{len(row)} fields where the header has {len(names)}", shown(", ".join(row)))
            elif any(not each.isascii() and not _is_text(each) for each in row):
                yield Rejected(where, "not UTF-8", shown(", ".join(row)))
            else:
                yield where, dict(zip(names, row, strict=True))
    except csv.Error as error:
        yield Rejected(f"{path}:{rows.line_num}", f"not CSV: {error}", "", rest=True)
    except DAMAGE as error:
        yield Rejected(path, DAMAGED, str(error), rest=True)


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    """Lines; one that is too long for a record is an error, not so much memory."""
    while line := text.readline(LONGEST_RECORD + 1):
        if len(line) > LONGEST_RECORD:
            raise csv.Error(TOO_LONG)
        yield line


def _is_tabbed(path: str) -> bool:
    name = path.partition("?")[0].lower()
    for end in COMPRESSED:
        name = name.removesuffix(end)
    return name.endswith(TABS)


def _problem(header: list[str]) -> str | None:
    """Why a header names no fields."""
    if len(header) == 1 and (others := [each for each in LIKELY if each in header[0]]):
        named = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars"}[others[0]]
        return f"a header of one field that has {named} in it (commas are read, or tabs in .tsv files; convert it)"
    twice = next((name for number, name in enumerate(header) if name in header[:number]), None)
    if twice is not None:
        return f'two fields are named "{shown(twice)}"'
    if any(not _is_text(name) for name in header):
        return "not UTF-8"
    return None


def _is_text(field: str) -> bool:
    try:
        field.encode()
    except UnicodeEncodeError:
        return False
    return True
