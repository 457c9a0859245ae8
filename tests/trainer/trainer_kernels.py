"""Stand-ins for attention kernels that need a GPU: the same arguments, shapes and numbers, by scores that are all there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import varlen

from trainer.model import attention


class _Kernel:
    """Keeps what it was called with."""

    def __init__(self) -> None:
        self.bounds: list[tuple[Tensor, int]] = []

    def check(self) -> None:
        """What the kernel would have read past, had it been called so."""
        assert self.bounds
        for bounds, longest in self.bounds:
            assert bounds.dtype == torch.int32 and bounds[0] == 0 and int(bounds.diff().min()) >= 0
            assert isinstance(longest, int) and int(bounds.diff().max()) <= longest


class FlashAttn(_Kernel):
    """`flash_attn.flash_attn_varlen_func`, version 2.7, as far as it is used."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        causal: bool,
        alibi_slopes: Tensor | None,
        deterministic: bool,
    ) -> Tensor:
        assert causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        assert alibi_slopes is None or alibi_slopes.dtype == torch.float32
        self.bounds.append((cu_seqlens_q, max_seqlen_q))
        return by_documents(q, k, v, cu_seqlens_q, alibi_slopes)


class TorchsVarlen(_Kernel):
    """`torch.nn.attention.varlen.varlen_attn`, as far as it is used."""

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cu_seq_q: Tensor,
        cu_seq_k: Tensor,
        max_q: int,
        max_k: int,
        *,
        window_size: tuple[int, int] = (-1, -1),
        enable_gqa: bool = False,
    ) -> Tensor:
        assert cu_seq_q is cu_seq_k and max_q == max_k and window_size == (-1, 0)
        assert query.shape[-1] % 8 == 0 and (enable_gqa or query.shape[1] == key.shape[1])
        self.bounds.append((cu_seq_q, max_q))
        return by_documents(query, key, value, cu_seq_q)


def by_documents(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, slopes: Tensor | None = None) -> Tensor:
    """q [tokens, heads, head] over k and v [tokens, kv_heads, head]; asks tensors for no value."""
    assert q.is_contiguous() or q.stride(-1) == 1
    place = torch.arange(len(q))
    document = torch.searchsorted(bounds, place, right=True, out_int32=True)
    seen = (document[:, None] == document[None]) & (place[:, None] >= place[None])
    mask = torch.zeros(seen.shape)[None]
    if slopes is not None:
        mask = -slopes[:, None, None] * (place[:, None] - place[None]).abs()
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    mask = mask.masked_fill(~seen, float("-inf")).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[None], enable_gqa=True)[0].transpose(0, 1)


def use_kernels(patch: Any, flash: Callable[..., Tensor] | None, torchs: Callable[..., Tensor] | None = None) -> None:
    """As on a GPU with these installed. patch: pytest's, or something like it."""
    patch.setattr(attention, "flash_attn_varlen_func", flash)
    patch.setattr(attention, "runs_varlen", lambda device: True)
    if torchs is not None:
        patch.setattr(varlen, "varlen_attn", torchs)
    attention._torchs.cache_clear()
