"""Attention over keys and values that lie in pages.

On a GPU one kernel takes all of a step's tokens and follows the page tables itself: flash-attn's, or torch's own. Elsewhere, and
where neither takes the model, tokens that continue a sequence look up their pages and are computed together, and each piece of
a prompt by itself.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer import attention
from trainer.generate.request import Chunk

_SPREAD = 1.5
"""Sequences looked up together differ in length by this at the most: the shorter ones are filled up."""


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a step: a piece of a prompt, after `before` tokens that are cached already."""

    start: int
    stop: int
    before: int
    pages: Tensor
    """[pages]"""


@dataclass(frozen=True)
class Group:
    """Tokens of a step that continue a sequence each, of about the same length."""

    rows: Tensor
    """[sequences], their places among the step's tokens"""
    pages: Tensor
    """[sequences * pages]"""
    bias: Tensor
    """[kv_heads or 1, sequences, queries a kv_head or 1, tokens]: what is added to the scores."""


@dataclass(frozen=True)
class Tables:
    """For a kernel that follows pages: of each sequence in the step."""

    starts: Tensor
    """[sequences + 1], int32: where its tokens begin among the step's"""
    key_starts: Tensor
    """[sequences + 1], int32: the same of all its tokens"""
    lengths: Tensor
    """[sequences], int32: all its tokens"""
    pages: Tensor
    """[sequences, most pages], int32"""
    most: int
    """Tokens of a sequence in the step at the most."""
    longest: int
    """All tokens of a sequence at the most."""


@dataclass(frozen=True)
class Seen:
    """What a step's tokens see; the same for all layers."""

    slots: Tensor
    """[tokens]: page * size + place, where each one's key and value go."""
    groups: tuple[Group, ...] = ()
    pieces: tuple[Piece, ...] = ()
    tables: Tables | None = None
    slopes: Tensor | None = None
    """[heads], float32: ALiBi's."""


class Pages:
    """The cache: keys and values of all layers."""

    def __init__(self, layers: int, kv_heads: int, head: int, count: int, size: int, like: Tensor) -> None:
        """like: of the type and on the device that keys and values have."""
        self._all = like.new_zeros(2, layers, kv_heads, count, size, head)

    @property
    def bytes(self) -> int:
        return self._all.numel() * self._all.element_size()

    def layer(self, number: int, seen: Seen) -> Layer:
        return Layer(self._all[0, number], self._all[1, number], seen)


@dataclass(frozen=True)
class Layer:
    """One layer's part of the cache in one step; what `trainer.attention` turns to for keys and values that are not there."""

    keys: Tensor
    """[kv_heads, pages, size, head]"""
    values: Tensor
    seen: Seen

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, heads, tokens, head], k and v [1, kv_heads, tokens, head] -> [1, heads, tokens, head]; keeps k and v."""
        seen = self.seen
        for held, new in ((self.keys, k), (self.values, v)):
            held.flatten(1, 2).index_copy_(1, seen.slots, new[0])
        if seen.tables is not None:
            return self._by_kernel(q, seen.tables)
        out = torch.empty_like(q)
        for group in seen.groups:
            out[0, :, group.rows] = self._continued(q[0, :, group.rows], group)
        for piece in seen.pieces:
            out[0, :, piece.start : piece.stop] = self._begun(q, k, v, piece)
        return out

    def _continued(self, q: Tensor, group: Group) -> Tensor:
        """q [heads, sequences, head] -> the same; each token sees all of its own sequence."""
        heads, count, head = q.shape
        kv_heads = len(self.keys)
        keys, values = (held.index_select(1, group.pages).view(kv_heads, count, -1, head) for held in (self.keys, self.values))
        grouped = q.view(kv_heads, heads // kv_heads, count, head).transpose(1, 2)
        if q.dtype == torch.float32:
            # As products of matrices: with so few queries that is faster than the fused kernel.
            bias = group.bias.expand(kv_heads, count, group.bias.shape[2], -1).flatten(0, 1)
            scores = torch.baddbmm(bias, grouped.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2), alpha=1 / math.sqrt(head))
            found = torch.bmm(scores.softmax(-1), values.flatten(0, 1)).view(kv_heads, count, -1, head)
        else:
            found = F.scaled_dot_product_attention(grouped, keys, values, attn_mask=group.bias.to(q.dtype))
        return found.transpose(1, 2).reshape(heads, count, head)

    def _begun(self, q: Tensor, k: Tensor, v: Tensor, piece: Piece) -> Tensor:
        """[heads, tokens of the piece, head]"""
        mine = slice(piece.start, piece.stop)
        count, slopes = piece.stop - piece.start, self.seen.slopes
        grouped = q.shape[1] != k.shape[1]
        if not piece.before and slopes is None:
            own = [each[:, :, mine] for each in (q, k, v)]
            return F.scaled_dot_product_attention(own[0], own[1], own[2], is_causal=True, enable_gqa=grouped)[0]
        length = piece.before + count
        keys, values = (held.index_select(1, piece.pages).flatten(1, 2)[None, :, :length] for held in (self.keys, self.values))
        places = torch.arange(length, device=q.device)
        distance = places[piece.before :, None] - places[None, :]
        mask = distance >= 0
        if slopes is not None:
            mask = (-slopes[:, None, None] * distance).masked_fill(~mask, -math.inf).to(q.dtype)
        return F.scaled_dot_product_attention(q[:, :, mine], keys, values, attn_mask=mask, enable_gqa=grouped)[0]

    def _by_kernel(self, q: Tensor, tables: Tables) -> Tensor:
        flat = q[0].transpose(0, 1).contiguous()
        keys, values = (held.permute(1, 2, 0, 3) for held in (self.keys, self.values))
        kernel = _flash()
        if kernel is not None:
            out = kernel(
                flat, keys, values, tables.starts, tables.key_starts, tables.most, tables.longest,
                causal=True, block_table=tables.pages, alibi_slopes=self.seen.slopes,
            )  # fmt: skip
        else:
            out = _torch_kernel()(
                flat, keys, values, tables.starts, None, tables.most, tables.longest,
                window_size=(-1, 0), enable_gqa=q.shape[1] != len(self.keys), seqused_k=tables.lengths, block_table=tables.pages,
            )  # fmt: skip
        found: Tensor = out
        return found.transpose(0, 1)[None]


def _flash() -> Any:
    return vars(attention)["flash_attn_varlen_func"]


@cache
def _torch_kernel() -> Any:
    """Torch's own kernel that follows pages, where this torch has one."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "block_table" in inspect.signature(varlen_attn).parameters else None


