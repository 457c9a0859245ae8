"""What tells two texts alike: a hash of the normalised text, and the MinHash signature of its word 5-grams.

Words are lower-case runs of letters, digits and what hangs on them, punctuation left out; in scripts written without
spaces each character is one. An n-gram's hash is made of its words' hashes, so the set of them stands for the text in the
signature (Broder 1997) and in the exact Jaccard similarity alike.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import xxhash

from shards.common.errors import SpecError
from shards.filters.scripts import apart

Hashes = npt.NDArray[np.uint64]

NGRAM = 5
BANDS, ROWS = 20, 6  # finds a pair of similarity 0.8 with probability 0.998, 0.7: 0.92, 0.5: 0.27
SEED = 42
REMEMBERED = 500_000  # words whose hashes are kept
_MIX = np.uint64(0x9E3779B97F4A7C15)

# In UTF-8: ASCII in lower case, its punctuation and control characters as spaces, all else as it is.
_BYTES = bytes(byte if byte > 127 else ord(chr(byte).lower()) if chr(byte).isalnum() else 32 for byte in range(256))
_SPACES = re.compile("[\u0080-\u00bf\u2000-\u206f\u3000-\u303f\ufe30-\ufe4f\uff00-\uff0f]+")  # and punctuation


def normalised(text: str) -> str:
    """Texts that differ in case, white space or Unicode's ways to write the same give the same."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.casefold().split())


def exact(kind: str, parts: Sequence[str], roles: Sequence[str]) -> bytes:
    """128 bits that stand for a document's normalised text."""
    fields = (kind, *roles, *(normalised(part) for part in parts))
    return xxhash.xxh3_128_digest("\x1e".join(fields).encode())


def words(text: str) -> list[bytes]:
    """The words that n-grams are made of, in UTF-8."""
    if not text.isascii():
        text = _SPACES.sub(" ", unicodedata.normalize("NFC", text).lower())
        text = apart(text)
    return text.encode().translate(_BYTES).split()


class _WordHashes(dict[bytes, int]):
    """A word's hash, kept."""

    def __missing__(self, word: bytes) -> int:
        if len(self) >= REMEMBERED:
            self.clear()
        found = self[word] = xxhash.xxh3_64_intdigest(word)
        return found


_hashes = _WordHashes()


def shingles(text: str) -> Hashes:
    """The hashes of a text's word n-grams, with repetitions; of a shorter text one, of all its words."""
    found = words(text)
    if len(found) < NGRAM:
        return np.array([xxhash.xxh3_64_intdigest(b" ".join(found) or text.strip().encode())], np.uint64)
    each = np.fromiter(map(_hashes.__getitem__, found), np.uint64, len(found))
    count = len(each) - NGRAM + 1
    total = each[:count].copy()
    for place in range(1, NGRAM):
        total *= _MIX
        total ^= total >> np.uint64(31)
        total += each[place : place + count]
    total ^= total >> np.uint64(29)
    total *= _MIX
    return total ^ (total >> np.uint64(32))


def signatures(sets: Sequence[Hashes]) -> npt.NDArray[np.uint32]:
    """MinHash signatures, [documents, BANDS * ROWS]."""
    try:
        from rensa import RMinHash
    except ImportError:
        raise SpecError("finding near duplicates needs rensa (pip install 'midwatch[data]', or near_dup_threshold = 0)") from None
    offsets = np.zeros(len(sets) + 1, np.uint64)
    np.cumsum([len(each) for each in sets], out=offsets[1:])
    flat = np.concatenate([np.empty(0, np.uint64), *sets])
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, BANDS * ROWS, SEED)
    return np.array(matrix.to_rows(), np.uint32) if len(sets) else np.empty((0, BANDS * ROWS), np.uint32)


def bands(signature: npt.NDArray[np.uint32]) -> Hashes:
    """A hash of each band of each document, [BANDS, documents]."""
    rows = signature.reshape(len(signature), BANDS, ROWS).astype(np.uint64)
    total = np.zeros(rows.shape[:2], np.uint64)
    for place in range(ROWS):
        total = (total ^ rows[:, :, place]) * _MIX
        total ^= total >> np.uint64(29)
    return np.ascontiguousarray(total.T)


def jaccard(one: Hashes, other: Hashes) -> float:
    """The similarity of two sets of n-grams, each sorted and without repetitions."""
    both = len(np.intersect1d(one, other, assume_unique=True))
    return both / (len(one) + len(other) - both)
