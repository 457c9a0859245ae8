"""Ring attention: each rank keeps its queries, and keys and values go round (Liu et al. 2023).

What a block of keys adds is merged by the log of its sum of exponentials, as in FlashAttention (Dao et al. 2022, section 3.1).
On the way back keys and values go round once more, and their gradients with them. A block of queries at a time, so that scores
are never whole; what no query of a block may see is not computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.spread import Group

TILE = 1024
"""Queries whose scores are there at a time."""


@dataclass(frozen=True)
class Blocks:
    """What the ranks of a ring have of a row, and who sees whom."""

    places: tuple[Tensor, ...]
    """Of each rank its tokens' places in the row, [time]."""
    segments: Tensor | None = None
    """Of all of the row's places the document, [batch, all of the row]; None: a row is one document."""
    slopes: Tensor | None = None
    """ALiBi's of this rank's heads, [heads], float32."""

    def scores(self, q: Tensor, k: Tensor, mine: Tensor, theirs: Tensor) -> Tensor:
        """Of queries [batch, groups, heads of a group, time, head] and keys [batch, groups, keys, head], -inf where none is seen.

        mine, theirs: places of queries and keys. In float32 (or float64), [batch, groups, heads of a group, time, keys].
        """
        found = torch.einsum("bghqd,bgkd->bghqk", q, k) / math.sqrt(q.shape[-1])
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        hidden = (mine[:, None] < theirs[None, :])[None, None, None]
        if self.segments is not None:
            hidden = hidden | (self.segments[:, mine, None] != self.segments[:, None, theirs])[:, None, None]
        if self.slopes is not None:
            slopes = self.slopes.view(q.shape[1], q.shape[2], 1, 1)
            found = found - slopes * (mine[:, None] - theirs[None, :])
        return found.masked_fill(hidden, float("-inf"))


def ring_attention(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, group: Group) -> Tensor:
    """q [batch, heads, time, head] over k and v [batch, kv_heads, time, head], each rank of the ring having its own tokens."""
    grouped = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    out = cast(Tensor, _Ring.apply(grouped, k, v, blocks, group))  # type: ignore[no-untyped-call]
    return out.flatten(1, 2)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, group: Group) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        out = torch.zeros(q.shape, dtype=wide, device=q.device)
        sums = torch.full(q.shape[:-1], float("-inf"), dtype=wide, device=q.device)
        at = torch.stack([k, v])
        for turn in range(group.size):
            owner = (group.place - turn) % group.size
            coming = _pass_on(at, group) if turn + 1 < group.size else None
            for mine, tile in _tiles(blocks, group, owner):
                scores = blocks.scores(q[..., tile, :], at[0], mine, blocks.places[owner])
                added = scores.logsumexp(-1)
                total = torch.logaddexp(sums[..., tile], added)
                seen = torch.where(total == float("-inf"), 0.0, total)
                weights = (scores - seen[..., None]).exp()
                part = torch.einsum("bghqk,bgkd->bghqd", weights, at[1].to(wide))
                out[..., tile, :] = out[..., tile, :] * (sums[..., tile] - seen).exp()[..., None] + part
                sums[..., tile] = total
            if coming is not None:
                at = _arrived(coming)
        ctx.blocks, ctx.group = blocks, group
        result = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, result, sums)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, out, sums = ctx.saved_tensors
        blocks, group = ctx.blocks, ctx.group
        wide, scale = sums.dtype, 1 / math.sqrt(q.shape[-1])
        gradient = gradient.to(wide)
        delta = (gradient * out).sum(-1)
        of_q = torch.zeros(q.shape, dtype=wide, device=q.device)
        # Keys and values, and their gradients so far; after a whole round they are home.
        at = torch.cat([torch.stack([k, v]).to(wide), torch.zeros(2, *k.shape, dtype=wide, device=k.device)])
        for turn in range(group.size):
            owner = (group.place - turn) % group.size
            keys, values, of_keys, of_values = at
            for mine, tile in _tiles(blocks, group, owner):
                queries, back = q[..., tile, :], gradient[..., tile, :]
                weights = (blocks.scores(queries, keys.to(q.dtype), mine, blocks.places[owner]) - sums[..., tile, None]).exp()
                of_values += torch.einsum("bghqk,bghqd->bgkd", weights, back)
                of_scores = weights * (torch.einsum("bghqd,bgkd->bghqk", back, values) - delta[..., tile, None]) * scale
                of_q[..., tile, :] += torch.einsum("bghqk,bgkd->bghqd", of_scores, keys)
                of_keys += torch.einsum("bghqk,bghqd->bgkd", of_scores, queries.to(wide))
            at = _arrived(_pass_on(at, group))
        return of_q.to(q.dtype), at[2].to(k.dtype), at[3].to(v.dtype), None, None


def _tiles(blocks: Blocks, group: Group, owner: int) -> Iterator[tuple[Tensor, slice]]:
    """The stretches of this rank's queries that may see something of the owner's keys, with their places.

    Places are known without asking the device: of two halves that go up, the first begins, and the second ends.
    """
    mine = blocks.places[group.place]
    half = len(mine) // 2
    first = _begin(group.size, owner, half)
    for start in range(0, len(mine), TILE):
        for low, high in _within_halves(start, min(start + TILE, len(mine)), half):
            last = _place(group.size, group.place, half, high - 1)
            if last >= first:
                yield mine[low:high], slice(low, high)


def _within_halves(start: int, stop: int, half: int) -> Iterator[tuple[int, int]]:
    if start < half < stop:
        yield start, half
        yield half, stop
    else:
        yield start, stop


def _begin(size: int, owner: int, half: int) -> int:
    return _place(size, owner, half, 0)


def _place(size: int, rank: int, half: int, index: int) -> int:
    """The place in the row of a rank's token, as `Spread.places` has it."""
    return rank * half + index if index < half else (2 * size - 1 - rank) * half + index - half


def _pass_on(x: Tensor, group: Group) -> tuple[Tensor, list[dist.Work]]:
    """To the next rank, from the one before."""
    assert group.ranks is not None
    x = x.contiguous()
    found = torch.empty_like(x)
    after = dist.get_global_rank(group.ranks, (group.place + 1) % group.size)
    before = dist.get_global_rank(group.ranks, (group.place - 1) % group.size)
    sent = dist.P2POp(dist.isend, x, after, group.ranks)
    received = dist.P2POp(dist.irecv, found, before, group.ranks)
    return found, dist.batch_isend_irecv([sent, received])


def _arrived(coming: tuple[Tensor, list[dist.Work]]) -> Tensor:
    for work in coming[1]:
        work.wait()
    return coming[0]
