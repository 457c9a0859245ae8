"""Positions that are added: sinusoids and learned rows to the embedding, ALiBi's slopes to the attention's scores."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """[batch, time] -> [batch, time, width], sines and cosines in turn: Vaswani et al. 2017, section 3.5. In float32."""
    frequency = torch.exp(torch.arange(0, width, 2, device=positions.device).float() * (-math.log(10_000.0) / width))
    angle = positions[..., None].float() * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def learned(table: Tensor, positions: Tensor, factor: float) -> Tensor:
    """Rows of the table [rows, width] at positions [batch, time] over the factor, read between its rows; its last beyond.

    Chen et al. 2023, section 3.2, for a table: position p of a context `factor` times as long is where p / factor was.
    """
    last = table.shape[0] - 1
    if factor == 1.0:
        return F.embedding(positions.clamp(max=last), table)
    place = (positions / factor).clamp(max=last)
    below = place.floor()
    part = (place - below)[..., None].to(table.dtype)
    low = below.long()
    first, second = F.embedding(low, table), F.embedding((low + 1).clamp(max=last), table)
    return first + (second - first) * part


def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """What each head takes off a score for each position of distance, [heads], float32: Press et al. 2022, section 3.

    Powers of 2 ** (-8 / heads); for numbers of heads that are no power of two those of the next lower one, and every other of
    the next higher one, as in the authors' code and in BLOOM.
    """
    lower = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * n / lower) for n in range(1, lower + 1)]
    slopes += [2.0 ** (-4.0 * n / lower) for n in range(1, 2 * (heads - lower) + 1, 2)]
    return torch.tensor(slopes, device=device)
