"""Where the documents of packed rows begin, found on the host: to ask the device for it would make each step wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor


class Documents(NamedTuple):
    """Of some rows, on the device."""

    starts: Tensor
    """[rows, documents], int32: places in the row at which documents begin; the row's time where it has fewer than others."""
    longest: int
    """Tokens of the longest document, or more."""

    def bounds(self, time: int, length: int) -> tuple[Tensor, int]:
        """Of rows of `time` that are filled up to `length` and laid end to end, and the longest.

        [rows * documents + 1], int32, cumulative: documents that there are not are empty ones. What fills up is one of its own,
        or behind the last one's end, where no other token looks.
        """
        before = torch.arange(0, len(self.starts) * length, length, device=self.starts.device, dtype=torch.int32)
        starts = (self.starts + before[:, None]).flatten()
        return F.pad(starts, (0, 1), value=len(self.starts) * length), self.longest + length - time


def found(segments: NDArray[np.int32]) -> tuple[NDArray[np.int32], int]:
    """`starts` and `longest` of rows, from the document of each token, [rows, time]; padding counts as one."""
    rows, time = segments.shape
    begins = np.ones(segments.shape, bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    counts = begins.sum(1)
    row, place = begins.nonzero()
    starts = np.full((rows, counts.max(initial=1)), time, np.int32)
    starts[row, np.arange(len(row)) - np.repeat(counts.cumsum() - counts, counts)] = place
    return starts, int(np.diff(row * time + place, append=rows * time).max(initial=0))


def undivided(rows: int, time: int, device: torch.device) -> Documents:
    """Rows that are one document each."""
    return Documents(torch.zeros(rows, 1, dtype=torch.int32, device=device), time)


def joined(parts: Sequence[Documents | None]) -> Documents | None:
    """Rows of several micro-batches of a batch as one; None where some do not know theirs."""
    known = [part for part in parts if part is not None]
    if not known or len(known) < len(parts):
        return None
    return Documents(torch.cat([part.starts for part in known]), max(part.longest for part in known))
