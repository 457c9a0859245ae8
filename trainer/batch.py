"""A replica's share of the global batch, in micro-batches of which every replica has the same number."""

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


def share(position: int, global_batch: int, replica: int, replicas: int) -> tuple[int, int]:
    """The positions [start, stop) that a replica reads; together they read each once, in their order."""
    return position + replica * global_batch // replicas, position + (replica + 1) * global_batch // replicas


def samples_a_replica(global_batch: int, replicas: int) -> int:
    """Samples to which every replica's share is filled up with masked ones."""
    return -(-global_batch // replicas)


def filled(samples: int, size: int, pipeline: int) -> tuple[int, int]:
    """How many samples a replica is given, and how many a micro-batch has at the most.

    A pipeline of so many ranks needs as many micro-batches as it has ranks, or a multiple, all of one size.
    """
    if pipeline == 1:
        return samples, size
    size = min(size, -(-samples // pipeline))
    rounds = -(-samples // (size * pipeline))
    return rounds * pipeline * size, size


def micro_batches(batch: Batch, halves: int, samples: int, size: int, device: torch.device) -> Iterator[Rows]:
    """The batch filled up to `samples` samples, in parts of `size`, the last one of what is left.

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
