"""From builtins to structs, with errors that name the key and say the way out."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from midwatch.recipe.toml_lines import Path as KeyPath
from shards.common.decoding import shown

T = TypeVar("T")
KnownKeys = Callable[[dict[str, Any], KeyPath, list[str]], list[str]]
"""From the whole, a table's path and its struct's fields to the keys that the table may have."""


class ConversionError(ValueError):
    """A value is not of its key's type, or a key is unknown or missing; `path` is the key's."""

    def __init__(self, path: KeyPath, message: str) -> None:
        super().__init__(message)
        self.path = path


def converted(
    raw: dict[str, Any],
    kind: type[T],
    *,
    root: dict[str, Any] | None = None,
    prefix: KeyPath = (),
    known_keys: KnownKeys | None = None,
) -> T:
    """raw as the struct. Raises ConversionError.

    root, prefix: the whole of which raw is a part, and where it lies there, for messages. known_keys: for messages
    about an unknown key.
    """
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        path, message = _explain(str(error), raw if root is None else root, kind, prefix, known_keys or _fields)
        raise ConversionError(path, message) from None


def _fields(root: dict[str, Any], path: KeyPath, fields: list[str]) -> list[str]:
    return fields


def _explain(message: str, root: dict[str, Any], kind: type, prefix: KeyPath, known_keys: KnownKeys) -> tuple[KeyPath, str]:
    """Turns a message of msgspec's into the key's path and a sentence that says the way out."""
    where = re.search(r" - at `\$?(.*)`$", message)
    body = message[: where.start()] if where else message
    below: list[str | int] = []
    for name, index in re.findall(r"\.([A-Za-z0-9_-]+)|\[(\d+|\.\.\.)\]", where.group(1) if where else ""):
        below.append(name or (int(index) if index != "..." else "..."))
    path = [*prefix, *below]
    unknown = re.match(r"Object contains unknown field `(.*)`", body)
    label = ".".join(str(p) for p in path if not isinstance(p, int)) or "the recipe"
    if path and isinstance(_get(root, path), dict) and "name" in _get(root, path):
        label = f'{path[0]} "{_get(root, path)["name"]}"'
    if unknown:
        key, known = unknown.group(1), known_keys(root, tuple(path), _fields_at(kind, below))
        close = difflib.get_close_matches(key, known, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"known here: {', '.join(sorted(known))}"
        return (*path, key), f"{label}: unknown key {key!r} ({hint})"
    missing = re.match(r"Object missing required field `(.*)`", body)
    if missing:
        return tuple(path), f"{label}: the key {missing.group(1)!r} is missing"
    if "..." in path:  # a value of a table, whose key msgspec does not tell
        path = path[: path.index("...")]
        label = ".".join(str(p) for p in path if not isinstance(p, int))
    choices = _choices_at(kind, below)
    if choices:
        body = f"must be one of {', '.join(map(repr, choices))}"
    return tuple(path), f"{label}: {body[0].lower()}{body[1:]}, but it is {shown(_get(root, path))}"


def _get(raw: Any, path: list[str | int]) -> Any:
    for part in path:
        try:
            raw = raw[part]
        except (KeyError, IndexError, TypeError):
            return None
    return raw


def _fields_at(kind: type, path: list[str | int]) -> list[str]:
    found = _type_at(kind, path)
    return [f.encode_name for f in found.fields] if isinstance(found, msgspec.inspect.StructType) else []


def _choices_at(kind: type, path: list[str | int]) -> list[str]:
    found = _type_at(kind, path)
    return [str(value) for value in found.values] if isinstance(found, msgspec.inspect.LiteralType) else []


@functools.cache
def _type_of(kind: type) -> msgspec.inspect.Type:
    return msgspec.inspect.type_info(kind)


def _type_at(whole: type, path: list[str | int]) -> Any:
    kind: Any = _type_of(whole)
    for part in path:
        if isinstance(part, int):
            kind = getattr(kind, "item_type", kind)
        elif isinstance(kind, msgspec.inspect.StructType):
            kind = next((f.type for f in kind.fields if f.encode_name == part), None)
        if isinstance(kind, msgspec.inspect.UnionType):
            kind = next((t for t in kind.types if isinstance(t, msgspec.inspect.StructType)), None)
    return kind
