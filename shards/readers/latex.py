"""LaTeX: each paper is a document, from directories of sources and from arXiv's archives (.tar.gz, or one file in .gz)."""

from __future__ import annotations

import io
import posixpath
import re
import tarfile
from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from shards.readers.base import DAMAGED, LONGEST_RECORD, ReadPosition, Record, Rejected, Unit, shown
from shards.readers.compressed import COMPRESSED, DAMAGE, plain_name
from shards.readers.files import InputFile, stream
from shards.readers.hidden import is_hidden
from shards.readers.texlexer import lexed, own_names
from shards.readers.texmacros import MacroError, collect, expand
from shards.readers.textext import body_text
from shards.spec import Source
from shards.tokenization.records import Document

SUFFIXES = (".tex", ".ltx", ".tar", ".tgz", ".gz")
KINDS = ("text",)
OPTIONS = ()
SOURCES = (".tex", ".ltx", ".latex", ".txt")
LARGEST_SOURCE = LONGEST_RECORD // 2  # bytes of all a paper's .tex files
DEEPEST = 16  # levels of \input
_INPUT = re.compile(
    r"\\(@?input|include|subfile|subfileinclude)\s*\{\s*([^{}\n]+?)\s*\}"
    r"|\\(?:sub)?(?:import|inputfrom|includefrom)\*?\s*\{([^{}\n]*)\}\s*\{([^{}\n]+)\}|\\input\s+([^\s{}\\]+)"
)
_INPUT_PATH = re.compile(r"\\def\s*\\input@path\s*\{((?:\s*\{[^{}]*\})+)\s*\}")
_INCLUDE_ONLY = re.compile(r"\\includeonly\s*\{([^{}]*)\}")
_CLASS = re.compile(r"\\document(?:class|style)\b")
_BODY = re.compile(r"\\begin\s*\{document\}")
_END = re.compile(r"\\end\s*\{document\}")


def wanted(name: str) -> bool:
    """Whether a file is LaTeX or may hold some."""
    name = name.lower()
    if name.endswith(".gz") and not PurePath(name.removesuffix(".gz")).suffix.strip(".0123456789v"):
        return True  # arXiv's: 2401.01234v2.gz
    return name.endswith((".tex", ".ltx", ".tex.gz", ".tar", ".tgz", *(f".tar{end}" for end in COMPRESSED)))


def units(source: Source, found: list[InputFile]) -> list[Unit]:
    """Each archive; and each highest directory with .tex files in it, with all that are beneath it."""
    archives = [each for each in found if not _is_source(each.path)]
    trees: dict[str, list[InputFile]] = {}
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


def read(source: Source, unit: Unit, reading: ReadPosition) -> Iterator[Record]:
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
            parts = posixpath.normpath(member.name).split("/")
            if member.isfile() and member.name.lower().endswith(SOURCES) and not is_hidden(parts, dotted=False):
                content = archive.extractfile(member)
                if content is not None:
                    raw = _limited(content, room)
                    room -= len(raw)
                    yield posixpath.normpath(member.name), raw


def _decoded(raw: bytes) -> str:
    """The text, as UTF-8, else as Latin-1, which most older sources use and which decodes every byte."""
    try:
        return raw.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError:
        return raw.decode("latin-1").replace("\r\n", "\n").replace("\r", "\n")


def papers(where: str, files: dict[str, str]) -> Iterator[Record]:
    """The documents in a paper's files."""
    kept: list[str] = []
    bare = _bare(files, kept)
    mains = [name for name, text in bare.items() if _CLASS.search(text)]
    if not mains and len(bare) == 1:
        mains = list(bare)  # plain TeX
    tree = _Tree(bare)
    included = tree.included(mains)
    mains = [name for name in mains if name not in included] or mains
    if not mains:
        yield Rejected(where, "no file with a document class", ", ".join(files)[:200])
    for name in mains:
        place = where if len(mains) == 1 else f"{where}: {name}"
        try:
            text = _paper(tree.inlined(name), kept)
        except (MacroError, RecursionError) as error:
            yield Rejected(place, "macros that do not terminate", shown(str(error)))
            continue
        if text.strip():
            yield Document(text, (text,), (), place)
        else:
            yield Rejected(place, "empty", "")


