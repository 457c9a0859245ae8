"""TOML as text, read and written; whatever is wrong with it is one error with a line."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any

from midwatch.recipe.toml_lines import Path as KeyPath
from shards.common.decoding import LARGEST, MOST_DIGITS


class TomlError(ValueError):
    """The text is not TOML; `line` counts from 1, 0 where it is not known."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(f"not valid TOML: {message}")
        self.line = line


def parse_toml(text: str) -> dict[str, Any]:
    """Raises TomlError."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"\(at line (\d+), column \d+\)", str(error))
        message = re.sub(r"\s*\(at .*\)$", "", str(error))
        raise TomlError(int(place.group(1)) if place else text.count("\n") + 1, message) from None
    except RecursionError:
        raise TomlError(0, "nested too deeply") from None
    except ValueError:  # Python converts no integer of more than 4,300 digits
        long = re.search(rf"\d{{{MOST_DIGITS}}}", text)
        raise TomlError(text.count("\n", 0, long.start()) + 1 if long else 0, "an integer has thousands of digits") from None


def too_large(raw: dict[str, Any]) -> Iterator[tuple[KeyPath, int]]:
    """Integers that do not fit in 64 bits, with the paths of their keys."""
    left: list[tuple[KeyPath, object]] = [((), raw)]  # not recursive: dotted keys nest deeper than Python's stack
    while left:
        path, value = left.pop()
        if isinstance(value, dict):
            left += [((*path, key), inner) for key, inner in value.items()]
        elif isinstance(value, list):
            left += [((*path, at), inner) for at, inner in enumerate(value)]
        elif isinstance(value, int) and not -LARGEST - 1 <= value <= LARGEST:
            yield path, value


def dump_toml(raw: dict[str, Any]) -> str:
    """What reads back as the same; None is left out."""
    out: list[str] = []
    _dump_table((), raw, out)
    return "\n".join(out).strip() + "\n"


def _dump_table(path: tuple[str, ...], table: dict[str, Any], out: list[str]) -> None:
    tables = {k: v for k, v in table.items() if isinstance(v, dict) and path == ()}
    arrays = {k: v for k, v in table.items() if isinstance(v, (list, tuple)) and v and all(isinstance(x, dict) for x in v)}
    for key, value in table.items():
        if key not in tables and key not in arrays and value is not None:
            out.append(f"{_bare(key)} = {_toml(value)}")
    for key, value in tables.items():
        out += ["", f"[{'.'.join((*path, _bare(key)))}]"]
        _dump_table((*path, _bare(key)), value, out)
    for key, items in arrays.items():
        for item in items:
            out += ["", f"[[{'.'.join((*path, _bare(key)))}]]"]
            _dump_table((*path, _bare(key)), item, out)


def _bare(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml(key)


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value) if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, str):
        escaped = "".join(_ESCAPES.get(c, c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}") for c in value)
        return f'"{escaped}"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(v) for v in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_bare(k)} = {_toml(v)}" for k, v in value.items() if v is not None) + "}"
    raise TypeError(type(value).__name__)


_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
