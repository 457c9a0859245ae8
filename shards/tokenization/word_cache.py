"""Encodes text word by word, keeping what each word encodes to, where that gives just what the whole text would.

SentencePiece's BPE merges neighbours only into pieces that its vocabulary has. Where no piece has a space behind another
character, and none crosses a line end, nothing can merge across those places, and a text's ids are those of its words, each
with the spaces before it, one after the other. Most words of a text were met before, so most of the work is a look-up.
"""

from __future__ import annotations

import re
import struct
import threading
from collections.abc import Sequence
from itertools import chain, repeat
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.tokenization.huggingface import BYTE, META_SPACE, parse

KEPT = 500_000  # words that are kept; beyond it all are forgotten
LONGEST = 48  # characters of a word that is worth keeping
BPE = 2  # SentencePiece's number for the model's type
_WORD = re.compile(r" *[^ \n]+|\n| +")
_CROSSES = re.compile(f"[^{META_SPACE}]{META_SPACE}|\n.|.\n", re.DOTALL)


def separable(model: bytes) -> bool:
    """Whether a model's words can be encoded one by one.

    Not if it changes text first, has no bytes to fall back to (unknown characters in a row become one), or merges otherwise.
    """
    try:
        pieces, kind, changes = parse(model)
    except (ValueError, KeyError, IndexError, struct.error):
        return False
    bytewise = any(each[2] == BYTE for each in pieces)
    return kind == BPE and bytewise and not any(changes.values()) and not any(_CROSSES.search(each[0]) for each in pieces)


class WordEncoder:
    """The ids of texts, by their words. `model`: a SentencePieceProcessor for which `separable` holds. Thread-safe."""

    def __init__(self, model: Any, dtype: str, before: int, after: int) -> None:
        """before, after: ids around each text."""
        self._model = model
        self._dtype = np.dtype(dtype)
        self._ends = [[before], [after]]
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._slots: dict[str, int] = {}
        self._ids = np.array([*self._ends[0], *self._ends[1]], self._dtype)
        self._starts = np.array([0, 1, 2], np.int64)  # of each slot, and the end of the last

    def encode(self, texts: Sequence[Sequence[str]]) -> tuple[npt.NDArray[Any], list[int]]:
        """The ids of texts, one after the other, and how many each has. A text comes in parts that are encoded apart."""
        words = [list(chain.from_iterable(map(_WORD.findall, parts))) for parts in texts]
        with self._lock:
            if len(self._starts) > KEPT:
                self._forget()
            slots = self._find(list(chain.from_iterable(words)))
            table, known = self._starts, self._ids
        counts = np.fromiter(map(len, words), np.int64, len(words))
        bounds = np.cumsum(counts + 2)
        around = np.empty(len(slots) + 2 * len(words), np.int64)
        inside = np.ones(len(around), bool)
        inside[bounds - 1] = inside[bounds - counts - 2] = False
        around[inside] = slots
        around[bounds - counts - 2], around[bounds - 1] = 0, 1
        starts = table[around]
        lengths = table[around + 1] - starts
        ends = np.cumsum(lengths)
        total = int(ends[-1]) if len(ends) else 0
        ids = known[np.repeat(starts - ends + lengths, lengths) + np.arange(total)]
        sizes = np.diff(ends[bounds - 1], prepend=0).tolist()
        return ids, sizes

    def _find(self, words: list[str]) -> npt.NDArray[np.int64]:
        """The slots of words; those not met before are encoded."""
        slots = np.fromiter(map(self._slots.get, words, repeat(-1)), np.int64, len(words))
        missing = np.flatnonzero(slots < 0)
        if not len(missing):
            return slots
        absent = [words[place] for place in missing.tolist()]
        new = list(dict.fromkeys(absent))
        encoded = self._model.encode(new)
        lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
        flat = np.fromiter(chain.from_iterable(encoded), self._dtype, int(lengths.sum()))
        base = len(self._starts) - 1
        numbers = dict(zip(new, range(base, base + len(new)), strict=True))
        slots[missing] = np.fromiter(map(numbers.__getitem__, absent), np.int64, len(absent))
        self._ids = np.concatenate([self._ids, flat])
        self._starts = np.concatenate([self._starts, self._starts[-1] + np.cumsum(lengths)])
        self._slots.update((word, number) for word, number in numbers.items() if len(word) <= LONGEST)
        return slots
