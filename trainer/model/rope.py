"""Rotary positions: the frequencies of each dimension, stretched past the length of pretraining, and the rotation itself.

Frequencies and attention temperatures are those of Hugging Face transformers (`modeling_rope_utils.py`), which is the
reference to match: other codebases clamp YaRN's ramp elsewhere or leave the temperature out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from midwatch.recipe.model import Rope
from trainer.transfer import sent


def frequencies(
    rope: Rope, head: int, theta: float, original_context: int, length: int = 0, device: torch.device | None = None
) -> tuple[Tensor, float]:
    """Radians a position for each pair of dimensions, [head / 2], and the factor on cosines and sines.

    theta: the base where `rope` has none of its own. length: tokens of the row, which only `dynamic` and `longrope` look at.

    none: Su et al. 2021, equation 15. linear: Chen et al. 2023, positions divided by the factor. ntk: a base grown by
    factor^(head / (head - 2)), fixed. dynamic: the same, grown with rows longer than the original context. yarn: Peng et al.
    2023, section 3.2 and, for the temperature, 0.1 ln(factor) + 1, equation 22. llama3: Dubey et al. 2024, section 2, in Meta's
    published code. longrope: Ding et al. 2024, divisors for short and for long rows. proportional: only the first part turns.
    """
    base = rope.theta if rope.theta is not None else theta
    exponents = torch.arange(0, head, 2, dtype=torch.int64).float() / head
    scale = 1.0
    if rope.kind == "none":
        found = 1.0 / base**exponents
    elif rope.kind == "linear":
        found = 1.0 / base**exponents / rope.factor
    elif rope.kind == "ntk":
        found = 1.0 / (base * rope.factor ** (head / (head - 2))) ** exponents
    elif rope.kind == "dynamic":
        over = max(length, original_context) / original_context
        found = 1.0 / (base * (rope.factor * over - (rope.factor - 1)) ** (head / (head - 2))) ** exponents
    elif rope.kind == "yarn":
        found, scale = _yarn(rope, head, base, original_context)
    elif rope.kind == "llama3":
        found = _llama3(rope, 1.0 / base**exponents, original_context)
    elif rope.kind == "longrope":
        divisors = torch.tensor(rope.long_factor if length > original_context else rope.short_factor)
        found = 1.0 / (divisors * base**exponents)
        scale = math.sqrt(1 + math.log(rope.factor) / math.log(original_context)) if rope.factor > 1 else 1.0
    else:
        turning = torch.arange(head // 2) < int(rope.partial_rotary_factor * head // 2)
        found = torch.where(turning, 1.0 / base**exponents, 0.0) / rope.factor
    if rope.attention_factor is not None and rope.kind in ("yarn", "longrope"):
        scale = rope.attention_factor
    return found if device is None else sent(found, device), scale


def _yarn(rope: Rope, head: int, base: float, original_context: int) -> tuple[Tensor, float]:
    def dimension(rotations: float) -> float:
        return head * math.log(original_context / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head // 2).float() - low) / (high - low)).clamp(0, 1)
    plain = 1.0 / base ** (torch.arange(0, head, 2).float() / head)
    return plain / rope.factor * ramp + plain * (1 - ramp), 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0


def _llama3(rope: Rope, plain: Tensor, original_context: int) -> Tensor:
    """Long wavelengths are interpolated, short ones left alone, those between go over from one to the other."""
    turns = original_context * plain / (2 * math.pi)
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def angles(positions: Tensor, frequency: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines for positions [batch, time]: each [batch, 1, time, head], in float32."""
    turned = positions[:, None, :, None].float() * frequency
    both = torch.cat((turned, turned), dim=-1)
    return both.cos() * scale, both.sin() * scale


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates [batch, heads, time, head], a dimension of the first half with its counterpart in the second."""
    turned: Tensor = _Rotation.apply(x, cos, sin)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return turned


class _Rotation(torch.autograd.Function):
    """Its gradient is the rotation the other way, which costs less than that of each of its operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(gradient, cos, -sin), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (x1, x2), (sin1, sin2), out = x.chunk(2, dim=-1), sin.chunk(2, dim=-1), x * cos
    y1, y2 = out.chunk(2, dim=-1)
    y1.addcmul_(x2, sin1, value=-1)
    y2.addcmul_(x1, sin2)
    return out.to(x.dtype)
