"""A replica's share of the global batch, in micro-batches of which every replica has the same number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midwatch.recipe import Recipe, Stage
from shards.sampling.batches import Batch
from trainer import document_offsets as documents
from trainer.document_offsets import Documents
from trainer.transfer import sent

LENGTHS = 16
"""Of which rows that are cut behind their ends have a multiple."""


class DeviceRows(NamedTuple):
    """Rows of a batch on the device, all but `documents` [rows, time]."""

    tokens: Tensor
    targets: Tensor
    mask: Tensor
    """1 where the target counts."""
    segments: Tensor
    positions: Tensor
    documents: Documents | None = None
    """Where those of the segments begin, where the host knows it."""


def of_one(tokens: Tensor, targets: Tensor, mask: Tensor, segments: Tensor) -> DeviceRows:
    """Rows that hold one document each, and padding."""
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    return DeviceRows(tokens, targets, mask, segments, positions, documents.undivided(len(tokens), tokens.shape[1], tokens.device))


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


def micro_batches(
    batch: Batch, halves: int, samples: int, size: int, device: torch.device, trims: bool = False
) -> Iterator[DeviceRows]:
    """The batch filled up to `samples` samples, in parts of `size`, the last one of what is left.

    halves: rows of a sample; 2 for pairs, of which each part holds the chosen rows of its samples, then their rejected ones.
    trims: each part is as long as its longest row, about. What is filled up has no targets that count, so it weighs nothing, and
    keeps ranks in step. Waits for no device.
    """
    time = batch.tokens.shape[1]
    arrays: tuple[NDArray[Any], ...] = (batch.tokens, batch.targets, batch.mask, batch.segments, batch.positions)
    whole = [np.zeros((halves, samples, time), array.dtype) for array in arrays]
    for rows, array in zip(whole, arrays, strict=True):
        there = array.reshape(halves, -1, time)[:, :samples]
        rows[:, : there.shape[1]] = there
    real = batch.segments.reshape(halves, -1, time)
    for start in range(0, samples, size):
        length = trimmed(real[:, start : start + size]) if trims else time
        parts = [rows[:, start : start + size, :length] for rows in whole]
        # Of the whole batch where rows keep their length: a pipeline joins its micro-batches again.
        starts, longest = documents.found((parts[3] if trims else whole[3]).reshape(-1, length))
        begun = starts.reshape(halves, -1, starts.shape[-1])
        begun = begun if trims else begun[:, start : start + size]
        tokens, targets, mask, segments, positions, documented = (_sent(part, device) for part in (*parts, begun))
        yield DeviceRows(tokens, targets, mask, segments, positions, Documents(documented, longest))


def trimmed(segments: NDArray[np.int32]) -> int:
    """As long as the longest of these rows [..., time], rounded up: of a few lengths only, and not longer than they are."""
    time = segments.shape[-1]
    used = np.flatnonzero((segments >= 0).reshape(-1, time).sum(0))
    longest = int(used[-1]) + 1 if len(used) else 1
    return int(min(time, -(-longest // LENGTHS) * LENGTHS))


def may_trim(recipe: Recipe, stage: Stage) -> bool:
    """Whether rows may be shorter than the context: not where a shape costs much the first time, nor where positions go by it."""
    kind = (stage.rope or recipe.model.rope).kind
    return recipe.parallel.pipeline == 1 and not recipe.model.compile and kind not in ("dynamic", "longrope")


def _sent(rows: NDArray[Any], device: torch.device) -> Tensor:
    """[halves, samples, ...] to the device, one half behind the other."""
    return sent(torch.from_numpy(rows.reshape(-1, rows.shape[-1])), device)
