"""A document's text with its words, lines and paragraphs, each split once, when first asked for, and shared by all rules.

A word is a run of letters, digits, combining marks and underscores, with what symbols stand between two of these without
white space (3.14, don't, and/or, example.com). Any other symbol is a word of its own; full stops in a row are one, and so are
hyphens. That is near enough to spaCy's English words, at a hundred times the speed. Words are kept as numbers: where
they lie, what kinds of characters they hold, and a polynomial hash modulo 2^64 (Karp and Rabin 1987) over the text without
its white space, from which the hash of any n-gram is one subtraction and one product away.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from shards.filters.heuristics import marks

Hashes = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]

BLOCK = 1 << 16  # characters split at a time, so that memory follows the words and not 8 bytes a character
LONGEST = 1 << 20  # characters after which a block ends even inside a word
_BASE = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2^64
_MIX = 0xD1342543DE82EF95  # for lengths: had it to do with the base, they could cancel characters
_BACK = pow(_BASE, -1, 1 << 64)
_STEP = 1 << 17

_WHITE = re.compile(r"\s")
_ASCII_WHITE = bytes(point for point in range(128) if chr(point).isspace())
_NONE: Ints = np.empty(0, np.int64)
_ZERO: Ints = np.zeros(1, np.int64)


@cache
def _table(base: int) -> Hashes:
    """base^0 to base^(2^17 - 1), modulo 2^64."""
    table = np.full(_STEP, base, np.uint64)
    table[0] = 1
    return np.multiply.accumulate(table)


def _powers(base: int, first: int, count: int) -> Hashes:
    """base^first to base^(first + count - 1), modulo 2^64."""
    if first + count <= _STEP:
        return _table(base)[first : first + count]
    return _power(base, np.arange(first, first + count))


def _power(base: int, exponents: Ints) -> Hashes:
    """base to each of the exponents, modulo 2^64."""
    if not len(exponents) or exponents[-1] < _STEP:  # exponents rise
        return _table(base)[exponents]
    high = np.array([pow(base, _STEP * step, 1 << 64) for step in range(int(exponents[-1]) // _STEP + 1)], np.uint64)
    return _table(base)[exponents % _STEP] * high[exponents // _STEP]


class Words(NamedTuple):
    """A document's words, one entry each; `edges` and `sums` have one more."""

    starts: Ints  # [words] where each begins in the text, characters
    edges: Ints  # [words + 1] where each begins in the text without white space
    kinds: npt.NDArray[np.uint8]  # [words] bits of `marks` that any of its characters has
    sums: Hashes  # [words + 1] hash of the text without white space, up to each edge
    backs: Hashes  # [words] what brings a difference of sums back to the word's own hash

    def __len__(self) -> int:
        return len(self.starts)

    def gram(self, n: int) -> Hashes:
        """Hashes [words - n + 1] of n words run together, wherever they lie; empty where there are fewer words."""
        count = len(self.starts) - n + 1
        if count < 1:
            return np.empty(0, np.uint64)
        return (self.sums[n:] - self.sums[:-n]) * self.backs[:count]

    def lengths(self, n: int = 1) -> Ints:
        """Characters [words - n + 1] of n words run together."""
        return self.edges[n:] - self.edges[:-n]

    def spaced_gram(self, n: int) -> Hashes:
        """Like `gram`, but for words with a space between: "a bc" and "ab c" differ."""
        keys = self.gram(n)
        lengths = self.lengths().astype(np.uint64)
        for place in range(n - 1):
            keys = keys * np.uint64(_MIX) + lengths[place : place + len(keys)]
        return keys


def _blocks(string: str) -> Iterator[tuple[int, int]]:
    """Stretches of about BLOCK characters that end at white space, where there is some within LONGEST."""
    start = 0
    while len(string) - start > BLOCK:
        found = _WHITE.search(string, start + BLOCK, start + LONGEST)
        end = found.start() if found else min(start + LONGEST, len(string))
        yield start, end
        start = end
    yield start, len(string)


def _split(string: str, offset: int) -> tuple[Ints, Ints, npt.NDArray[np.uint8], Hashes]:
    """A block's words: starts, lengths, kinds, and their hashes."""
    if string.isascii():
        raw = string.encode("ascii")
        dense = raw.translate(None, _ASCII_WHITE)
        points: npt.NDArray[np.uint8] | npt.NDArray[np.uint32] = np.frombuffer(dense, np.uint8)
        kinds = np.frombuffer(dense.translate(marks.ascii_kinds()), np.uint8)
        shape = np.frombuffer(raw.translate(marks.ascii_shapes()), np.uint8)
    else:
        points = np.frombuffer(string.encode("utf-32-le", "surrogatepass"), np.uint32)
        kinds = np.take(marks.kinds(marks.BASIC) if points.max(initial=0) < marks.BASIC else marks.kinds(), points)
        shape = kinds & marks.SHAPE
        dark = shape != marks.SPACE
        points, kinds = points[dark], kinds[dark]
    if not len(points):
        return _NONE, _NONE, np.empty(0, np.uint8), np.empty(0, np.uint64)
    starts, lengths = _bounds(shape)
    firsts = np.cumsum(lengths) - lengths
    # One more than the code point, so that a NUL counts.
    weighed = np.multiply(points + 1, _powers(_BASE, 0, len(points)), dtype=np.uint64)
    hashes = np.add.reduceat(weighed, firsts) * _power(_BACK, firsts)
    return starts + offset, lengths, np.bitwise_or.reduceat(kinds, firsts), hashes


