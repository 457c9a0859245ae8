"""Causal attention in which documents packed into one row may be kept apart, by the best kernel at hand."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.documents import Documents, undivided
from trainer.ring import Blocks, ring_attention
from trainer.spread import Spread

try:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]  # an extra, for GPUs only
except ImportError:
    flash_attn_varlen_func = None

WIDEST = 256
"""Of a head, that the varlen kernels take."""


class Visible(NamedTuple):
    """What each position may look at, and what distance costs. All None: itself and everything before it in its row."""

    mask: Tensor | None = None
    """[batch or 1, heads or 1, time, time]: true where row position i sees j; with ALiBi what is added to the score."""
    bounds: Tensor | None = None
    """[documents + 1], int32: where documents begin in the batch laid end to end, for the varlen kernel; some may be empty."""
    longest: int = 0
    """Tokens of the longest document, or more."""
    slopes: Tensor | None = None
    """[heads], float32: ALiBi's, for the varlen kernel."""
    blocks: Blocks | None = None
    """The same for keys and values that go round."""


def visible(
    segments: Tensor | None,
    documents: Documents | None,
    rows: tuple[int, int],
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    head: int,
    slopes: Tensor | None = None,
) -> Visible:
    """For rows of (batch, time), filled up to `length`, in each of which documents are kept apart; waits for no device.

    segments: the document of each token, [batch, length]; None: rows are one document each. documents: the same, where the host
    knows it; else kernels that want it are not used. dtype, head: of the attention's computing, and how wide a head is. slopes:
    ALiBi's, [heads].
    """
    if segments is None and slopes is None:
        return Visible()
    batch, time = rows
    if segments is None:
        documents = undivided(batch, time, device)
    if documents is not None and _takes_bounds(device, dtype, head, slopes is not None):
        bounds, longest = documents.bounds(time, length)
        return Visible(bounds=bounds, longest=longest, slopes=slopes)
    mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    if slopes is None:
        return Visible(mask=mask)
    place = torch.arange(length, device=device)
    # Places in the row: within a document they are as far apart as its positions are, and across documents further.
    distance = (place[:, None] - place[None, :]).float()
    bias = -slopes[:, None, None] * distance
    return Visible(mask=bias[None].masked_fill(~mask, float("-inf")).to(dtype))


def _takes_bounds(device: torch.device, dtype: torch.dtype, head: int, slopes: bool) -> bool:
    """Whether there is a varlen kernel for this: flash-attn's, else torch's own."""
    if dtype not in (torch.bfloat16, torch.float16) or head > WIDEST or not _runs_varlen(device):
        return False
    return flash_attn_varlen_func is not None


@functools.cache
def _runs_varlen(device: torch.device) -> bool:
    """Both were written for Ampere and what came after."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Visible, spread: Spread) -> Tensor:
    """Attention of q [batch, heads, time, head] over k and v [batch, kv_heads, time, head], groups of heads sharing them.

    The time is that of this rank's tokens, where context-parallel ranks share rows.
    """
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
