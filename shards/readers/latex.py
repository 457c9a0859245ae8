"""LaTeX: a paper a document, from trees of sources and from arXiv's archives (.tar.gz, or one file in .gz)."""

from __future__ import annotations

import io
import posixpath
import re
import tarfile
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from shards.readers.base import DAMAGED, LONGEST_RECORD, Reading, Record, Rejected, Unit, shown
from shards.readers.compressed import COMPRESSED, DAMAGE, plain_name
from shards.readers.files import Found, stream
from shards.readers.texmacros import MacroError, collect, expand
from shards.readers.textext import body_text
from shards.records import Document
from shards.spec import Source

SUFFIXES = (".tex", ".ltx", ".tar", ".tgz", ".gz")
SOURCES = (".tex", ".ltx", ".latex", ".txt")
LARGEST_SOURCE = LONGEST_RECORD // 2  # bytes of all a paper's .tex files
DEEPEST = 16  # levels of \input
_QUOTED = re.compile(
    r"\\begin\{(verbatim\*?|lstlisting|minted|Verbatim|alltt)\}.*?\\end\{\1\}|\\verb\*?([^\sa-zA-Z*])[^\n]*?\2"
    r"|(\\.)|(%[^\n]*(?:\n[ \t]*)?)",
    re.DOTALL,
)
"""Verbatim, an escaped character, or a comment, whichever begins first."""
_COMMENT_ENVIRONMENT = re.compile(r"\\begin\{comment\}.*?\\end\{comment\}|\\iffalse\b.*?\\fi\b", re.DOTALL)
_INPUT = re.compile(
    r"\\(?:input|include|subfile)\s*\{\s*([^{}\n]+?)\s*\}|\\(?:sub)?import\s*\{([^{}\n]*)\}\s*\{([^{}\n]+)\}|\\input\s+([^\s{}\\]+)"
)
_CLASS = re.compile(r"\\document(?:class|style)\b")
_BODY = re.compile(r"\\begin\s*\{document\}")
_END = re.compile(r"\\end\s*\{document\}")


def wanted(name: str) -> bool:
    """Whether a file is LaTeX or may hold some."""
    name = name.lower()
    if name.endswith(".gz") and not PurePath(name.removesuffix(".gz")).suffix.strip(".0123456789v"):
        return True  # arXiv's: 2401.01234v2.gz
    return name.endswith((".tex", ".ltx", ".tex.gz", ".tar", ".tgz", *(f".tar{end}" for end in COMPRESSED)))


def units(source: Source, found: list[Found]) -> list[Unit]:
    """Each archive; and each highest directory with .tex files in it, with all that are beneath it."""
    archives = [each for each in found if not _is_source(each.path)]
    trees: dict[str, list[Found]] = {}
    for each in sorted((each for each in found if _is_source(each.path)), key=lambda each: (each.path.count("/"), each.path)):
        top = posixpath.dirname(each.path)
        while top and top not in trees and posixpath.dirname(top) != top:
            top = posixpath.dirname(top)
        trees.setdefault(top if top in trees else posixpath.dirname(each.path), []).append(each)
    made = [Unit(each.path, each.size, (each.path,)) for each in archives]
    for top, tree in trees.items():
        name = tree[0].path if len(tree) == 1 else top
        made.append(Unit(name, sum(each.size for each in tree), tuple(sorted(each.path for each in tree))))
    return sorted(made, key=lambda unit: unit.name)


def _is_source(path: str) -> bool:
    return path.lower().endswith((".tex", ".ltx"))


def read(source: Source, unit: Unit, reading: Reading) -> Iterator[Record]:
    """The documents of a unit: one for each main file, that is one with a document class which no other file includes."""
    files: dict[str, str] = {}
    top = unit.name if len(unit.paths) > 1 else posixpath.dirname(unit.name)
    for path in unit.paths:
        try:
            with stream(path, reading) as file:
                taken = [(path.removeprefix(top).lstrip("/"), _limited(file))] if _is_source(path) else _members(path, file)
                files.update((name, _decoded(raw)) for name, raw in taken)
        except (*DAMAGE, tarfile.TarError, _TooLarge) as error:
            reason = f"longer than {LARGEST_SOURCE >> 20} MiB" if isinstance(error, _TooLarge) else DAMAGED
            yield Rejected(path, reason, shown(str(error)), rest=True)
            return
    yield from papers(unit.name, files)


class _TooLarge(Exception):
    pass


def _limited(file: Any, room: int = LARGEST_SOURCE) -> bytes:
    raw: bytes = file.read(room + 1)
    if len(raw) > room:
        raise _TooLarge
    return raw