def _bounds(shape: npt.NDArray[np.uint8]) -> tuple[Ints, Ints]:
    """Where words start and how long they are, from the shapes of at least one character."""
    # Runs of one shape; of symbols without a shape each is a run.
    changes = shape[1:] != shape[:-1]
    changes |= shape[1:] == 0
    starts = np.concatenate((_ZERO, changes.nonzero()[0] + 1))
    shapes = shape[starts]
    solid = (shapes == marks.WORD) | (shapes == marks.SPACE)
    # A symbol between two runs of word characters, other symbols skipped, is part of one word with them.
    order = np.arange(len(starts))
    before = np.maximum.accumulate(np.where(solid, order, 0))
    after = np.minimum.accumulate(np.where(solid, order, len(starts) - 1)[::-1])[::-1]
    joins = ~solid & (shapes[before] == marks.WORD) & (shapes[after] == marks.WORD)
    goes_on = joins.copy()
    goes_on[1:] |= joins[:-1]
    heads = (~goes_on).nonzero()[0]
    starts, shapes = starts[heads], shapes[heads]
    words = (shapes != marks.SPACE).nonzero()[0]
    ends = np.concatenate((starts[1:], (len(shape),)))
    return starts[words], (ends - starts)[words]


def split(string: str) -> Words:
    """All words of a text."""
    parts = [_split(string[start:end], start) for start, end in _blocks(string)]
    columns = zip(*parts, strict=True)
    starts, lengths, kinds, hashes = (np.concatenate(column) if len(parts) > 1 else column[0] for column in columns)
    edges = np.zeros(len(starts) + 1, np.int64)
    np.cumsum(lengths, out=edges[1:])
    sums = np.zeros(len(starts) + 1, np.uint64)
    np.cumsum(hashes * _power(_BASE, edges[:-1]), out=sums[1:])
    return Words(starts, edges, kinds, sums, _power(_BACK, edges[:-1]))


def crowds(keys: Hashes) -> npt.NDArray[np.intp]:
    """For each key, how many keys share its slot of a hash table: at least as many times as the key occurs.

    Counting slots takes a fraction of the time of sorting keys, and tells most texts that do not repeat themselves.
    """
    bits = len(keys).bit_length() + 2
    slots = (keys >> np.uint64(64 - bits)).view(np.int64)
    counts: npt.NDArray[np.intp] = np.bincount(slots, minlength=1 << bits)[slots]
    return counts


def leaders(keys: Hashes) -> npt.NDArray[np.int32]:
    """For each position the first one with the same key, itself where the key is new.

    A hash table worked on by whole arrays settles the keys that are first in their slot and those equal to them; the few
    others are sorted.
    """
    order = np.arange(len(keys), dtype=np.int32)
    bits = len(keys).bit_length() + 3
    slots = (keys >> np.uint64(64 - bits)).view(np.int64)
    table = np.empty(1 << bits, np.int32)
    table[slots[::-1]] = order[::-1]  # the last one assigned stays: the first position
    lead: npt.NDArray[np.int32] = table[slots]
    rest = np.flatnonzero(keys[lead] != keys)
    if len(rest):
        chosen = keys[rest]
        rank = chosen.argsort(kind="stable")
        ordered = chosen[rank]
        runs = np.flatnonzero(np.concatenate(([True], ordered[1:] != ordered[:-1])))
        rest = rest[rank]
        lead[rest] = rest[runs].repeat(np.diff(runs, append=len(rest)))
    return lead


_BREAKS = re.compile("\r\n?|[\u2028\u2029]")


def unified(string: str) -> str:
    """The text with line feeds for all line ends: those of Windows and of old Macs, and Unicode's own."""
    return _BREAKS.sub("\n", string) if "\r" in string or "\u2028" in string or "\u2029" in string else string


class Text:
    """A document's text and what rules count in it; its lines are to end in line feeds (see `unified`)."""

    def __init__(self, string: str) -> None:
        self.string = string

    @cached_property
    def words(self) -> Words:
        """The words as numbers."""
        return split(self.string)

    @cached_property
    def tokens(self) -> list[str]:
        """The words as strings, for whom the numbers do not suffice."""
        words = self.words
        starts, ends = words.starts.tolist(), (words.starts + words.lengths()).tolist()
        return [self.string[start:end] for start, end in zip(starts, ends, strict=True)]

    @cached_property
    def lines(self) -> list[str]:
        """Lines, by every line break that Python's splitlines knows."""
        return self.string.splitlines()

    @cached_property
    def rows(self) -> list[str]:
        """Lines by line feeds alone, blank ones left out, as FineWeb counts them."""
        return [row for row in self.string.split("\n") if row and not row.isspace()]

    @cached_property
    def stretches(self) -> list[str]:
        """Lines by runs of line feeds, as Gopher's repetition rules count them: an empty one where the text begins or ends so."""
        lines = [line for line in self.string.split("\n") if line]
        if self.string.startswith("\n"):
            lines.insert(0, "")
        if self.string.endswith("\n") or not self.string:
            lines.append("")
        return lines

    @cached_property
    def paragraphs(self) -> list[str]:
        """What blank lines part."""
        stripped = self.string.strip()
        # A run of more than two line feeds leaves empty parts, and one more where it is odd.
        parts = [part.lstrip("\n") for part in stripped.split("\n\n") if part]
        return [part for part in parts if part] or [stripped]
