"""A rank's share of the global batch, in micro-batches of which every rank has the same number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from shards.feed import Batch


class Rows(NamedTuple):
    """Rows of a batch on the device, all [rows, time]."""

    tokens: Tensor
    targets: Tensor
    mask: Tensor
    """1 where the target counts."""
    segments: Tensor
    positions: Tensor


def share(position: int, global_batch: int, rank: int, world: int) -> tuple[int, int]:
    """The positions [start, stop) that a rank reads; together the ranks read each once, in their order."""
    return position + rank * global_batch // world, position + (rank + 1) * global_batch // world


def samples_a_rank(global_batch: int, world: int) -> int:
    """Samples to which every rank's share is filled up with masked ones."""
    return -(-global_batch // world)


def micro_batches(batch: Batch, halves: int, samples: int, size: int, device: torch.device) -> Iterator[Rows]:
    """The batch filled up to `samples` samples, in parts of at most `size`.

    halves: rows of a sample; 2 for pairs, of which each part holds the chosen rows of its samples, then their rejected ones.
    What is filled up has no targets that count, so it weighs nothing, and keeps ranks in step.
    """
    arrays = (batch.tokens, batch.targets, batch.mask, batch.segments, batch.positions)
    have, time = len(batch.tokens) // halves, batch.tokens.shape[1]
    for start in range(0, samples, size):
        stop = min(start + size, samples)
        parts = []
        for array in arrays:
            rows = np.zeros((halves, stop - start, time), array.dtype)
            there = array.reshape(halves, have, time)[:, start : min(stop, have)]
            rows[:, : there.shape[1]] = there
            parts.append(torch.from_numpy(rows.reshape(-1, time)).to(device, non_blocking=True))
        yield Rows(*parts)
