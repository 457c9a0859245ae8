"""WET files: Common Crawl's own text of each page."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from shards.readers.base import LONGEST_RECORD, ReadPosition, Record, Rejected, Unit, decoded, shown
from shards.readers.warc import address, check, content, records
from shards.spec import Source
from shards.tokenization.records import Document

__all__ = ["KINDS", "OPTIONS", "SUFFIXES", "check", "read"]
SUFFIXES = (".wet", ".warc.wet")
KINDS = ("text",)
OPTIONS = ("suffixes",)


def read(source: Source, unit: Unit, reading: ReadPosition) -> Iterator[Record]:
    """The texts of a file."""
    for path in unit.paths:
        yield from records(path, reading, "conversion", _text)


def _text(path: str, record: Any) -> Record:
    url = address(path, record)
    where = f"{path}: {url}"
    raw = content(record, LONGEST_RECORD)
    text, wrong = decoded(raw) if len(raw) <= LONGEST_RECORD else ("", f"longer than {LONGEST_RECORD >> 20} MiB")
    return Rejected(where, wrong, shown(raw)) if wrong else Document(url, (text,), (), where)
