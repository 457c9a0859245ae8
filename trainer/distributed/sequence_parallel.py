"""How a row's tokens lie over the ranks that share it, and the differentiable ways between them.

Two kinds of ranks share a row. Context-parallel ones each take a part of its tokens through the whole model, and meet in
attention alone. Tensor-parallel ones divide each block's heads and MLP among them, and between these a context-parallel rank's
tokens (Korthikanti et al. 2022, section 4.2.2): so no rank holds anything twice. Rows that do not divide are filled up behind
their ends, where nothing looks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

# By their new names, where torch has them.
_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
_scatter = getattr(collectives, "reduce_scatter_single_autograd", None) or collectives.reduce_scatter_tensor_autograd
_begin_scatter = getattr(collectives, "reduce_scatter_single", None) or collectives.reduce_scatter_tensor


@dataclass(frozen=True)
class RankGroup:
    """Ranks that share something, and this one's place among them."""

    ranks: Any = None
    """The process group; None where there is but one."""
    size: int = 1
    place: int = 0


@dataclass(frozen=True)
class SequenceSharding:
    """By default a rank has whole rows."""

    tensor: RankGroup = RankGroup()
    context: RankGroup = RankGroup()
    ring: bool = False
    """Keys and values go round the context-parallel ranks; else heads and tokens are exchanged for attention."""

    def length(self, time: int) -> int:
        """Tokens of a row of `time`, filled up."""
        unit = self.tensor.size * self.context.size * (2 if self.ring else 1)
        return -(-time // unit) * unit

    def places(self, time: int, device: torch.device, place: int | None = None) -> Tensor:
        """The places in a row of `time` that a context-parallel rank (this one) takes through attention, in its order.

        In a ring each rank has one part of the row's beginning and one of its end, so that all have as much to attend to.
        """
        place, parts, length = self.context.place if place is None else place, self.context.size, self.length(time)
        if not self.ring:
            return torch.arange(place * length // parts, (place + 1) * length // parts, device=device)
        each = length // (2 * parts)
        first, last = place * each, (2 * parts - 1 - place) * each
        return torch.cat([torch.arange(start, start + each, device=device) for start in (first, last)])

    def between(self, places: Tensor) -> Tensor:
        """Of these the places that this rank has between attention and MLP."""
        return places.chunk(self.tensor.size)[self.tensor.place]

    def take(self, row: Tensor, places: Tensor, fill: int = 0) -> Tensor:
        """What rows [batch, time, ...] have at these places; `fill` past their ends."""
        time = row.shape[1]
        if self == SequenceSharding():
            return row
        if missing := self.length(time) - time:
            row = F.pad(row, (0, 0) * (row.ndim - 2) + (0, missing), value=fill)
        return row[:, places]

    def gather(self, x: Tensor) -> Tensor:
        """From this rank's tokens [batch, time, ...] to those of all tensor-parallel ranks; gradients come back summed."""
        if self.tensor.size == 1:
            return x
        return _arrived(_gather(x, 1, self.tensor.ranks))

    def gathered_products(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """`F.linear` of `gather`'s result with each weight and its bias.

        The same to the bit. But on the way back x's gradient is summed over the ranks while those of the weights are computed, as
        Megatron-LM does it (Korthikanti et al. 2022, section 4.2.2).
        """
        found = _GatheredProducts.apply(x, self.tensor, len(weights), *weights, *biases)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return cast(tuple[Tensor, ...], found)

    def scatter(self, x: Tensor) -> Tensor:
        """Sums what tensor-parallel ranks have of all their tokens [batch, time, ...], and keeps this rank's."""
        if self.tensor.size == 1:
            return x
        return _arrived(_scatter(x, "sum", 1, self.tensor.ranks))

    def whole(self, x: Tensor, time: int) -> Tensor:
        """From this rank's tokens [batch, ...] to whole rows [batch, time, ...], the same on all ranks that share them.

        On the way back each rank takes its own part of the gradient, which must therefore be the same on all of them.
        """
        if self == SequenceSharding():
            return x
        for group in (self.tensor, self.context):
            if group.size > 1:
                x = cast(Tensor, _Whole.apply(x, group))  # type: ignore[no-untyped-call]  # torch leaves it untyped
        if self.ring:
            order = torch.cat([self.places(time, x.device, place) for place in range(self.context.size)])
            x = x[:, order.argsort()]
        return x[:, :time].clone()  # what FSDP2 takes for an output must not be a view

    def heads(self, *each: Tensor) -> tuple[Tensor, ...]:
        """Each [batch, heads, this rank's tokens, head] -> [batch, this rank's heads, all tokens, head]: DeepSpeed-Ulysses.

        Jacobs et al. 2023, section 3.1; heads in as many equal parts as there are context-parallel ranks. All exchanges are under
        way before the first is waited for, so that one is laid out while another is on the wire.
        """
        parts, under_way = self.context.size, []
        for x in each:
            batch, heads, time, head = x.shape
            x = x.view(batch, parts, heads // parts, time, head).transpose(0, 1).contiguous()
            under_way.append(collectives.all_to_all_single_autograd(x, None, None, self.context.ranks))
        found = []
        for x in map(_arrived, under_way):
            _, batch, heads, time, head = x.shape
            found.append(x.permute(1, 2, 0, 3, 4).reshape(batch, heads, parts * time, head))
        return tuple(found)

    def tokens(self, x: Tensor) -> Tensor:
        """The way back from `heads`."""
        parts, (batch, heads, time, head) = self.context.size, x.shape
        x = x.view(batch, heads, parts, time // parts, head).permute(2, 0, 1, 3, 4).contiguous()
        x = _arrived(collectives.all_to_all_single_autograd(x, None, None, self.context.ranks))
        return x.transpose(0, 1).reshape(batch, parts * heads, time // parts, head)


class _GatheredProducts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup, count: int, *given: Tensor | None) -> tuple[Tensor, ...]:
        weights, biases = cast(tuple[Tensor, ...], given[:count]), given[count:]
        whole = _arrived(_gather(x, 1, group.ranks))
        ctx.save_for_backward(whole, *weights)
        ctx.group, ctx.biased = group, [bias is not None for bias in biases]
        return tuple(F.linear(whole, weight, bias) for weight, bias in zip(weights, biases, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        whole, *weights = ctx.saved_tensors
        flat = [gradient.flatten(0, 1) for gradient in gradients]
        of_whole = flat[-1] @ weights[-1]
        for gradient, weight in zip(flat[-2::-1], weights[-2::-1], strict=True):
            of_whole += gradient @ weight
        under_way = _begin_scatter(of_whole.view_as(whole), "sum", 1, ctx.group.ranks)
        of_weights = [gradient.t() @ whole.flatten(0, 1) for gradient in flat]
        of_biases = [gradient.sum(0) if biased else None for gradient, biased in zip(flat, ctx.biased, strict=True)]
        return _arrived(under_way), None, None, *of_weights, *of_biases


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RankGroup) -> Tensor:
        ctx.group, ctx.length = group, x.shape[1]
        parts = [torch.empty_like(x) for _ in range(group.size)]
        dist.all_gather(parts, x.contiguous(), group=group.ranks)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.narrow(1, ctx.group.place * ctx.length, ctx.length), None


def _arrived(x: Tensor) -> Tensor:
    return x.wait() if isinstance(x, collectives.AsyncCollectiveTensor) else x


def held(parameter: Tensor, partial: bool = False) -> Tensor:
    """What this rank computes with: of a parameter that tensor-parallel ranks divide its own part.

    partial: all of them have it whole, and each sees some of the tokens only; the gradient is their sum.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=[Partial()] if partial else None)
