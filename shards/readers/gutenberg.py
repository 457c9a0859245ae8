"""Books of Project Gutenberg: each .txt is a document, without header, licence and transcriber's notes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from shards.readers.base import DAMAGED, LONGEST_RECORD, ReadPosition, Record, Rejected, Unit, decoded, shown
from shards.readers.compressed import DAMAGE
from shards.readers.files import stream
from shards.spec import Source
from shards.tokenization.records import Document

SUFFIXES = (".txt",)
KINDS = ("text",)
OPTIONS = ("suffixes",)
HEADER = 60_000  # characters within which a header ends; that of the 1990s has about 12,000
_START = re.compile(
    # Since 2000; a long title goes on in the next line.
    r"^[ \t]*\*{2,}[ \t]*START[ \t]*OF[ \t]*(?:THE|THIS)[ \t]*PROJECT[ \t]*GUTENBERG[^\n]*?(?:\n[^\n*]+)?\*{2,}[^\n]*$"
    r"|^[ \t]*\*END[ \t*]*THE[ \t]*SMALL[ \t]*PRINT![^\n]*(?:\n[^\n]*\*END\*[^\n]*)?$"  # the 1990s
    r"|^[ \t]*\*{3}[ \t]*START[ \t]*OF[^\n]*(?:EBOOK|ETEXT)[^\n]*$",
    re.MULTILINE | re.IGNORECASE,
)
_END = re.compile(
    r"^[ \t]*\*{2,}[ \t]*END[ \t]*OF[ \t]*(?:THE|THIS)[ \t]*PROJECT[ \t]*GUTENBERG[^\n]*$"
    r"|^[ \t]*\*{3}[ \t]*END[ \t]*OF[^\n]*(?:EBOOK|ETEXT)[^\n]*$"
    r"|^[ \t*]*(?:THE[ \t]+)?END[ \t]+OF[ \t]+(?:THE[ \t]+|THIS[ \t]+)?PROJECT[ \t]+GUTENBERG[^\n]*$"
    r"|^[ \t*]*THIS[ \t]+IS[ \t]+THE[ \t]+END[ \t]+OF[ \t]+PROJECT[ \t]+GUTENBERG[^\n]*$"
    r"|^[ \t]*\*{3}[ \t]*START[ \t]*:[ \t]*FULL[ \t]+LICENSE[^\n]*$",
    re.MULTILINE | re.IGNORECASE,
)
_OLD_SMALL_PRINT_AFTER = re.compile(r"^[ \t]*\*{3}START\*{2}THE SMALL PRINT!", re.MULTILINE | re.IGNORECASE)
_IS_GUTENBERG = re.compile(r"Project\s+Gutenberg", re.IGNORECASE)
_FIELD = r"^[ \t]*{}[ \t]*:[ \t]*(\S[^\n]*)$"
_CREDITS = re.compile(
    r"\A\s*(?:(?:This )?E-?text (?:was )?prepared by|Produced by|Transcribed (?:by|from)|Scanned (?:and|by)|Prepared by|"
    r"This (?:e-?text|e-?book) was (?:produced|prepared|created|transcribed))[^\n]*(?:\n(?!\s*\n)[^\n]*)*\n",
    re.IGNORECASE,
)
_NOTE_WORDS = r"Transcriber(?:'|’)?s?(?:'|’)?\s+notes?|Transcription\s+notes?|Notes?\s+of\s+the\s+transcriber"
_BRACKETED_NOTE = re.compile(rf"\[\s*(?:{_NOTE_WORDS})\b[^\[\]]*\][ \t]*\n?", re.IGNORECASE)
_RULE = r"[ \t]*[+*=_-]{5,}[+ \t]*"
_NOTE_BLOCK = re.compile(
    rf"^{_RULE}\n[|\s]*(?:{_NOTE_WORDS})(?:[^\n]*\n(?!{_RULE}$)){{0,60}}?[^\n]*\n{_RULE}$\n?",
    re.IGNORECASE | re.MULTILINE,
)
_NOTE_PARAGRAPH = re.compile(
    rf"^[ \t]*(?:{_NOTE_WORDS})[ \t]*[:.\-—][^\n]*(?:\n(?![ \t]*\n)[^\n]*)*\n*", re.IGNORECASE | re.MULTILINE
)
_LEGACY = {"iso-8859-1": "latin-1", "iso latin-1": "latin-1", "iso-latin-1": "latin-1", "latin-1": "latin-1", "latin1": "latin-1",
           "windows-1252": "cp1252", "cp-1252": "cp1252", "cp1252": "cp1252", "windows codepage 1252": "cp1252",
           "iso-8859-15": "iso-8859-15", "ascii": "ascii", "us-ascii": "ascii"}  # fmt: skip


def read(source: Source, unit: Unit, reading: ReadPosition) -> Iterator[Record]:
    """A book."""
    for path in unit.paths:
        try:
            with stream(path, reading) as file:
                raw = file.read(LONGEST_RECORD + 1)
        except DAMAGE as error:
            yield Rejected(path, DAMAGED, str(error), rest=True)
            continue
        if raw:
            yield _book(path, raw)


def _book(path: str, raw: bytes) -> Record:
    if len(raw) > LONGEST_RECORD:
        return Rejected(path, f"longer than {LONGEST_RECORD >> 20} MiB", shown(raw))
    text, wrong = _decoded(raw)
    if wrong:
        return Rejected(path, wrong, shown(raw))
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    header, body = without_licence(text)
    if body is None:
        return Rejected(path, "a Project Gutenberg header without an end", shown(text))
    body = without_notes(body).strip("\n")
    key = told("Title", header) or path
    return Document(key, (body + "\n" if body.strip() else "",), (), path, told("Language", header))


def _decoded(raw: bytes) -> tuple[str, str]:
    """UTF-8, or the encoding that the header names."""
    text, wrong = decoded(raw)
    if not wrong:
        return text, ""
    name = told("Character set encoding", raw[:HEADER].decode("latin-1").replace("\r\n", "\n")).lower()
    encoding = _LEGACY.get(name)
    try:
        return (raw.decode(encoding), "") if encoding else ("", wrong)
    except UnicodeDecodeError:
        return "", f"not {name}, which its header says it is"


def told(name: str, header: str) -> str:
    """A field of the header, such as Title or Language."""
    found = re.search(_FIELD.format(re.escape(name)), header, re.MULTILINE | re.IGNORECASE)
    return found[1].strip() if found else ""


def without_licence(text: str) -> tuple[str, str | None]:
    """(header, book); the book is None where the header does not end."""
    start, end = 0, len(text)
    last = None
    for last in _START.finditer(text, 0, HEADER):  # noqa: B007  # some have the small print's end after the marker
        pass
    if last is not None:
        start = last.end()
    for pattern in (_END, _OLD_SMALL_PRINT_AFTER):
        found = pattern.search(text, start)
        if found:
            end = min(end, found.start())
    if last is None and _IS_GUTENBERG.search(text, 0, 2000):
        return text[:HEADER], None
    return text[:start], text[start:end]


def without_notes(book: str) -> str:
    """Without the credits at the beginning and the notes that are marked as a transcriber's."""
    book = _CREDITS.sub("", book.lstrip("\n") + "\n", count=1)
    book = _NOTE_BLOCK.sub("", book)
    return _NOTE_PARAGRAPH.sub("", _BRACKETED_NOTE.sub("", book))
