"""Causal attention in which documents packed into one row may be kept apart, by the best kernel at hand."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.distributed.ring_attention import RingBlocks, ring_attention
from trainer.distributed.sequence_parallel import SequenceSharding
from trainer.document_offsets import Documents, undivided

try:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found]  # an extra, for GPUs only
except ImportError:
    flash_attn_varlen_func = None

WIDEST = 256
"""Of a head, that the varlen kernels take."""

Varlen = Callable[[Tensor, Tensor, Tensor, "Visible"], Tensor]
"""Of queries [tokens, heads, head], keys and values [tokens, kv_heads, head], and what they see: [tokens, heads, head]."""


class Cached(Protocol):
    """A layer's keys and values of all earlier tokens, kept elsewhere."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of q over what is kept and k and v, which are kept from here on; shapes as `attend` has them."""


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
    kernel: Varlen | None = None
    """The varlen kernel, where there are bounds."""
    blocks: RingBlocks | None = None
    """The same for keys and values that go round."""
    cached: Cached | None = None
    """Where a sequence is continued token by token."""


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
    if documents is not None and (kernel := _varlen_kernel(device, dtype, head, slopes is not None)) is not None:
        bounds, longest = documents.bounds(time, length)
        return Visible(bounds=bounds, longest=longest, slopes=slopes, kernel=kernel)
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


def _varlen_kernel(device: torch.device, dtype: torch.dtype, head: int, slopes: bool) -> Varlen | None:
    """flash-attn's where it is installed, else torch's own, which knows no slopes; None where neither takes this."""
    if dtype not in (torch.bfloat16, torch.float16) or head > WIDEST or not runs_varlen(device):
        return None
    if flash_attn_varlen_func is not None:
        return _flash_attn
    return None if slopes or head % 8 else _torchs()


@functools.cache
def runs_varlen(device: torch.device) -> bool:
    """Both were written for Ampere and what came after."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def attend(q: Tensor, k: Tensor, v: Tensor, seen: Visible, sharding: SequenceSharding) -> Tensor:
    """Attention of q [batch, heads, time, head] over k and v [batch, kv_heads, time, head], groups of heads sharing them.

    The time is that of this rank's tokens, where context-parallel ranks share rows.
    """
    if seen.cached is not None:
        return seen.cached.attend(q, k, v)
    if sharding.context.size == 1:
        return _attend(q, k, v, seen)
    if sharding.ring:
        assert seen.blocks is not None
        return ring_attention(q, k, v, seen.blocks, sharding.context)
    q, k, v = sharding.heads(q, k, v)
    return sharding.tokens(_attend(q, k, v, seen))


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Visible) -> Tensor:
    if seen.bounds is not None:
        return _varlen(q, k, v, seen)
    grouped = q.shape[1] != k.shape[1]
    if seen.mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen.mask, enable_gqa=grouped)


def _varlen(q: Tensor, k: Tensor, v: Tensor, seen: Visible) -> Tensor:
    assert seen.kernel is not None
    batch, _, time, _ = q.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    out = seen.kernel(q, k, v, seen)
    return out.view(batch, time, *out.shape[1:]).transpose(1, 2)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, seen: Visible) -> Tensor:
    # The kernel wants float32; FSDP's mixed precision has cast the slopes along with a block's other arguments.
    slopes = None if seen.slopes is None else seen.slopes.float()
    out: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        seen.bounds,
        seen.bounds,
        seen.longest,
        seen.longest,
        causal=True,
        alibi_slopes=slopes,
        deterministic=torch.are_deterministic_algorithms_enabled(),  # unlike torch's, it does not look for itself
    )
    return out


@functools.cache
def _torchs() -> Varlen | None:
    """Imported where it is wanted, as it brings the compiler along; None where it is not yet as it is called here."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return None

    def kernel(q: Tensor, k: Tensor, v: Tensor, seen: Visible) -> Tensor:
        assert seen.bounds is not None
        ends, longest, grouped = seen.bounds, seen.longest, q.shape[1] != k.shape[1]
        # A window without an end to the left, and with nothing to the right: causal.
        return cast(Tensor, varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=grouped))

    return kernel
