"""Causal attention in which documents packed into one row may be kept apart, by the best kernel at hand."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
except ImportError:  # an extra, for GPUs only
    flash_attn_varlen_func = None


class Visible(NamedTuple):
    """What each position may look at. All None: itself and everything before it in its row."""

    mask: Tensor | None = None
    """[batch, 1, time, time], true where row position i sees j."""
    bounds: Tensor | None = None
    """[documents + 1], int32: where documents begin in the batch laid end to end, for the varlen kernel."""
    longest: int = 0
    """Tokens of the longest document."""


def visible(segments: Tensor | None, half_precision: bool = False) -> Visible:
    """From the document of each position, [batch, time]; None: rows are one document each."""
    if segments is None:
        return Visible()
    if flash_attn_varlen_func is not None and segments.is_cuda and half_precision:
        return _bounds(segments)
    time = segments.shape[1]
    causal = torch.ones(time, time, dtype=torch.bool, device=segments.device).tril()
    return Visible(mask=(segments[:, None, :, None] == segments[:, None, None, :]) & causal)


def _bounds(segments: Tensor) -> Visible:
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    bounds = F.pad(starts, (0, 1), value=segments.numel()).to(torch.int32)
    return Visible(bounds=bounds, longest=int(bounds.diff().max()))


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Visible) -> Tensor:
    """Attention of q [batch, heads, time, head] over k and v [batch, kv_heads, time, head], groups of heads sharing them."""
    if seen.bounds is not None:
        return _varlen(q, k, v, seen)
    grouped = q.shape[1] != k.shape[1]
    if seen.mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen.mask, enable_gqa=grouped)


def _varlen(q: Tensor, k: Tensor, v: Tensor, seen: Visible) -> Tensor:
    batch, _, time, _ = q.shape
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    kernel: Any = flash_attn_varlen_func
    out: Tensor = kernel(*flat, seen.bounds, seen.bounds, seen.longest, seen.longest, causal=True)
    return out.view(batch, time, *out.shape[1:]).transpose(1, 2)
