"""Log-probabilities of targets, without the logits of all tokens ever being there at once."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

_STRETCHES = 8
"""Parts of the output layer for which a tile's gradient is there at a time."""


def likelihood(
    hidden: Tensor, weight: Tensor, targets: Tensor, tile: int, entropy: bool = False, temperature: float = 1.0
) -> Tensor:
    """Of each target [batch, time], from what the output layer takes, [batch, time, width]: [batch, time], in float32.

    weight: the output layer's, [vocabulary, width]. tile: tokens whose logits are there at a time; where there are more, logits
    are computed again for the backward. entropy: the distributions' beside it, in nats, [batch, time, 2]; without gradients.
    temperature: what logits are divided by, in float32, as the generation engine does it. To divide what the output layer takes
    would round once more.
    """
    flat, wanted = hidden.flatten(0, 1), targets.flatten()
    if entropy:
        with torch.no_grad():
            found = torch.cat([_with_entropy(_every(flat[at], weight, temperature), wanted[at]) for at in _tiles(len(flat), tile)])
        return found.view(*targets.shape, 2).clone()
    found = cast(Tensor, _Likelihood.apply(flat, weight, wanted, tile, temperature))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    # A copy: what FSDP2 takes for an output must not be a view.
    return found.view_as(targets).clone()


class _Likelihood(torch.autograd.Function):
    """Written out, as autograd would have three copies of the logits, and sum the weight's gradient in the weight's type."""

    @staticmethod
    def forward(ctx: Any, flat: Tensor, weight: Tensor, targets: Tensor, tile: int, temperature: float) -> Tensor:
        ctx.save_for_backward(flat, weight, targets)
        ctx.tile, ctx.temperature, ctx.every = tile, temperature, None
        if len(flat) > tile:
            return torch.cat([_chosen(_every(flat[at], weight, temperature), targets[at]) for at in _tiles(len(flat), tile)])
        every = _every(flat, weight, temperature)
        if any(ctx.needs_input_grad):
            ctx.every = every
        return _chosen(every, targets)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        flat, weight, targets = ctx.saved_tensors
        gradient = gradient if ctx.temperature == 1.0 else gradient / ctx.temperature
        if len(flat) <= ctx.tile:
            every, ctx.every = ctx.every, None
            back = _of_logits(every, targets, gradient).to(flat.dtype)
            del every
            return back @ weight, back.t() @ flat, None, None, None
        of_flat = torch.empty_like(flat)
        # In float32: to the sum of many tiles each adds less than bfloat16 can tell.
        of_weight = torch.zeros_like(weight, dtype=torch.promote_types(weight.dtype, torch.float32))
        for at in _tiles(len(flat), ctx.tile):
            back = _of_logits(_every(flat[at], weight, ctx.temperature), targets[at], gradient[at]).to(flat.dtype)
            torch.mm(back, weight, out=of_flat[at])
            _add_product(of_weight, back, flat[at])
            del back  # before the next tile's logits are there
        return of_flat, of_weight.to(weight.dtype), None, None, None


def _tiles(length: int, tile: int) -> list[slice]:
    return [slice(start, start + tile) for start in range(0, length, tile)]


def _every(flat: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """Log-probabilities of all tokens of the vocabulary, in float32."""
    logits = F.linear(flat, weight).float()
    return (logits if temperature == 1.0 else logits.div_(temperature)).log_softmax(-1)


def _chosen(every: Tensor, targets: Tensor) -> Tensor:
    return every.gather(-1, targets[:, None])[:, 0]


def _of_logits(every: Tensor, targets: Tensor, gradient: Tensor) -> Tensor:
    """The logits' gradient, in the place of the log-probabilities."""
    found, at = every.exp_().mul_(-gradient[:, None]), targets[:, None]
    # One place a row, so that nothing has to be added up in an order: adding by `scatter_add_` is sorted first on CUDA.
    return found.scatter_(-1, at, found.gather(-1, at).add_(gradient[:, None]))


def _add_product(of_weight: Tensor, back: Tensor, flat: Tensor) -> None:
    step = -(-len(of_weight) // _STRETCHES)
    for rows, columns in zip(torch.split(of_weight, step), torch.split(back.t(), step), strict=True):
        rows += columns @ flat


def _with_entropy(every: Tensor, targets: Tensor) -> Tensor:
    return torch.stack([_chosen(every, targets), -(every.exp() * every).sum(-1)], dim=-1)


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target: logits [batch, time, vocabulary], targets [batch, time] -> [batch, time]."""
    return -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
