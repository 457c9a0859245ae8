"""WARC files of crawled pages: the main text of each page, by trafilatura; what is no page of status 200 is counted."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from shards.readers.base import DAMAGED, Reading, Record, Rejected, Unit, need, shown
from shards.readers.compressed import DAMAGE
from shards.readers.files import stream
from shards.records import Document
from shards.spec import Source

SUFFIXES = (".warc",)
LONGEST_PAGE = 8 << 20  # bytes of HTML
PAGES = ("text/html", "application/xhtml+xml")
_MARKUP = re.compile(rb"<(?:!doctype\s+html|html|head|body|title)\b", re.IGNORECASE)


def check(source: Source) -> None:
    """Raises SpecError where a library is missing."""
    need("warcio", f'source "{source.name}": origin {source.origin}')
    if source.origin == "warc":
        need("trafilatura", f'source "{source.name}": origin warc')


def read(source: Source, unit: Unit, reading: Reading) -> Iterator[Record]:
    """The pages of a file. Records that answer nothing (requests, metadata, the file's own information) are no records of text."""
    for path in unit.paths:
        for record in records(path, reading):
            if isinstance(record, Rejected):
                yield record
            elif record.rec_type == "response":
                yield _page(path, record)


def records(path: str, reading: Reading) -> Iterator[Any]:
    """warcio's records of a file, and a Rejected where it is damaged."""
    iterator = need("warcio.archiveiterator", path)
    damage = (*DAMAGE, need("warcio.exceptions", path).ArchiveLoadFailed, ValueError)
    try:
        with stream(path, reading) as file:
            yield from iterator.ArchiveIterator(file)
    except damage as error:
        yield Rejected(path, DAMAGED, shown(str(error)), rest=True)


def address(path: str, record: Any) -> str:
    """A record's URL, which is its key; the file's name for one that has none."""
    return (record.rec_headers.get_header("WARC-Target-URI") or "").strip("<>") or path


def _page(path: str, record: Any) -> Record:
    url = address(path, record)
    where = f"{path}: {url}"
    headers = record.http_headers
    status = headers.get_statuscode() if headers is not None else ""
    if status != "200":
        return Rejected(where, f"status {status}" if status else "no HTTP", "")
    told = record.rec_headers.get_header("WARC-Identified-Payload-Type") or headers.get_header("Content-Type") or ""
    kind = told.partition(";")[0].strip().lower()
    if kind and kind not in PAGES:
        return Rejected(where, "not HTML", kind[:200])
    raw = record.content_stream().read(LONGEST_PAGE + 1)
    if len(raw) > LONGEST_PAGE:
        return Rejected(where, f"longer than {LONGEST_PAGE >> 20} MiB", shown(raw))
    if not kind and not _MARKUP.search(raw, 0, 4096):
        return Rejected(where, "not HTML", shown(raw))
    text = main_text(raw)
    return Document(url, (text,), (), where) if text else Rejected(where, "no main text", shown(raw))


def main_text(html: bytes) -> str:
    """The main text of a page as trafilatura finds it, comments left out; "" if it finds none."""
    # Not `deduplicate`: it remembers earlier pages, and what came out would depend on who read them.
    from trafilatura import extract

    try:
        return extract(html, favor_precision=True, include_comments=False, deduplicate=False) or ""
    except (ValueError, RecursionError, AttributeError, UnicodeError):  # of pages that its parser cannot read
        return ""
