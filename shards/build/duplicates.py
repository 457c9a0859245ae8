"""Steps `exact`, `near` and `verify`: which documents say what an earlier one, of any source, has said.

Hashes are looked at by ranges, so that what is in memory at once does not grow with the data: a task gathers one range of
all chunks' sorted hashes. Near duplicates are candidates first, pairs that share a band of their signatures (Indyk and
Motwani 1998), and count only if the Jaccard similarity of their n-grams, computed from the texts, reaches the threshold.
A document goes if an earlier one is that similar, so of each group of duplicates the first stays.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.build import hashing
from shards.build.checksummed_files import map_array, save_array
from shards.build.chunks import DocumentChunk
from shards.build.minhash_signatures import BAND, EXACT
from shards.build.workspace import DOCUMENT_BITS, Ids, Work

RANGE = 4_000_000  # hashes looked at in one task, on average
PAIR = np.dtype([("later", "<u8"), ("earlier", "<u8")])
VERIFIED = np.dtype([("later", "<u8"), ("earlier", "<u8"), ("similarity", "<f4")])
MASK = (1 << DOCUMENT_BITS) - 1
SETS_KEPT = 64  # documents of other chunks whose n-grams are at hand

Array = npt.NDArray[Any]
Duplicates = dict[int, tuple[str, int]]
"""Documents of a chunk, by place: how they are like an earlier one, and that one's id."""


