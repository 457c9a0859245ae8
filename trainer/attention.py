"""Causal attention in which documents packed into one row may be kept apart, by the best kernel at hand."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.ring import Blocks, ring_attention
from trainer.spread import Spread

try:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]
except ImportError:  # an extra, for GPUs only
    flash_attn_varlen_func = None


class Cached(Protocol):
    """A layer's keys and values of all earlier tokens, kept elsewhere."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q over what is kept and k and v, which are kept from here on; shapes as `attend` has them."""


class Visible(NamedTuple):
    """What each position may look at, and what distance costs. All None: itself and everything before it in its row."""

    mask: Tensor | None = None
    """[batch or 1, heads or 1, time, time]: true where row position i sees j; with ALiBi what is added to the score."""
    bounds: Tensor | None = None
    """[documents + 1], int32: where documents begin in the batch laid end to end, for the varlen kernel."""
    longest: int = 0
    """Tokens of the longest document."""
    slopes: Tensor | None = None
    """[heads], float32: ALiBi's, for the varlen kernel."""
    blocks: Blocks | None = None
    """The same for keys and values that go round."""
    cached: Cached | None = None
    """Where a sequence is continued token by token."""


def visible(
    segments: Tensor | None, batch: int, time: int, device: torch.device, dtype: torch.dtype, slopes: Tensor | None = None
) -> Visible:
    """For rows with the document of each token, [batch, time]; segments None: rows are one document each.

    dtype: of the attention's computing. slopes: ALiBi's, [heads].
    """
    if segments is None and slopes is None:
        return Visible()
    if flash_attn_varlen_func is not None and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return _bounds(torch.zeros(batch, time, device=device, dtype=torch.int32) if segments is None else segments, slopes)
    mask = torch.ones(time, time, dtype=torch.bool, device=device).tril()[None, None]
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    if slopes is None:
        return Visible(mask=mask)
    place = torch.arange(time, device=device)
    # Places in the row: within a document they are as far apart as its positions are, and across documents further.
    distance = (place[:, None] - place[None, :]).float()
    bias = -slopes[:, None, None] * distance
    return Visible(mask=bias[None].masked_fill(~mask, float("-inf")).to(dtype))


def _bounds(segments: Tensor, slopes: Tensor | None) -> Visible:
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    bounds = F.pad(starts, (0, 1), value=segments.numel()).to(torch.int32)
    return Visible(bounds=bounds, longest=int(bounds.diff().max()), slopes=slopes)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Visible, spread: Spread) -> Tensor:
    """Attention of q [batch, heads, time, head] over k and v [batch, kv_heads, time, head], groups of heads sharing them.

    The time is that of this rank's tokens, where context-parallel ranks share rows.
    """
    if seen.cached is not None:
        return seen.cached.attend(q, k, v)
    if spread.context.size == 1:
        return _attend(q, k, v, seen)
    if spread.ring:
        assert seen.blocks is not None
        return ring_attention(q, k, v, seen.blocks, spread.context)
    return spread.tokens(_attend(spread.heads(q), spread.heads(k), spread.heads(v), seen))


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Visible) -> Tensor:
    if seen.bounds is not None:
        return _varlen(q, k, v, seen)
    grouped = q.shape[1] != k.shape[1]
    if seen.mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen.mask, enable_gqa=grouped)


def _varlen(q: Tensor, k: Tensor, v: Tensor, seen: Visible) -> Tensor:
    batch, _, time, _ = q.shape
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    # The kernel wants float32; FSDP's mixed precision has cast the slopes along with a block's other arguments.
    slopes = None if seen.slopes is None else seen.slopes.float()
    kernel: Any = flash_attn_varlen_func
    out: Tensor = kernel(*flat, seen.bounds, seen.bounds, seen.longest, seen.longest, causal=True, alibi_slopes=slopes)
    return out.view(batch, time, *out.shape[1:]).transpose(1, 2)
