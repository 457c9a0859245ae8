"""The reference's log-probabilities of a stage's pairs, read from the files that `trainer.stage.reference_logprobs` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shards.format.seekable_zstd import ColumnReader
from trainer.batches import DeviceRows
from trainer.objectives.loss import last_place

FRAME_ITEMS = 4096
Sample = tuple[str, int, int]
"""(source, epoch, number), as a batch has them."""


class ReferenceSums:
    """Of the pairs of a stage's sources; `split` is "train" or "held_out"."""

    def __init__(self, files: dict[tuple[str, str], Path]) -> None:
        self._columns = {at: ColumnReader(file, "uint32", FRAME_ITEMS) for at, file in files.items()}

    def has(self, source: str, split: str) -> bool:
        return (source, split) in self._columns

    def of(self, samples: Sequence[Sample], rows: DeviceRows, split: str) -> Tensor:
        """As log-probabilities [rows, time] that sum to theirs: the chosen rows of the samples, then their rejected ones.

        Of rows that are filled up behind the samples' own, nothing.
        """
        pairs = len(rows.tokens) // 2
        found = np.zeros((2, pairs), np.float32)
        for at, (source, _, number) in enumerate(samples[:pairs]):
            found[:, at] = self._columns[source, split].read(2 * number, 2 * number + 2).astype("<u4").view("<f4")
        values = torch.from_numpy(found.reshape(-1)).to(rows.mask.device)
        return torch.zeros_like(rows.mask).scatter(1, last_place(rows.mask > 0)[:, None], values[:, None])

    def close(self) -> None:
        for column in self._columns.values():
            column.close()
