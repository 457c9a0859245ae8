"""Ring attention: each rank keeps its queries, and keys and values go round (Liu et al. 2023).

What a block of keys adds is merged by the log of its sum of exponentials, as in FlashAttention (Dao et al. 2022, section 3.1).
On the way back keys and values go round once more, and their gradients with them. A block of queries and of keys at a time, so
that scores are never whole; a block of which no query may see any key is not computed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.distributed.sequence_parallel import RankGroup

TILE = 512
"""Queries, and keys, whose scores are there at a time."""


@dataclass(frozen=True)
class RingBlocks:
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
        found = torch.einsum("bghqd,bgkd->bghqk", q, k).div_(math.sqrt(q.shape[-1]))
        found = found.to(torch.promote_types(found.dtype, torch.float32))
        hidden = (mine[:, None] < theirs[None, :])[None, None, None]
        if self.segments is not None:
            hidden = hidden | (self.segments[:, mine, None] != self.segments[:, None, theirs])[:, None, None]
        if self.slopes is not None:
            slopes = self.slopes.view(q.shape[1], q.shape[2], 1, 1)
            found -= slopes * (mine[:, None] - theirs[None, :])
        return found.masked_fill_(hidden, float("-inf"))


def ring_attention(q: Tensor, k: Tensor, v: Tensor, blocks: RingBlocks, group: RankGroup) -> Tensor:
    """q [batch, heads, time, head] over k and v [batch, kv_heads, time, head], each rank of the ring having its own tokens."""
    grouped = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
    out = cast(Tensor, _Ring.apply(grouped, k, v, blocks, group))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return out.flatten(1, 2)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, blocks: RingBlocks, group: RankGroup) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        # Heads beside each other in memory, as what comes next wants them: nothing is copied for it.
        out = torch.zeros_like(q.permute(0, 3, 1, 2, 4), dtype=wide, memory_format=torch.contiguous_format).permute(0, 2, 3, 1, 4)
        sums = torch.full(q.shape[:-1], float("-inf"), dtype=wide, device=q.device)
        mine, at = blocks.places[group.place], torch.stack([k, v])
        for turn in range(group.size):
            owner = (group.place - turn) % group.size
            coming = _pass_on(at, group) if turn + 1 < group.size else None
            for tile, keys in _tiles(blocks, group, owner):
                scores = blocks.scores(q[..., tile, :], at[0, ..., keys, :], mine[tile], blocks.places[owner][keys])
                added = scores.logsumexp(-1)
                total = torch.logaddexp(sums[..., tile], added)
                seen = torch.where(total == float("-inf"), 0.0, total)
                part = torch.einsum("bghqk,bgkd->bghqd", scores.sub_(seen[..., None]).exp_(), at[1, ..., keys, :].to(wide))
                out[..., tile, :] = out[..., tile, :] * (sums[..., tile] - seen).exp()[..., None] + part
                sums[..., tile] = total
                del scores
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
        wide, scale, mine = sums.dtype, 1 / math.sqrt(q.shape[-1]), blocks.places[group.place]
        gradient = gradient.to(wide)
        delta = (gradient * out).sum(-1)
        of_q = torch.zeros(q.shape, dtype=wide, device=q.device)
        # Keys and values, and their gradients so far; after a whole round they are home.
        at = torch.cat([torch.stack([k, v]).to(wide), torch.zeros(2, *k.shape, dtype=wide, device=k.device)])
        for turn in range(group.size):
            owner = (group.place - turn) % group.size
            for tile, part in _tiles(blocks, group, owner):
                queries, back, (keys, values, of_keys, of_values) = q[..., tile, :], gradient[..., tile, :], at[..., part, :]
                weights = blocks.scores(queries, keys.to(q.dtype), mine[tile], blocks.places[owner][part])
                weights = weights.sub_(sums[..., tile, None]).exp_()
                of_values += torch.einsum("bghqk,bghqd->bgkd", weights, back)
                of_scores = torch.einsum("bghqd,bgkd->bghqk", back, values).sub_(delta[..., tile, None]).mul_(weights).mul_(scale)
                of_q[..., tile, :] += torch.einsum("bghqk,bgkd->bghqd", of_scores, keys)
                of_keys += torch.einsum("bghqk,bghqd->bgkd", of_scores, queries.to(wide))
                del weights, of_scores
            at = _arrived(_pass_on(at, group))
        return of_q.to(q.dtype), at[2].to(k.dtype), at[3].to(v.dtype), None, None


def _tiles(blocks: RingBlocks, group: RankGroup, owner: int) -> Iterator[tuple[slice, slice]]:
    """Of this rank's queries and the owner's keys the stretches of which some may see some.

    Places are known without asking the device: of two halves that go up, the first begins, and the second ends.
    """
    length = len(blocks.places[group.place])
    for queries in _stretches(length):
        last = _place(group.size, group.place, length // 2, queries.stop - 1)
        for keys in _stretches(length):
            if last >= _place(group.size, owner, length // 2, keys.start):
                yield queries, keys


def _stretches(length: int) -> Iterator[slice]:
    """Of no more than TILE, each in one half."""
    half = length // 2
    for begin, end in ((0, half), (half, length)):
        for start in range(begin, end, TILE):
            yield slice(start, min(start + TILE, end))


def _place(size: int, rank: int, half: int, index: int) -> int:
    """The place in the row of a rank's token, as `Spread.places` has it."""
    return rank * half + index if index < half else (2 * size - 1 - rank) * half + index - half


def _pass_on(x: Tensor, group: RankGroup) -> tuple[Tensor, list[dist.Work]]:
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
