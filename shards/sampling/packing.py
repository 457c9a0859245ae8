"""Packing of whole samples into rows of a context's length: a plan file, made once, the same wherever it is made.

Best-fit decreasing within buffers of 4,096 documents in storage order. A document of L tokens takes L - 1 positions of a
row (its last token is only a target), so rows never predict across documents. One longer than the context is cut to
it, or dropped, as asked; a cut one that keeps nothing to learn from is dropped. Both are counted.

The plan is one column of uint64 (see container): rows, documents, truncated, dropped; then each row's end in the list
that follows; then that list, the documents' numbers by row.
"""

from __future__ import annotations

import bisect
import os
import uuid
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import xxhash

from shards.common.errors import ShardError
from shards.format.corpus import Corpus
from shards.format.seekable_zstd import ColumnReader, ColumnWriter

VERSION = 1  # of the algorithm
BUFFER = 4096
FRAME_ITEMS = 16_384

LongSamples = Literal["truncate", "drop"]


@dataclass(frozen=True)
class PackingPlan:
    """Which documents share each row."""

    row_ends: npt.NDArray[np.int64]  # [rows]
    documents: npt.NDArray[np.int64]
    truncated: int
    dropped: int

    @property
    def rows(self) -> int:
        return len(self.row_ends)

    def row(self, number: int) -> list[int]:
        """The documents of one row, in order."""
        start = int(self.row_ends[number - 1]) if number else 0
        found: list[int] = self.documents[start : int(self.row_ends[number])].tolist()
        return found


def key(digest: str, context: int, long_samples: LongSamples) -> str:
    """Names a plan by all that decides it."""
    return xxhash.xxh3_64_hexdigest(f"{VERSION} {digest} {context} {long_samples}".encode())


def plan(corpus: Corpus, context: int, long_samples: LongSamples = "truncate") -> PackingPlan:
    """The plan for a corpus: read from beside its manifest, else made and put there.

    Ranks may make it at the same time: each writes the same bytes, and the last rename wins. Where the shards are on a
    read-only disk the plan is made anew by everyone who opens them.
    """
    name = f"pack-{context}-{key(corpus.manifest.digest, context, long_samples)}.zst"
    path = corpus.directory / name
    if path.exists():
        reader = ColumnReader(path, "uint64", FRAME_ITEMS)
        try:
            return _decode(reader)
        finally:
            reader.close()
    made = make(corpus, context, long_samples)
    temporary = path.with_name(f"{name}.{uuid.uuid4().hex}")
    try:
        with ColumnWriter(temporary, "uint64", FRAME_ITEMS) as writer:
            writer.append([made.rows, len(made.documents), made.truncated, made.dropped])
            writer.append(made.row_ends)
            writer.append(made.documents)
            writer.close()
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
    return made


def _decode(reader: ColumnReader) -> PackingPlan:
    values = reader.read(0, reader.items).astype(np.int64)
    rows, documents = (int(values[0]), int(values[1])) if len(values) >= 4 else (0, 0)
    if len(values) != 4 + rows + documents:
        raise ShardError(f"{reader.path}: not a packing plan (delete it: it is made again)")
    return PackingPlan(values[4 : 4 + rows], values[4 + rows :], int(values[2]), int(values[3]))


def make(corpus: Corpus, context: int, long_samples: LongSamples) -> PackingPlan:
    """Pack a corpus's documents into rows of `context` positions."""
    costs = corpus.lengths() - 1
    rows: list[list[int]] = []
    truncated = dropped = 0
    for start in range(0, len(costs), BUFFER):
        chosen: list[tuple[int, int]] = []
        for document, cost in enumerate(costs[start : start + BUFFER].tolist(), start):
            if cost > context:
                if long_samples == "drop" or not _teaches(corpus, document, context):
                    dropped += 1
                    continue
                truncated += 1
            if cost > 0:
                chosen.append((document, min(cost, context)))
        rows += best_fit(chosen, context)
    ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
    flat = np.fromiter((document for row in rows for document in row), np.int64)
    return PackingPlan(ends, flat, truncated, dropped)


def _teaches(corpus: Corpus, document: int, context: int) -> bool:
    """Whether a document cut to the context still has a token to learn."""
    start, _ = corpus.span(document)
    return bool(corpus.read(start + 1, start + 1 + context, "mask").any())


def best_fit(documents: list[tuple[int, int]], context: int) -> list[list[int]]:
    """Rows of (document, cost)s, none over `context` in sum: the longest first, each where it leaves least room."""
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room left, row), sorted
    for document, cost in sorted(documents, key=lambda pair: (-pair[1], pair[0])):
        place = bisect.bisect_left(open_rows, (cost, -1))
        if place < len(open_rows):
            room, row = open_rows.pop(place)
            rows[row].append(document)
        else:
            room, row = context, len(rows)
            rows.append([document])
        if room > cost:
            bisect.insort(open_rows, (room - cost, row))
    return rows
