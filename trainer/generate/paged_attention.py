"""Attention over keys and values that lie in pages.

On a GPU one kernel takes all of a step's tokens and follows the page tables itself: flash-attn's, or torch's own. Elsewhere, and
where neither takes the model, tokens that continue a sequence see each of its pages by itself, where it lies, and then what they
saw is put together; each piece of a prompt is computed alone.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.generate.request import TokenChunk
from trainer.model import attention
from trainer.transfer import on_device, sent

_GAP, _DENSE, _FEW = 32, 2, 16
"""Pages are seen where they lie if no more are missing between two of them, if those from the first to the last are so many times
as many at the most, and if they are not fewer; else they are copied."""


PAGE_UNIT = 256
"""Tokens of which a page has a multiple for kernels that follow page tables."""


@dataclass(frozen=True)
class PromptChunk:
    """Tokens [start, stop) of a step: a piece of a prompt, after `before` tokens that are cached already."""

    start: int
    stop: int
    before: int
    pages: Tensor
    """[pages]"""


@dataclass(frozen=True)
class PageGather:
    """Some pages, and who looks at each."""

    pages: slice | Tensor
    """One after another, as they lie in the cache; or anywhere, [pages], to be laid side by side first."""
    rows: Tensor
    """[pages], the sequence that sees it"""
    bias: Tensor
    """[pages, kv_heads or 1, queries a kv_head or 1, size]: what is added to the scores."""


@dataclass(frozen=True)
class DecodeMetadata:
    """The step's first tokens, which continue a sequence each: what every page shows them, and how that is put together."""

    count: int
    seen: tuple[PageGather, ...]
    table: Tensor
    """[sequences, most pages]: places of a sequence's pages among all that are seen; its first one's, where it has no more."""
    lacking: Tensor
    """[sequences, most pages, 1, 1, 1]: minus infinity where it has no more, else 0."""


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
class AttentionMetadata:
    """What a step's tokens see; the same for all layers."""

    rows: Tensor
    """[tokens * kv_heads]: of the cache seen as rows of one head each, where each one's keys and values go."""
    continued: DecodeMetadata | None = None
    pieces: tuple[PromptChunk, ...] = ()
    tables: Tables | None = None
    slopes: Tensor | None = None
    """[heads], float32: ALiBi's."""
    begun: Tensor | None = None
    """[pages] into which the step writes for the first time since they were given to a sequence; None: none. They are cleared:
    what is masked still counts if it is NaN, and it is if a damaged policy had the page before."""


class Pages:
    """The cache: keys and values of all layers."""

    def __init__(self, layers: int, kv_heads: int, head: int, count: int, size: int, like: Tensor) -> None:
        """like: of the type and on the device that keys and values have."""
        self._all = like.new_zeros(2, layers, count, kv_heads, size, head)
        self._rooms = (Room(), Room())

    @property
    def bytes(self) -> int:
        return self._all.numel() * self._all.element_size()

    def layer(self, number: int, seen: AttentionMetadata) -> Layer:
        return Layer(self._all[0, number], self._all[1, number], seen, self._rooms)