def ranges(work: Work) -> int:
    return max(1, -(-work.documents // RANGE))


def _gather(work: Work, part: int, end: str, dtype: np.dtype[Any], key: str, band: int | None = None) -> tuple[Array, Ids]:
    """The hashes of one range, of all chunks, with the ids of their documents."""
    count = ranges(work)
    low, high = part * 2**64 // count, (part + 1) * 2**64 // count
    found, ids = [np.empty(0, dtype)], [np.empty(0, np.uint64)]
    for number, name in enumerate(work.chunks):
        if band is not None and work.sources[name.source].kind != "text":
            continue  # near duplicates are looked for in text only
        hashes = map_array(work.path("sign", name, end))
        hashes = hashes if band is None else hashes[band]
        # By hand: numpy's own search would read the whole file first.
        start, stop = (bisect_left(hashes[key], edge) for edge in (low, high))
        found.append(np.array(hashes[start:stop]))
        ids.append(found[-1]["document"].astype(np.uint64) | np.uint64(number << DOCUMENT_BITS))
    return np.concatenate(found), np.concatenate(ids)


class Exact:
    """One task a range of hashes: the documents whose normalised text is an earlier one's."""

    name = "exact"
    about = "finding exact duplicates"

    def tasks(self, work: Work) -> list[tuple[int]]:
        return [(part,) for part in range(ranges(work))] if work.clean.exact else []

    def weight(self, work: Work, task: tuple[int]) -> int:
        return 1

    def output(self, work: Work, task: tuple[int]) -> Path:
        return work.path(self.name, f"{task[0]:05d}", ".npy")

    def do(self, work: Work, task: tuple[int]) -> None:
        hashes, ids = _gather(work, task[0], ".exact.npy", EXACT, "high")
        order = np.lexsort((ids, hashes["low"], hashes["high"]))
        hashes, ids = hashes[order], ids[order]
        same = (hashes["high"][1:] == hashes["high"][:-1]) & (hashes["low"][1:] == hashes["low"][:-1])
        pairs = np.empty(int(same.sum()), PAIR)
        pairs["later"] = ids[1:][same]
        first = np.maximum.accumulate(np.where(np.concatenate([[True], ~same]), np.arange(len(ids)), 0)) if len(ids) else order
        pairs["earlier"] = ids[first[1:][same]] if len(ids) else 0
        save_array(self.output(work, task), np.sort(pairs, order="later"))


class Near:
    """One task a band and a range: pairs that may be near duplicates, each later document with two earlier ones at most."""

    name = "near"
    about = "finding near duplicates"

    def tasks(self, work: Work) -> list[tuple[int, int]]:
        if work.clean.near_dup_threshold <= 0:
            return []
        return [(band, part) for band in range(hashing.BANDS) for part in range(ranges(work))]

    def weight(self, work: Work, task: tuple[int, int]) -> int:
        return 1

    def output(self, work: Work, task: tuple[int, int]) -> Path:
        return work.path(self.name, f"{task[0]:02d}-{task[1]:05d}", ".npy")

    def do(self, work: Work, task: tuple[int, int]) -> None:
        band, part = task
        hashes, ids = _gather(work, part, ".bands.npy", BAND, "hash", band)
        order = np.lexsort((ids, hashes["hash"]))
        values, ids = hashes["hash"][order], ids[order]
        same = values[1:] == values[:-1]
        starts = np.concatenate([[True], ~same]) if len(ids) else np.empty(0, bool)
        first = np.maximum.accumulate(np.where(starts, np.arange(len(ids)), 0)) if len(ids) else np.empty(0, np.int64)
        later = np.flatnonzero(same) + 1
        pairs = np.empty(2 * len(later), PAIR)
        # All pairs of a group would be too many: each with the group's first, and with the one before it.
        for half, earlier in ((pairs[: len(later)], first[later]), (pairs[len(later) :], later - 1)):
            half["later"], half["earlier"] = ids[later], ids[earlier]
        save_array(self.output(work, task), np.unique(pairs))


def of_chunk(work: Work, step: str, dtype: np.dtype[Any], number: int) -> Array:
    """What the tasks of a step say of the documents of one chunk."""
    low, high = number << DOCUMENT_BITS, (number + 1) << DOCUMENT_BITS
    found = [np.empty(0, dtype)]
    for path in sorted((work.root / step).glob("*.npy")):
        pairs = map_array(path)
        start, stop = (bisect_left(pairs["later"], edge) for edge in (low, high))
        found.append(np.array(pairs[start:stop]))
    return np.concatenate(found)


class Verify:
    """One task a chunk: which of its candidates are as similar to an earlier document as the threshold says."""

    name = "verify"
    about = "comparing texts"

    def tasks(self, work: Work) -> list[tuple[int]]:
        if work.clean.near_dup_threshold <= 0:
            return []
        return [(number,) for number in range(len(work.chunks)) if work.sources[work.chunks[number].source].kind == "text"]

    def weight(self, work: Work, task: tuple[int]) -> int:
        return work.sizes[task[0]][1]

    def output(self, work: Work, task: tuple[int]) -> Path:
        return work.path(self.name, work.chunks[task[0]], ".npy")

    def do(self, work: Work, task: tuple[int]) -> None:
        number = task[0]
        pairs = np.unique(of_chunk(work, "near", PAIR, number))
        if work.clean.exact:  # those go anyway
            pairs = pairs[~np.isin(pairs["later"], of_chunk(work, "exact", PAIR, number)["later"])]
        found: list[tuple[int, int, float]] = []
        gone: set[int] = set()
        texts = _Texts(work, number)
        for later, earlier in sorted(pairs.tolist(), key=lambda pair: (pair[1], pair[0])):
            if later in gone:
                continue
            similarity = hashing.jaccard(texts.ngrams(later), texts.ngrams(earlier))
            if similarity >= work.clean.near_dup_threshold:
                gone.add(later)
                found.append((later, earlier, similarity))
        save_array(self.output(work, task), np.array(sorted(found), VERIFIED))


class _Texts:
    """The n-grams of documents: those of one chunk are kept, of others the latest few."""

    def __init__(self, work: Work, own: int) -> None:
        self._work = work
        self._own = own
        self._sets: dict[int, hashing.Hashes] = {}
        self._others: dict[int, hashing.Hashes] = {}
        self._chunks: dict[int, DocumentChunk] = {}
        self._frames: dict[bool, tuple[int, int, list[Any]]] = {}  # the latest one of the own chunk, and of others

    def ngrams(self, document: int) -> hashing.Hashes:
        own = document >> DOCUMENT_BITS == self._own
        kept = self._sets if own else self._others
        found = kept.get(document)
        if found is None:
            found = kept[document] = np.unique(hashing.shingles(self._text(document)))
            if not own and len(kept) > SETS_KEPT:
                del kept[next(iter(kept))]
        return found

    def _text(self, document: int) -> str:
        number, place = document >> DOCUMENT_BITS, document & MASK
        chunk = self._chunks.get(number)
        if chunk is None:
            chunk = self._chunks[number] = self._work.chunk(number)
        frame = bisect_right(chunk.frames, place, key=lambda frame: frame.first) - 1
        own = number == self._own
        if self._frames.get(own, (-1, -1))[:2] != (number, frame):
            self._frames[own] = number, frame, chunk.frame(frame)
        text: str = self._frames[own][2][place - chunk.frames[frame].first].parts[0]
        return text


def exact(work: Work, number: int) -> Duplicates:
    """Documents of a chunk, by place, that say just what an earlier one says: how much alike they are, and the other's id."""
    if not work.clean.exact:
        return {}
    return {later & MASK: ("the same text", earlier) for later, earlier in of_chunk(work, "exact", PAIR, number).tolist()}


def near(work: Work, number: int) -> Duplicates:
    """Documents of a chunk, by place, that say nearly what an earlier one says."""
    if work.clean.near_dup_threshold <= 0 or work.sources[work.chunks[number].source].kind != "text":
        return {}
    found = map_array(work.path("verify", work.chunks[number], ".npy")).tolist()
    return {later & MASK: (f"{similarity:.2f} of the same n-grams", earlier) for later, earlier, similarity in found}
