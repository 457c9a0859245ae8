"""What all readers share: the unit that is read as one, how far it was read, and what is rejected.

A reader is a module with

    SUFFIXES                       endings of the files that are read in a directory
    KINDS                          kinds of source that it can be: text, sft, preference
    OPTIONS                        keys of a source that it takes, of `shards.spec.build_spec.NOT_FOR_ALL`
    read(source, unit, reading)    a unit's records in order: `Document` or `Rejected`; moves `reading.done`

and, where it wants them, `units(source, files)` (what is read as one, if not a file), `wanted(name)` (in place of endings),
`check(source)` (raises SpecError where a library is missing) and `DOTTED_ARE_HIDDEN = False`. A package can bring one by the entry
point `midwatch.readers`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from shards.tokenization.records import Document

LONGEST_RECORD = 64 << 20  # bytes of one line, and of one file's document
KEPT_ASIDE = 4096  # characters of a broken record that are kept
LOOKED_AT = 4096  # bytes from which the encoding is detected
DAMAGED = "damaged file, read up to the damage"
NULS = "NUL characters, which no text has"
SPECIAL = re.compile(r"[*?\[]")  # what makes a path a glob


@dataclass(frozen=True, slots=True)
class Rejected:
    """A record that cannot be used as a document."""

    where: str  # file and line
    reason: str
    record: str  # its beginning
    rest: bool = False  # the file is broken: the rest of it, or all of it, is lost


@dataclass(frozen=True, slots=True)
class Unit:
    """What one process reads at a time: usually a file; or a repository, a paper, a dump."""

    name: str  # for people: the path, or the directory
    size: int  # bytes as stored; 0 where unknown
    paths: tuple[str, ...]  # local paths or URLs


@dataclass
class ReadPosition:
    """How far a source was read; readers update `done`."""

    unit: str = "bytes"
    total: int = 0
    done: int = 0
    paths: list[Path] = field(default_factory=list)


Record = Document | Rejected


def shown(raw: bytes | str) -> str:
    """The beginning of a broken record, as text that can be encoded as UTF-8."""
    if isinstance(raw, str):
        return raw[:KEPT_ASIDE].encode("utf-8", errors="backslashreplace").decode()
    return raw[:KEPT_ASIDE].decode("utf-8", errors="backslashreplace")


def decoded(raw: bytes) -> tuple[str, str]:
    """(text, "") of UTF-8 with or without a byte order mark, else ("", the reason). NULs are refused: they mean UTF-16."""
    if b"\0" in raw:
        return "", not_utf8(raw)
    try:
        return raw.decode("utf-8-sig"), ""
    except UnicodeDecodeError:
        return "", not_utf8(raw)


def not_utf8(raw: bytes) -> str:
    """The reason for bytes that are not UTF-8 text. UTF-16 and UTF-32 are detected by byte order marks, or by their NULs."""
    zeros = [raw[place:LOOKED_AT:4].count(0) * 4 / max(1, len(raw[:LOOKED_AT])) for place in range(4)]
    even, odd = (zeros[0] + zeros[2]) / 2, (zeros[1] + zeros[3]) / 2
    if raw.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")) or (len(raw) >= 8 and max(min(zeros[:2]), min(zeros[2:])) > 0.9):
        return "not UTF-8 but UTF-32 (convert it with iconv)"
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")) or (max(even, odd) > 0.1 and min(even, odd) < 0.01):
        return "not UTF-8 but UTF-16 (convert it with iconv)"
    return NULS if b"\0" in raw else "not UTF-8"
