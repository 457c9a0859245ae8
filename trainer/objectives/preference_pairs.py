"""Pairs of a chosen and a rejected response: rows [2 pairs, time], the chosen ones, then the rejected ones in the same order."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from torch import Tensor

from trainer.batches import DeviceRows
from trainer.objectives.loss import real
from trainer.objectives.metrics import PREFERENCE

METRICS = tuple(PREFERENCE)


def complete(mask: Tensor) -> Tensor:
    """Which pairs have both responses, bool [pairs], from a mask [2 pairs, time]. Only these are learned from.

    Nothing can be preferred to an empty response: its log-probability is 0 whatever the model, so the loss would only raise or
    lower the other one.
    """
    chosen, rejected = mask.any(-1).chunk(2)
    return chosen & rejected


def responses(log_probs: Tensor, rows: DeviceRows, length_normalised: bool = False) -> Tensor:
    """Log-probability of each row's response, summed over its tokens, or their mean: [rows]; 0 of an empty one."""
    found = real(log_probs, rows.mask).sum(-1)
    return found / rows.mask.sum(-1).clamp(min=1) if length_normalised else found


def weight(mask: npt.NDArray[np.float32]) -> float:
    """Pairs that have both responses."""
    chosen, rejected = np.split(mask.any(-1), 2)
    return float((chosen & rejected).sum())
