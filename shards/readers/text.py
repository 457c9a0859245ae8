"""Text and Markdown: each file is a document; a very large file is split at line ends."""

from __future__ import annotations

import io
from collections.abc import Iterator

from shards.readers.base import DAMAGED, LONGEST_RECORD, ReadPosition, Record, Rejected, Unit, decoded
from shards.readers.compressed import DAMAGE
from shards.readers.files import stream
from shards.spec import Source
from shards.tokenization.records import Document

SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst")
KINDS = ("text",)
OPTIONS = ("suffixes",)
PIECE = LONGEST_RECORD // 4  # bytes after which a document ends at the next line end


def read(source: Source, unit: Unit, reading: ReadPosition) -> Iterator[Record]:
    """A file's text."""
    for path in unit.paths:
        try:
            with stream(path, reading) as file:
                for piece in pieces(file):
                    if isinstance(piece, Rejected):
                        yield Rejected(path, piece.reason, piece.record, rest=True)
                    else:
                        yield _document(path, piece)
        except DAMAGE as error:
            yield Rejected(path, DAMAGED, str(error), rest=True)


def pieces(file: io.BufferedReader) -> Iterator[bytes | Rejected]:
    """A file's bytes, in pieces that end with a line; or, in a line that has no end, with a character."""
    left = b""
    while True:
        piece, error = _fill(file, left, PIECE)
        if error is None and len(piece) >= PIECE and not piece.endswith(b"\n"):
            try:
                piece += file.readline(LONGEST_RECORD - len(piece))
            except DAMAGE as damage:
                error = damage
        left = b""
        if len(piece) >= LONGEST_RECORD and not piece.endswith(b"\n"):
            end = _last_character(piece)
            piece, left = piece[:end], piece[end:]
        if piece:
            yield piece
        if error is not None:
            yield Rejected("", DAMAGED, str(error), rest=True)
            return
        if not piece:
            return


def _fill(file: io.BufferedReader, begun: bytes, size: int) -> tuple[bytes, Exception | None]:
    """Read up to so many bytes; data before a damage is not lost."""
    parts, have = [begun], len(begun)
    try:
        while have < size and (block := file.read1(min(1 << 20, size - have))):
            parts.append(block)
            have += len(block)
    except DAMAGE as error:
        return b"".join(parts), error
    return b"".join(parts), None


def _last_character(piece: bytes) -> int:
    """Where the last whole character of UTF-8 ends."""
    start = len(piece) - 1
    while start > len(piece) - 4 and piece[start] & 0xC0 == 0x80:
        start -= 1
    lead = piece[start]
    length = 1 if lead < 0x80 else 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
    return start if start + length > len(piece) else len(piece)


def _document(path: str, raw: bytes) -> Record:
    text, wrong = decoded(raw)
    if wrong:
        return Rejected(path, wrong, _place(raw))
    return Document(text, (text,), (), path)


def _place(raw: bytes) -> str:
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return f"{error.reason} at byte {error.start}"
    return ""
