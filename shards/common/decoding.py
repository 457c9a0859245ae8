"""Decoding of what others wrote: one exception for everything that can be wrong with the bytes, and messages of bounded length."""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

import msgspec

T = TypeVar("T")

MOST_DIGITS = 400
"""Of a number in JSON: more than any float or integer of use has."""
LONGEST_LINE = 1200
"""Characters of a line of a message."""
LARGEST = 2**63 - 1
"""What numpy, SQLite, torch and MessagePack can all carry."""

Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=LARGEST)]
Count = Annotated[int, msgspec.Meta(ge=0, le=LARGEST)]


UNDECODABLE = (ValueError, RecursionError, OverflowError)
"""What msgspec's decoders raise: its own errors, UnicodeDecodeError, nesting too deep, and times out of Python's range."""


class DecodeError(ValueError):
    """The bytes are not what they should be; the message says why, without the place."""


def json_value(raw: bytes) -> Any:
    """Any JSON, as Python's parser reads it, NaN and infinities included. Raises DecodeError."""
    try:
        # Decoded here: `json` would let lone surrogates pass, which cannot be printed or encoded again.
        found = json.loads(raw.decode("utf-8-sig"), parse_int=_integer)
        if b"\\ud" in raw or b"\\uD" in raw:
            json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise DecodeError("not JSON: it has half of a surrogate pair") from None
    except RecursionError:
        raise DecodeError("not JSON: nested too deeply") from None
    except ValueError as error:
        raise DecodeError(f"not JSON: {error}") from None
    return found


def json_as(raw: bytes | str, kind: type[T]) -> T:
    """JSON of a type. Raises DecodeError."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except UNDECODABLE as error:
        raise DecodeError(str(error)) from None


def msgpack_as(raw: bytes, kind: type[T]) -> T:
    """MessagePack of a type. Raises DecodeError."""
    try:
        return msgspec.msgpack.decode(raw, type=kind)
    except UNDECODABLE as error:
        raise DecodeError(str(error)) from None


def _integer(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def brief(message: object) -> str:
    """A message whose lines are cut in the middle where they are too long: place and way out stand at the ends."""
    return "\n".join(_cut(line, LONGEST_LINE) for line in str(message).split("\n"))


def shown(value: object, most: int = 120) -> str:
    """A value as Python writes it, cut in the middle."""
    return _cut(repr(_small(value, most)), most)


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most * 2 // 3]} … {text[-(most // 3) :]}"


def _small(value: object, most: int) -> object:
    """What is enough of a value to show it: an integer of millions of digits, for one, cannot be written."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 1000:
        return f"an integer of {value.bit_length()} bits"
    return value[: most * 2] if isinstance(value, str | bytes) else value
