"""Finds the line on which a key of a TOML text stands, so that an error can name it."""

from __future__ import annotations

import re

_HEADER = re.compile(r"^\s*(\[\[?)\s*([^\]]+?)\s*\]\]?\s*(#.*)?$")
_KEY = re.compile(r"""^\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")
_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")

Path = tuple[str | int, ...]


def key_lines(text: str) -> dict[Path, int]:
    """Maps each key's path (`("stage", 1, "lr")`) and each table's path to its line, counted from 1.

    Reads TOML line by line and passes over multi-line strings and arrays. Keys inside inline tables share their parent's line.
    """
    lines: dict[Path, int] = {}
    arrays: dict[Path, int] = {}
    table: Path = ()
    closing: str | None = None
    depth = 0
    for number, line in enumerate(text.splitlines(), 1):
        if closing is not None:
            if closing in line:
                closing = None
            continue
        if depth > 0:
            depth += _depth(line)
            continue
        header = _HEADER.match(line)
        if header and not _KEY.match(line):
            names = [_plain(p) for p in _PART.findall(header.group(2))]
            table = _resolve(names, arrays, header.group(1) == "[[")
            lines.setdefault(table, number)
            continue
        key = _KEY.match(line)
        if key is None:
            continue
        path = (*table, *(_plain(p) for p in _PART.findall(key.group(1))))
        lines[path] = number
        value = line[key.end() :]
        for quote in ('"""', "'''"):
            if value.count(quote) == 1:
                closing = quote
        if closing is None:
            depth = _depth(value)
    return lines


def line_of(lines: dict[Path, int], path: Path) -> int | None:
    """The line of the key, or of the nearest thing that holds it."""
    while path:
        if path in lines:
            return lines[path]
        path = path[:-1]
    return None


def _resolve(names: list[str], arrays: dict[Path, int], appends: bool) -> Path:
    path: Path = ()
    for i, name in enumerate(names):
        path = (*path, name)
        if appends and i == len(names) - 1:
            arrays[path] = arrays.get(path, -1) + 1
        if path in arrays:
            path = (*path, arrays[path])
    return path


def _plain(part: str) -> str:
    return part[1:-1] if part[:1] in "\"'" else part


def _depth(text: str) -> int:
    """Brackets opened less brackets closed, outside strings and comments."""
    bare = re.sub(r'"(?:\\.|[^"\\])*"|\'[^\']*\'', "", text).split("#", 1)[0]
    return bare.count("[") + bare.count("{") - bare.count("]") - bare.count("}")
