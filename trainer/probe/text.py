"""Text of tokens as they come: a character that lies in several of them comes whole, with the last."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items

from shards.tokenization.tokenizer import Tokenizer, is_json

BEFORE = 8
"""Tokens before that are decoded with new ones: whether a piece begins with a space depends on what it follows."""
INCOMPLETE = "\ufffd"
MOST_INCOMPLETE = 3
"""Bytes of a character that is not complete, each decoded as a sign of its own or all as one."""


class Stream:
    def __init__(self, decode: Callable[[Items[int]], str], prompt: Items[int]) -> None:
        self._decode = decode
        self._ids = list(prompt[-BEFORE:])
        self._sent = len(decode(self._ids))
        """Characters of what `_ids` decode to that are out already."""

    def add(self, token: int) -> str:
        """What is new and complete."""
        self._ids.append(token)
        text = self._decode(self._ids)
        complete = len(text)
        while complete > max(self._sent, len(text) - MOST_INCOMPLETE) and text[complete - 1] == INCOMPLETE:
            complete -= 1
        new = text[self._sent : complete]
        self._sent = max(self._sent, complete)
        if complete == len(text) and len(self._ids) > 4 * BEFORE:
            self._ids = self._ids[-BEFORE:]
            self._sent = len(self._decode(self._ids))
        return new

    def rest(self) -> str:
        """At the end: what never became complete."""
        return self._decode(self._ids)[self._sent :]


def pieces(tokenizer: Tokenizer, ids: Iterable[int]) -> list[str]:
    """Each token by itself, as a reader knows it."""
    return [_piece(tokenizer, id) for id in ids]


def _piece(tokenizer: Tokenizer, id: int) -> str:
    if is_json(tokenizer.model):  # its own names for tokens may be bytes in disguise
        text = tokenizer.decode([id])
        if text and INCOMPLETE not in text:
            return text
    return tokenizer.piece(id)