def _bare(files: dict[str, str], kept: list[str]) -> dict[str, str]:
    """The files without comments and verbatim text. Each is read where it is included: what is verbatim depends on that."""
    own, tree = own_names(files.values()), _Tree(files)
    bare: dict[str, str] = {}

    def lex(name: str, main: str, short: set[str], depth: int) -> None:
        if not name or name in bare or depth > DEEPEST:
            return

        def including(text: str, at: int) -> None:
            if (found := _INPUT.match(text, at)) is not None:
                lex(tree.find(found, name, main), main, short, depth + 1)

        bare[name] = ""  # it does not include itself
        bare[name] = lexed(files[name], kept, short, own, including)

    classes = [name for name, text in sorted(files.items()) if _CLASS.search(text)]
    included = tree.included(classes)
    for name in (*(name for name in classes if name not in included), *sorted(files)):
        lex(name, name, set(), 0)
    return dict(sorted(bare.items()))


class _Tree:
    """A paper's files, which include each other; nothing outside of them is ever read."""

    def __init__(self, files: dict[str, str]) -> None:
        self._files = files
        paths = (path for text in files.values() for path in _INPUT_PATH.findall(text))
        self._paths = list(dict.fromkeys(path.strip() for each in paths for path in re.findall(r"\{([^{}]*)\}", each)))

    def included(self, mains: list[str]) -> set[str]:
        """The files that main files include, and those that these include."""
        found: set[str] = set()
        for main in mains:
            seen, left = {main}, [main]
            while left:
                name = left.pop()
                targets = {self.find(each, name, main) for each in _INPUT.finditer(self._files[name])} - seen - {""}
                seen |= targets
                left += targets
            found |= seen - {main}
        return found

    def find(self, found: re.Match[str], name: str, main: str) -> str:
        """The file that an \\input in file `name` means; "" for one that is not there (a package's own, as a rule).

        main: the paper's main file, in whose directory TeX runs.
        """
        target = (found[2] or found[5] or posixpath.join(found[3] or "", (found[4] or "").lstrip("/"))).strip().strip('"')
        top = posixpath.dirname(main)
        for base in (top, *(posixpath.join(top, path) for path in self._paths), "", posixpath.dirname(name), *self._paths):
            for end in ("", ".tex", ".ltx"):
                path = posixpath.normpath(posixpath.join(base, target + end))
                if path in self._files:
                    return path
        return ""

    def inlined(self, name: str) -> str:
        """A main file with all that it includes. Raises MacroError where that does not come to an end."""
        only = _INCLUDE_ONLY.search(self._files[name])
        chosen = None if only is None else frozenset(each.strip().removesuffix(".tex") for each in only[1].split(","))
        return self._inlined(name, (), [LONGEST_RECORD], chosen)

    def _inlined(self, name: str, inside: tuple[str, ...], room: list[int], only: frozenset[str] | None) -> str:
        """only: the \\include that count, where not all do."""
        text = self._files[name]
        room[0] -= len(text)
        if room[0] < 0:
            raise MacroError("files that include each other in a circle")
        if _CLASS.search(text) and inside:
            begin, end = _BODY.search(text), _END.search(text)  # of a subfile its body
            text = text[begin.end() if begin else 0 : end.start() if end else len(text)]

        def replaced(found: re.Match[str]) -> str:
            if found[1] == "include" and only is not None and found[2].strip().removesuffix(".tex") not in only:
                return ""
            target = self.find(found, name, inside[0] if inside else name)
            if not target or target in (*inside, name) or len(inside) >= DEEPEST:
                return ""
            return self._inlined(target, (*inside, name), room, only)

        return _INPUT.sub(replaced, text)


def _paper(whole: str, kept: list[str]) -> str:
    begin = _BODY.search(whole)
    preamble, body = (whole[: begin.start()], whole[begin.end() :]) if begin else ("", whole)
    end = _END.search(body)
    body = body[: end.start()] if end else body
    macros = collect(whole)
    return body_text(expand(preamble, macros, title_only=True), expand(body, macros), kept)