class Room:
    """Where pages are laid side by side, for one layer after another: memory that is new each time costs more than the copying."""

    def __init__(self) -> None:
        self._all: Tensor | None = None

    def lay(self, held: Tensor, pages: Tensor) -> Tensor:
        """Those pages of held [all pages, kv_heads, size, head], until it is next called."""
        if self._all is None or len(self._all) < len(pages):
            self._all = held.new_empty(len(pages) + len(pages) // 4, *held.shape[1:])
        return torch.index_select(held, 0, pages, out=self._all[: len(pages)])


@dataclass(frozen=True)
class Layer:
    """One layer's part of the cache in one step; what `trainer.model.attention` turns to for keys and values that are not there."""

    keys: Tensor
    """[pages, kv_heads, size, head]: what is seen together lies together."""
    values: Tensor
    seen: AttentionMetadata
    rooms: tuple[Room, Room]

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [1, heads, tokens, head], k and v [1, kv_heads, tokens, head] -> [1, heads, tokens, head]; keeps k and v."""
        seen = self.seen
        for held, new in ((self.keys, k), (self.values, v)):
            if seen.begun is not None:
                held.index_fill_(0, seen.begun, 0)
            held.flatten(0, 2).index_copy_(0, seen.rows, new[0].transpose(0, 1).flatten(0, 1))
        if seen.tables is not None:
            return self._by_kernel(q, seen.tables)
        out = torch.empty_like(q)
        if seen.continued is not None:
            out[0, :, : seen.continued.count] = self._continued(q[0, :, : seen.continued.count], seen.continued)
        for piece in seen.pieces:
            out[0, :, piece.start : piece.stop] = self._begun(q, k, v, piece)
        return out

    def _continued(self, q: Tensor, continued: DecodeMetadata) -> Tensor:
        """q [heads, sequences, head] -> the same; each token sees all of its own sequence.

        Softmax in parts, by the maximum and the sum of each: Milakov and Gimelshein 2018; over pieces of the keys, as Dao et al.
        2023 ("Flash-Decoding") have it. Keys and values are read once, and only where they do not lie together are they copied.
        """
        heads, count, head = q.shape
        kv_heads = self.keys.shape[1]
        queries = (q.float() / math.sqrt(head)).view(kv_heads, heads // kv_heads, count, head).permute(2, 0, 1, 3).contiguous()
        each = []
        for seen in continued.seen:
            both = zip(self.rooms, (self.keys, self.values), strict=True)
            keys, values = (held[at] if isinstance(at := seen.pages, slice) else room.lay(held, at) for room, held in both)
            each.append(_glance(queries[seen.rows], keys.float(), values.float(), seen.bias))
        highest, sums, found = (torch.cat(parts)[continued.table] for parts in zip(*each, strict=True))
        highest = highest + continued.lacking
        weights = (highest - highest.amax(1, keepdim=True)).exp_()
        out = (weights * found).sum(1) / (weights * sums).sum(1)
        return out.permute(1, 2, 0, 3).reshape(heads, count, head).to(q.dtype)

    def _begun(self, q: Tensor, k: Tensor, v: Tensor, piece: PromptChunk) -> Tensor:
        """[heads, tokens of the piece, head]"""
        mine = slice(piece.start, piece.stop)
        count, slopes = piece.stop - piece.start, self.seen.slopes
        grouped = q.shape[1] != k.shape[1]
        if not piece.before and slopes is None:
            own = [each[:, :, mine] for each in (q, k, v)]
            return F.scaled_dot_product_attention(own[0], own[1], own[2], is_causal=True, enable_gqa=grouped)[0]
        length = piece.before + count
        both = (held.index_select(0, piece.pages).transpose(0, 1) for held in (self.keys, self.values))
        keys, values = (each.flatten(1, 2)[None, :, :length] for each in both)
        places = torch.arange(length, device=q.device)
        distance = places[piece.before :, None] - places[None, :]
        mask = distance >= 0
        if slopes is not None:
            mask = (-slopes[:, None, None] * distance).masked_fill(~mask, -math.inf).to(q.dtype)
        return F.scaled_dot_product_attention(q[:, :, mine], keys, values, attn_mask=mask, enable_gqa=grouped)[0]

    def _by_kernel(self, q: Tensor, tables: Tables) -> Tensor:
        flat = q[0].transpose(0, 1).contiguous()
        keys, values = (held.transpose(1, 2) for held in (self.keys, self.values))
        kernel = _flash()
        if kernel is not None:
            out = kernel(
                flat, keys, values, tables.starts, tables.key_starts, tables.most, tables.longest,
                causal=True, block_table=tables.pages, alibi_slopes=self.seen.slopes,
            )  # fmt: skip
        else:
            out = _torch_kernel()(
                flat, keys, values, tables.starts, None, tables.most, tables.longest,
                window_size=(-1, 0), enable_gqa=q.shape[1] != keys.shape[2], seqused_k=tables.lengths, block_table=tables.pages,
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


def kernel_serves(device: torch.device, dtype: torch.dtype, head: int, size: int, alibi: bool) -> bool:
    """Whether a kernel that follows page tables takes such a model, with pages of `size` tokens.

    Both are FlashAttention 2 (Dao 2023): heads of up to 256 dimensions, a multiple of 8, on Ampere and what came after; its paged
    form wants pages of a multiple of 256 tokens.
    """
    if dtype not in (torch.bfloat16, torch.float16) or not attention.runs_varlen(device):
        return False
    if head > attention.WIDEST or head % 8 or size % PAGE_UNIT:
        return False
    return _flash() is not None or (_torch_kernel() is not None and not alibi)


def rows_of(slots: Tensor, kv_heads: int, size: int) -> Tensor:
    """slots [tokens]: page * size + place -> [tokens * kv_heads], rows of a cache whose pages hold head after head."""
    firsts = slots.div(size, rounding_mode="floor") * (kv_heads * size) + slots % size
    return (firsts[:, None] + torch.arange(kv_heads, device=slots.device) * size).flatten()


def continued(
    chunks: Items[TokenChunk], size: int, slopes: Tensor | None, kv_heads: int, device: torch.device
) -> DecodeMetadata | None:
    """Chunks of one token, the step's first. size: tokens of a page."""
    if not chunks:
        return None
    counts = np.array([-(-chunk.stop // size) for chunk in chunks])
    pages = np.array([page for chunk, held in zip(chunks, counts.tolist(), strict=True) for page in chunk.sequence.pages[:held]])
    rows, nth = np.repeat(np.arange(len(chunks)), counts), np.concatenate([np.arange(count) for count in counts])
    # How far each token looks back; what is not there yet lies ahead.
    behind = np.array([chunk.stop - 1 for chunk in chunks])[rows, None] - nth[:, None] * size - np.arange(size)
    place = np.arange(len(pages))
    seen: list[PageGather] = []

    def see(which: slice | Tensor, looking: Any, back: Any) -> None:
        distance = on_device(back, torch.float32, device)[:, None, None]
        bias = torch.zeros_like(distance) if slopes is None else -slopes.view(kv_heads, -1, 1) * distance
        seen.append(PageGather(which, sent(torch.from_numpy(looking), device), bias.masked_fill_(distance < 0, -math.inf)))

    apart = np.ones(len(pages), bool)
    # Of those that see the same page one does so where it lies.
    found, chosen = np.unique(pages, return_index=True)
    for run in np.split(np.arange(len(found)), np.flatnonzero(np.diff(found) > _GAP) + 1):
        first, last, those = int(found[run[0]]), int(found[run[-1]]) + 1, chosen[run]
        if len(run) < _FEW or last - first > _DENSE * len(run):
            continue
        looking, back = np.zeros(last - first, np.int64), np.zeros((last - first, size), np.int64)
        looking[found[run] - first], back[found[run] - first] = rows[those], behind[those]
        place[those], apart[those] = found[run] - first + sum(len(each.rows) for each in seen), False
        see(slice(first, last), looking, back)
    if apart.any():
        place[apart] = np.arange(int(apart.sum())) + sum(len(each.rows) for each in seen)
        see(sent(torch.from_numpy(pages[apart]), device), rows[apart], behind[apart])
    starts = np.cumsum(counts) - counts
    table = np.repeat(place[starts][:, None], int(counts.max()), axis=1)
    table[rows, nth] = place
    lacking = torch.zeros(table.shape).masked_fill_(torch.from_numpy(np.arange(table.shape[1]) >= counts[:, None]), -math.inf)
    lacking = sent(lacking[:, :, None, None, None], device)
    return DecodeMetadata(len(chunks), tuple(seen), sent(torch.from_numpy(table), device), lacking)


def _glance(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each page alone: the highest score, the sum of exponentials below it, and the values weighed with these.

    q [pages, kv_heads, queries, head], keys and values [pages, kv_heads, size, head]
    -> [pages, kv_heads, queries, 1] twice, [pages, kv_heads, queries, head].
    """
    scores = torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).transpose(1, 2)).view(*q.shape[:3], -1).add_(bias)
    highest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    found = torch.bmm(weights.flatten(0, 1), values.flatten(0, 1)).view_as(q)
    return highest, weights.sum(-1, keepdim=True), found


def tables(chunks: Items[TokenChunk], device: torch.device) -> Tables:
    """What a kernel that follows pages is told of a step's chunks."""
    counts = [chunk.stop - chunk.start for chunk in chunks]
    lengths = [chunk.stop for chunk in chunks]
    widest = max(len(chunk.sequence.pages) for chunk in chunks)

    def tensor(values: object) -> Tensor:
        return on_device(values, torch.int32, device)

    starts, key_starts = ([0, *itertools.accumulate(each)] for each in (counts, lengths))
    pages = [filled(chunk.sequence.pages, widest) for chunk in chunks]
    return Tables(tensor(starts), tensor(key_starts), tensor(lengths), tensor(pages), max(counts), max(lengths))


def filled(pages: list[int], length: int) -> list[int]:
    """With the page that is nobody's at its end."""
    return [*pages, *[0] * (length - len(pages))]