def _members(path: str, file: io.BufferedReader[Any]) -> Iterator[tuple[str, bytes]]:
    """The .tex files of an archive, or the one file that a .gz is. Nothing is unpacked to the disk."""
    if b"ustar" not in file.peek(512)[257:265] and not path.endswith((".tar", ".tgz")) and not plain_name(path).endswith(".tar"):
        yield "main.tex", _limited(file)
        return
    room = LARGEST_SOURCE
    with tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            if member.isfile() and member.name.lower().endswith(SOURCES):
                content = archive.extractfile(member)
                if content is not None:
                    raw = _limited(content, room)
                    room -= len(raw)
                    yield posixpath.normpath(member.name), raw


def _decoded(raw: bytes) -> str:
    """UTF-8, else Latin-1, in which most older sources are, and in which every byte is a character."""
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return raw.decode("latin-1").replace("\r\n", "\n").replace("\r", "\n")


def papers(where: str, files: dict[str, str]) -> Iterator[Record]:
    """The documents in a paper's files."""
    kept: list[str] = []
    bare = {name: _bare(text, kept) for name, text in sorted(files.items())}
    mains = [name for name, text in bare.items() if _CLASS.search(text)]
    if not mains and len(bare) == 1:
        mains = list(bare)  # plain TeX
    included = {found for text in bare.values() for each in _INPUT.finditer(text) for found in [_find(each, "", bare)] if found}
    mains = [name for name in mains if name not in included] or mains
    if not mains:
        yield Rejected(where, "no file with a document class", ", ".join(files)[:200])
    for name in mains:
        place = where if len(mains) == 1 else f"{where}: {name}"
        try:
            text = _paper(name, bare, kept)
        except (MacroError, RecursionError) as error:
            yield Rejected(place, "macros that do not come to an end", shown(str(error)))
            continue
        if text.strip():
            yield Document(text, (text,), (), place)
        else:
            yield Rejected(place, "empty", "")


def _bare(text: str, kept: list[str]) -> str:
    """Without comments; what is verbatim is set aside, as `%` means itself there."""
    text = text.replace("\ue000", "").replace("\ue001", "")

    def replaced(found: re.Match[str]) -> str:
        if found[3]:
            return found[3]
        if found[4]:
            # A comment takes its line's end and the next line's indentation with it; but an empty line still ends a paragraph,
            # and after a blank a line's end is no more than another one.
            ends = text[found.end() : found.end() + 1] == "\n" or text[max(0, found.start() - 1) : found.start()] in (" ", "\t")
            return "\n" if ends and not _begins_line(text, found.start()) else ""
        kept.append(found[0])
        return f"\ue000{len(kept) - 1}\ue001"

    return _COMMENT_ENVIRONMENT.sub("", _QUOTED.sub(replaced, text))


def _begins_line(text: str, at: int) -> bool:
    while at > 0 and text[at - 1] in " \t":
        at -= 1
    return at == 0 or text[at - 1] == "\n"


def _find(found: re.Match[str], directory: str, files: dict[str, str]) -> str:
    """The file that an \\input means; "" for one that is not there (a package's own, as a rule)."""
    name = found[1] or found[4] or posixpath.join(found[2] or "", found[3] or "")
    for base in ("", directory):
        for end in ("", ".tex", ".ltx"):
            path = posixpath.normpath(posixpath.join(base, name.strip('"') + end))
            if path in files:
                return path
    return ""


def _inlined(name: str, files: dict[str, str], inside: tuple[str, ...], room: list[int]) -> str:
    text = files[name]
    room[0] -= len(text)
    if room[0] < 0:
        raise MacroError("files that include each other again and again")
    if _CLASS.search(text) and inside:
        begin, end = _BODY.search(text), _END.search(text)  # of a subfile its body
        text = text[begin.end() if begin else 0 : end.start() if end else len(text)]

    def replaced(found: re.Match[str]) -> str:
        target = _find(found, posixpath.dirname(name), files)
        if not target or target in (*inside, name) or len(inside) >= DEEPEST:
            return ""
        return _inlined(target, files, (*inside, name), room)

    return _INPUT.sub(replaced, text)


def _paper(name: str, files: dict[str, str], kept: list[str]) -> str:
    whole = _inlined(name, files, (), [LONGEST_RECORD])
    begin = _BODY.search(whole)
    preamble, body = (whole[: begin.start()], whole[begin.end() :]) if begin else ("", whole)
    end = _END.search(body)
    body = body[: end.start()] if end else body
    macros = collect(whole)
    return body_text(expand(preamble, macros, title_only=True), expand(body, macros), kept)
