"""Rotary positions: the frequencies of each dimension, stretched past the length of pretraining, and the rotation itself.

Frequencies and YaRN's attention temperature are those of Hugging Face transformers (`modeling_rope_utils.py`), which is the
reference to match: other codebases clamp YaRN's ramp elsewhere or leave the temperature out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from launcher.recipe.model import Rope


def frequencies(rope: Rope, head: int, theta: float, original_context: int) -> tuple[Tensor, float]:
    """Radians a position for each pair of dimensions, [head / 2], and the factor on cosines and sines.

    none: Su et al. 2021, equation 15. linear: Chen et al. 2023, positions divided by the factor. ntk: a base grown by
    factor^(head / (head - 2)), fixed, where transformers' `dynamic` grows it with the sequence. yarn: Peng et al. 2023,
    section 3.2 and, for the temperature, 0.1 ln(factor) + 1, equation 22.
    """
    exponents = torch.arange(0, head, 2, dtype=torch.int64).float() / head
    factor = rope.factor
    if rope.kind == "ntk":
        theta = theta * factor ** (head / (head - 2))
    plain = 1.0 / theta**exponents
    if rope.kind == "linear":
        return plain / factor, 1.0
    if rope.kind != "yarn":
        return plain, 1.0
    low, high = _ramp_ends(rope, head, theta, original_context)
    ramp = ((torch.arange(head // 2).float() - low) / (high - low)).clamp(0, 1)
    stretched = plain / factor * ramp + plain * (1 - ramp)
    return stretched, 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _ramp_ends(rope: Rope, head: int, theta: float, original_context: int) -> tuple[float, float]:
    """The dimensions between which YaRN goes over from leaving alone to interpolating."""

    def dimension(rotations: float) -> float:
        return head * math.log(original_context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high = min(math.ceil(dimension(rope.beta_slow)), head - 1)
    return float(low), high + 0.001 if low == high else float(high)


def angles(positions: Tensor, frequency: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions [batch, time]: each [batch, 1, time, head], in float32."""
    turned = positions[:, None, :, None].float() * frequency
    both = torch.cat((turned, turned), dim=-1)
    return both.cos() * scale, both.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [batch, heads, time, head], a dimension of the first half with its counterpart in the second."""
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x * cos + turned * sin).to(x.dtype)
