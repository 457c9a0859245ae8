"""What every objective returns, and how masked tokens are kept out of it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Loss = tuple[Tensor, Tensor, dict[str, Tensor]]
"""Summed loss, summed weight, and summed metrics by their names; all scalars on the device."""


def summed(values: Tensor, weights: Tensor, metrics: Mapping[str, Tensor]) -> Loss:
    """Values, weights and each metric of one shape, [rows, time] or [pairs]; metrics are weighed as the loss is."""
    return (values * weights).sum(), weights.sum(), {name: (value * weights).sum() for name, value in metrics.items()}


def real(x: Tensor, mask: Tensor) -> Tensor:
    """0 where the mask is 0: what stands there, be it NaN, reaches neither the value nor the gradient, as times 0 it would."""
    return x.masked_fill(mask == 0, 0)


def last_place(there: Tensor) -> Tensor:
    """The last place of each row that is there: bool [rows, time] -> int64 [rows]; 0 in a row that has none."""
    return (there * torch.arange(there.shape[-1], device=there.device)).amax(-1)
