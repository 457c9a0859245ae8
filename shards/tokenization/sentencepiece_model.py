"""A SentencePiece model's file: its pieces, its kind and its normalizer, read without the library."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from shards.common.errors import SpecError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
META_SPACE = "\u2581"
"""How SentencePiece writes a space inside pieces."""


def parse(model: bytes) -> tuple[list[tuple[str, float, int]], int, dict[str, Any]]:
    """(piece, score, kind) of each id, the kind of the model, and its normalizer: sentencepiece_model.proto. Raises SpecError."""
    try:
        return _parse(model)
    except (LookupError, ValueError, TypeError, struct.error) as error:
        raise SpecError(f"tokenizer: not a SentencePiece model: {type(error).__name__}: {error} (give a .model file)") from None


def _parse(model: bytes) -> tuple[list[tuple[str, float, int]], int, dict[str, Any]]:
    pieces: list[tuple[str, float, int]] = []
    kind, spec = 1, {"charsmap": b"", "dummy_prefix": True, "extra_whitespaces": True}
    for field, value in _fields(model):
        if field == 1:
            inner = dict(_fields(value))
            pieces.append((inner[1].decode(), struct.unpack("<f", inner.get(2, bytes(4)))[0], inner.get(3, NORMAL)))
        elif field == 2:
            kind = dict(_fields(value)).get(3, 1)
        elif field == 3:
            inner = dict(_fields(value))
            spec = {
                "charsmap": inner.get(2, b""),
                "dummy_prefix": bool(inner.get(3, 1)),
                "extra_whitespaces": bool(inner.get(4, 1)),
            }
    return pieces, kind, spec


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffers message: https://protobuf.dev/programming-guides/encoding."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        tag = varint()
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            yield number, varint()
            continue
        length = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        yield number, message[at : at + length]
        at += length