def kernel_serves(device: torch.device, dtype: torch.dtype, alibi: bool) -> bool:
    """Whether a kernel that follows page tables takes such a model."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return _flash() is not None or (_torch_kernel() is not None and not alibi)


def grouped(chunks: Items[Chunk], size: int, slopes: Tensor | None, kv_heads: int, device: torch.device) -> tuple[Group, ...]:
    """Chunks of one token, the step's first, in groups of about the same length. size: tokens of a page."""
    order = sorted(range(len(chunks)), key=lambda at: -chunks[at].stop)
    found, start = [], 0
    while start < len(order):
        stop = start
        while stop < len(order) and chunks[order[stop]].stop * _SPREAD >= chunks[order[start]].stop:
            stop += 1
        rows = order[start:stop]
        found.append(_group(rows, [chunks[at] for at in rows], size, slopes, kv_heads, device))
        start = stop
    return tuple(found)


def _group(rows: list[int], chunks: list[Chunk], size: int, slopes: Tensor | None, kv_heads: int, device: torch.device) -> Group:
    most = -(-chunks[0].stop // size)
    table = torch.tensor([filled(chunk.sequence.pages[:most], most) for chunk in chunks], device=device)
    lengths = torch.tensor([chunk.stop for chunk in chunks], device=device)
    # How far each token looks back, [1, sequences, 1, tokens]; what is not there yet lies ahead.
    behind = lengths[None, :, None, None] - 1 - torch.arange(most * size, device=device)
    bias = torch.zeros(behind.shape, device=device)
    if slopes is not None:
        bias = -slopes.view(kv_heads, 1, -1, 1) * behind
    bias = bias.masked_fill(behind < 0, -math.inf)
    return Group(torch.tensor(rows, device=device), table.flatten(), bias)


def tables(chunks: Items[Chunk], device: torch.device) -> Tables:
    """What a kernel that follows pages is told of a step's chunks."""
    counts = [chunk.stop - chunk.start for chunk in chunks]
    lengths = [chunk.stop for chunk in chunks]
    widest = max(len(chunk.sequence.pages) for chunk in chunks)

    def tensor(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    starts, key_starts = ([0, *itertools.accumulate(each)] for each in (counts, lengths))
    pages = [filled(chunk.sequence.pages, widest) for chunk in chunks]
    return Tables(tensor(starts), tensor(key_starts), tensor(lengths), tensor(pages), max(counts), max(lengths))


def filled(pages: list[int], length: int) -> list[int]:
    """With the page that is nobody's at its end."""
    return [*pages, *[0] * (length - len(pages))]
