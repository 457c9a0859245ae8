"""WARC files of crawled pages: the main text of each page, by trafilatura; what is no page of status 200 is counted."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from typing import Any

from shards.common.optional import need
from shards.readers.base import DAMAGED, ReadPosition, Record, Rejected, Unit, shown
from shards.readers.codings import CodingError, decode
from shards.readers.compressed import DAMAGE
from shards.readers.files import stream
from shards.spec import Source
from shards.tokenization.records import Document

SUFFIXES = (".warc",)
LONGEST_PAGE = 8 << 20  # bytes of HTML
PAGES = ("text/html", "application/xhtml+xml")
_MARKUP = re.compile(rb"<(?:!doctype\s+html|html|head|body|title)\b", re.IGNORECASE)


def check(source: Source) -> None:
    """Raises SpecError where a library is missing."""
    need("warcio", f'source "{source.name}": origin {source.origin}')
    if source.origin == "warc":
        need("trafilatura", f'source "{source.name}": origin warc')
        need("brotli", f'source "{source.name}": origin warc')


def read(source: Source, unit: Unit, reading: ReadPosition) -> Iterator[Record]:
    """The pages of a file. Records that answer nothing (requests, metadata, the file's own information) are no records of text."""
    for path in unit.paths:
        yield from records(path, reading, "response", _page)


class _Eager:
    """A stream whose reads give what is there: so damage takes away only what comes after it."""

    def __init__(self, file: io.BufferedReader[Any]) -> None:
        self.read = file.read1
        self.close = file.close


def records(path: str, reading: ReadPosition, kind: str, take: Callable[[str, Any], Record]) -> Iterator[Record]:
    """What `take` makes of (path, record) for each of warcio's records of a kind, and a Rejected where the file is damaged."""
    iterator = need("warcio.archiveiterator", path)
    damage = (*DAMAGE, need("warcio.exceptions", path).ArchiveLoadFailed, ValueError)
    try:
        with stream(path, reading) as file:
            for record in _whole(iter(iterator.ArchiveIterator(_Eager(file)))):
                if record.rec_type == kind:
                    yield take(path, record)
    except damage as error:
        yield Rejected(path, DAMAGED, shown(str(error)), rest=True)


def _whole(iterator: Iterator[Any]) -> Iterator[Any]:
    """warcio's records; what it makes of headers that are cut off or mangled is told as damage too."""
    while True:
        try:
            record = next(iterator, None)
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise EOFError(f"a record's headers are damaged ({error})") from None
        if record is None:
            return
        yield record


def content(record: Any, most: int) -> bytes:
    """A record's content, not decoded; `most` bytes and one more at the most. Raises EOFError where the file ends within it."""
    source, parts, left = _dechunked(record, 2 * most), [], most + 1
    while left and (part := source.read(left)):
        parts.append(part)
        left -= len(part)
    if left and getattr(record.raw_stream, "limit", 0) and not record.raw_stream.read(1):
        raise EOFError("it ends within a record")
    return b"".join(parts)


def _dechunked(record: Any, most: int) -> Any:
    """A record's content without chunks (RFC 9112, section 7.1). warcio takes a whole chunk into memory, so that is bounded."""
    headers = record.http_headers
    if headers is None or (headers.get_header("Transfer-Encoding") or "").strip().lower() != "chunked":
        return record.raw_stream
    bounded = need("warcio.limitreader", "origin warc").LimitReader(record.raw_stream, most)
    return need("warcio.bufferedreaders", "origin warc").ChunkedDataReader(bounded)


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
    raw = content(record, LONGEST_PAGE)
    coding = headers.get_header("Content-Encoding") or ""
    if coding and not _is_plain(raw):
        try:
            raw = decode(raw, coding, LONGEST_PAGE)
        except CodingError as error:
            return Rejected(where, str(error), shown(raw[:256]))
    if len(raw) > LONGEST_PAGE:
        return Rejected(where, f"longer than {LONGEST_PAGE >> 20} MiB", shown(raw[:256]))
    if not kind and not _MARKUP.search(raw, 0, 4096):
        return Rejected(where, "not HTML", shown(raw))
    text = main_text(raw)
    return Document(url, (text,), (), where) if text else Rejected(where, "no main text", shown(raw))


def _is_plain(raw: bytes) -> bool:
    """Whether a page is markup as it stands: crawlers decode pages, and may leave the header that tells how they came."""
    return raw[:64].removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"<" and _MARKUP.search(raw, 0, 4096) is not None


def main_text(html: bytes) -> str:
    """The main text of a page as trafilatura finds it, comments left out; "" if it finds none."""
    # Not `deduplicate`: it remembers earlier pages, and what came out would depend on who read them.
    trafilatura = need("trafilatura", "origin warc")
    try:
        return trafilatura.extract(html, favor_precision=True, include_comments=False, deduplicate=False) or ""
    except (ValueError, RecursionError, AttributeError, UnicodeError):  # of pages that its parser cannot read
        return ""
