"""A replica's share of the global batch, in micro-batches of which every replica has the same number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards.feed import Batch
from trainer import documents
from trainer.documents import Documents


class Rows(NamedTuple):
    """Rows of a batch on the device, all but `documents` [rows, time]."""

    tokens: Tensor
    targets: Tensor
    mask: Tensor
    """1 where the target counts."""
    segments: Tensor
    positions: Tensor
    documents: Documents | None = None
    """Where those of the segments begin, where the host knows it."""


def of_one(tokens: Tensor, targets: Tensor, mask: Tensor, segments: Tensor) -> Rows:
    """Rows that hold one document each, and padding."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return Rows(tokens, targets, mask, segments, positions, documents.undivided(len(tokens), tokens.shape[1], tokens.device))


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
    What is filled up has no targets that count, so it weighs nothing, and keeps ranks in step. Waits for no device.
    """
    time = batch.tokens.shape[1]
    arrays: tuple[NDArray[Any], ...] = (batch.tokens, batch.targets, batch.mask, batch.segments, batch.positions)
    whole = [np.zeros((halves, samples, time), array.dtype) for array in arrays]
    for rows, array in zip(whole, arrays, strict=True):
        there = array.reshape(halves, -1, time)[:, :samples]
        rows[:, : there.shape[1]] = there
    starts, longest = documents.found(whole[3].reshape(-1, time))
    whole.append(starts.reshape(halves, samples, -1))
    for start in range(0, samples, size):
        tokens, targets, mask, segments, positions, begun = (_sent(rows[:, start : start + size], device) for rows in whole)
        yield Rows(tokens, targets, mask, segments, positions, Documents(begun, longest))


def _sent(rows: NDArray[Any], device: torch.device) -> Tensor:
    """[halves, samples, ...] to the device, one half behind the other."""
    found = torch.from_numpy(rows.reshape(-1, rows.shape[-1]))
    # Out of pageable memory a copy may wait for what the device has been asked before.
    return (found.pin_memory() if device.type == "cuda" else found).to(device, non_blocking=True)
