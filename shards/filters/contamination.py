"""Evaluation texts inside documents, by n-grams of words as GPT-3 looked for them (Brown et al. 2020, appendix C).

Words are lower-cased and stripped of punctuation. A document matches an evaluation set where it has any 13 words in a row
of one of its texts; a shorter text is looked for as a whole, from 8 words on, and left alone below. In scripts without spaces
each character is a word; but a text mostly in kana is looked for by twice as many of them, and one mostly in Thai or the like
by four times, as 13 characters are hardly three words there. The index is one sorted array of hashes for each length of n-gram.
"""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterable, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from shards.common.errors import ShardError
from shards.filters.scripts import ALPHABETS, KANA, apart
from shards.filters.settings import Contamination

Hashes = npt.NDArray[np.uint64]
_VERSION = 2
_MIX = np.uint64(0x9E3779B97F4A7C15)


class EvaluationOverlap(NamedTuple):
    """How much of a document is evaluation text."""

    items: dict[str, list[int]]  # name of each set found: numbers of its texts
    share: float  # of the document's words, 0 to 1


@cache
def _punctuation() -> dict[int, None]:
    points = (point for point in range(0x110000) if unicodedata.category(chr(point))[0] == "P")
    return dict.fromkeys([*points, *map(ord, string.punctuation)])


_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """What is compared: lower-cased words without punctuation; "don't" is "dont". Of scripts without spaces, characters."""
    if text.isascii():
        return text.lower().translate(_ASCII_PUNCTUATION).split()
    return apart(unicodedata.normalize("NFC", text).lower().translate(_punctuation())).split()


def _length(tokens: list[str], settings: Contamination) -> int:
    """How many of an evaluation text's words in a row are looked for; 0 where it is too short."""
    letters, kana = (sum(map(bool, map(script.match, tokens))) for script in (ALPHABETS, KANA))
    count = len(tokens) - letters * 3 / 4 - kana / 2  # what would be words with spaces between
    each = 1 if 4 * count >= 3 * len(tokens) else 2 if 3 * count >= len(tokens) else 4
    words_in_row = min(settings.ngram, int(count))
    return min(each * words_in_row, len(tokens)) if words_in_row >= settings.least else 0


def _hashes(tokens: list[str], known: dict[str, int]) -> Hashes:
    """A hash a word; `known` remembers them."""
    values = []
    for token in tokens:
        value = known.get(token)
        if value is None:
            value = known[token] = xxhash.xxh3_64_intdigest(token.encode("utf-8", "surrogatepass"))
        values.append(value)
    return np.array(values, np.uint64)


def _grams(hashes: Hashes, n: int) -> Hashes:
    """Hashes of n words in a row, wherever they lie; empty for fewer words."""
    count = len(hashes) - n + 1
    if count < 1:
        return np.empty(0, np.uint64)
    grams = np.zeros(count, np.uint64)
    for place in range(n):
        grams = (grams + hashes[place : place + count]) * _MIX
        grams ^= grams >> np.uint64(29)
    return grams


