"""What the packing of documents into rows does to the loss: right after a boundary between two, elsewhere, and how many there are.

Metrics `train/loss_near_boundaries`, `train/loss_within_documents` and `data/documents_per_row`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.batches import DeviceRows
from trainer.objectives.loss import real

NEAR = 32
"""Tokens after a boundary that are near it."""
COUNT = 6
"""Numbers in `sums`."""


def near_boundaries(segments: Tensor, near: int = NEAR) -> Tensor:
    """Where fewer than `near` tokens lie between a token and a boundary before it in its row: [rows, time], bool.

    segments: [rows, time], each token's document by its number in the row, -1 padding. The beginning of a row is no boundary.
    """
    found = segments > 0
    # Documents lie one after the other, so one that holds the token `near` places before began too far back.
    found[:, near:] &= segments[:, near:] != segments[:, :-near]
    return found


def sums(policy: Tensor, rows: DeviceRows, near: Tensor | None = None) -> Tensor:
    """[COUNT], float32, to be added up over micro-batches and ranks, and read by `means`.

    policy: [rows, time], log-probabilities of the targets. near: of the same shape, where the rows hold a part of each row's
    time alone: `near_boundaries` of the whole rows, cut alike. Waits for no device.

    Negative log-likelihood and number of the tokens near a boundary that count, then of all others that do; documents, rows.
    """
    near = near_boundaries(rows.segments) if near is None else near
    lost = -real(policy.detach().float(), rows.mask) * rows.mask
    close = near.float()
    far = 1.0 - close
    # What fills up a batch has nothing that counts.
    filled = rows.mask.any(-1).float()
    documents = (rows.segments.amax(-1) + 1) * filled
    parts = (lost * close, rows.mask * close, lost * far, rows.mask * far, documents, filled)
    return torch.stack([part.sum() for part in parts])


def means(values: Sequence[float]) -> dict[str, float]:
    """The metrics of summed `sums`; none of what there was nothing of."""
    names = ("train/loss_near_boundaries", "train/loss_within_documents", "data/documents_per_row")
    pairs = zip(values[::2], values[1::2], strict=True)
    return {name: value / count for name, (value, count) in zip(names, pairs, strict=True) if count}
