"""Step `sign`: hashes the documents of a chunk, sorted, so that a range of them can be read from the file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shards.build import hashing
from shards.build.checksummed_files import save_array
from shards.build.workspace import Work

EXACT = np.dtype([("high", "<u8"), ("low", "<u8"), ("document", "<u4")])
BAND = np.dtype([("hash", "<u8"), ("document", "<u4")])
BATCH = 1 << 22  # characters that are hashed at once

Task = tuple[int]  # chunk


class Sign:
    """One task for each chunk: writes NAME.bands.npy, [bands, documents], and NAME.exact.npy, both sorted by hash."""

    name = "sign"
    about = "hashing"

    def tasks(self, work: Work) -> list[Task]:
        return [(number,) for number in range(len(work.chunks))]

    def weight(self, work: Work, task: Task) -> int:
        """Bytes of text."""
        return work.sizes[task[0]][1]

    def output(self, work: Work, task: Task) -> Path:
        return work.path(self.name, work.chunks[task[0]], ".exact.npy")

    def do(self, work: Work, task: Task) -> None:
        number = task[0]
        kind = work.sources[work.chunks[number].source].kind
        near = kind == "text" and work.clean.near_dup_threshold > 0
        chunk = work.chunk(number)
        keys = np.empty(len(chunk), EXACT)
        found = [np.empty((hashing.BANDS, 0), np.uint64)]
        sets: list[hashing.Hashes] = []
        size = 0
        for place, document in enumerate(chunk):
            keys[place] = (*_halves(hashing.exact(kind, document.parts, document.roles)), place)
            if near:
                sets.append(hashing.shingles(document.parts[0]))
                size += len(document.parts[0])
                if size >= BATCH:
                    found.append(hashing.bands(hashing.signatures(sets)))
                    sets, size = [], 0
        if sets:
            found.append(hashing.bands(hashing.signatures(sets)))
        if near:
            save_array(work.path(self.name, work.chunks[number], ".bands.npy"), _sorted(np.concatenate(found, axis=1)))
        save_array(self.output(work, task), np.sort(keys, order=("high", "low", "document")))


def _halves(digest: bytes) -> tuple[int, int]:
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big")


def _sorted(hashes: hashing.Hashes) -> npt.NDArray[Any]:
    """The hashes of each band with their documents, sorted by both."""
    order = np.argsort(hashes, axis=1, kind="stable")
    found = np.empty(hashes.shape, BAND)
    found["hash"] = np.take_along_axis(hashes, order, axis=1)
    found["document"] = order
    return found