class NgramIndex:
    """The n-grams of evaluation sets, and which text of which set each is from."""

    def __init__(self, settings: Contamination, names: list[str], sizes: list[int], tables: dict[int, tuple[Hashes, Any]]) -> None:
        self.settings = settings
        self.names = names
        self.sizes = sizes  # texts of each set
        self._starts = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
        self._tables = tables  # n: (sorted hashes, number of the text among all sets'), a hash once for each text that has it
        self._known: dict[str, int] = {}

    @classmethod
    def build(cls, sets: Mapping[str, Iterable[str]], settings: Contamination) -> NgramIndex:
        """An index of the texts of each set; those of fewer than `least` words are counted but not looked for."""
        grams: dict[int, list[Hashes]] = {}
        owners: dict[int, list[npt.NDArray[np.int32]]] = {}
        names, sizes, number = [], [], 0
        for name, texts in sorted(sets.items()):
            first = number
            for text in texts:
                tokens = words(text)
                hashes, n = _hashes(tokens, {}), _length(tokens, settings)
                if n:
                    own = np.unique(_grams(hashes, n))
                    grams.setdefault(n, []).append(own)
                    owners.setdefault(n, []).append(np.full(len(own), number, np.int32))
                number += 1
            names.append(name)
            sizes.append(number - first)
        tables = {}
        for n in sorted(grams):
            hashes, owner = np.concatenate(grams[n]), np.concatenate(owners[n])
            order = np.lexsort((owner, hashes))
            tables[n] = hashes[order], owner[order]
        return cls(settings, names, sizes, tables)

    @property
    def too_short(self) -> list[int]:
        """Of each set, how many of its texts are too short to be looked for."""
        sought: set[int] = set()
        for _, owners in self._tables.values():
            sought.update(np.unique(owners).tolist())
        starts = self._starts.tolist()
        return [sum(number not in sought for number in range(*span)) for span in pairwise(starts)]

    def find(self, text: str) -> EvaluationOverlap:
        """The evaluation texts that a document has, and what share of its words they cover."""
        tokens = words(text)
        if len(tokens) < self.settings.least or not self._tables:
            return EvaluationOverlap({}, 0.0)
        if len(self._known) > 1 << 20:  # words of a large build: begin anew rather than grow
            self._known.clear()
        hashes = _hashes(tokens, self._known)
        covered = np.zeros(len(tokens) + 1, np.int64)
        numbers: set[int] = set()
        for n, (table, owner) in self._tables.items():
            grams = _grams(hashes, n)
            first = np.searchsorted(table, grams)
            hits = np.flatnonzero(table[np.minimum(first, len(table) - 1)] == grams)
            if not len(hits):
                continue
            last = np.searchsorted(table, grams[hits], side="right")
            for begin, end in set(zip(first[hits].tolist(), last.tolist(), strict=True)):
                numbers.update(owner[begin:end].tolist())
            np.add.at(covered, hits, 1)
            np.add.at(covered, hits + n, -1)
        items: dict[str, list[int]] = {}
        for number in sorted(numbers):
            place = int(np.searchsorted(self._starts, number, side="right")) - 1
            items.setdefault(self.names[place], []).append(number - int(self._starts[place]))
        return EvaluationOverlap(items, int(np.count_nonzero(np.cumsum(covered)[:-1])) / len(tokens))

    def judge(self, found: EvaluationOverlap) -> str:
        """Why a document with these findings is refused, or ""."""
        if self.settings.mode == "report" or not found.items or found.share < self.settings.min_share:
            return ""
        return f"contamination: {min(found.items)}"

    def save(self, path: Path) -> None:
        """Write the index; the same sets give the same bytes."""
        head = {
            "version": _VERSION,
            "settings": msgspec.to_builtins(self.settings),
            "names": self.names,
            "sizes": self.sizes,
            "tables": [[n, len(hashes)] for n, (hashes, _) in self._tables.items()],
        }
        with path.open("wb") as file:
            file.write(msgspec.json.encode(head) + b"\n")
            for hashes, owner in self._tables.values():
                file.write(hashes.astype("<u8").tobytes() + owner.astype("<i4").tobytes())

    @classmethod
    def load(cls, path: Path) -> NgramIndex:
        """Read an index; ShardError where the file is not a whole one."""
        try:
            raw = path.read_bytes()
            line, _, body = raw.partition(b"\n")
            head = msgspec.json.decode(line)
            if head["version"] != _VERSION:
                raise ShardError(f"{path}: an index of version {head['version']}, not {_VERSION} (build it again)")
            settings = msgspec.convert(head["settings"], Contamination)
            tables, at = {}, 0
            for n, count in head["tables"]:
                hashes = np.frombuffer(body, "<u8", count, at).astype(np.uint64)
                tables[n] = hashes, np.frombuffer(body, "<i4", count, at + 8 * count).astype(np.int32)
                at += 12 * count
        except (OSError, msgspec.MsgspecError, KeyError, TypeError, ValueError) as error:
            raise ShardError(f"{path}: not a whole contamination index: {error} (build it again)") from None
        if at != len(body):
            raise ShardError(f"{path}: {len(body) - at} bytes too many for a contamination index (build it again)")
        return cls(settings, head["names"], head["sizes"], tables)
