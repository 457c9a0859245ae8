"""Log-probabilities of targets, without the logits of all tokens ever being there at once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.recompute import again


def likelihood(hidden: Tensor, weight: Tensor, targets: Tensor, tile: int, entropy: bool = False) -> Tensor:
    """Of each target [batch, time], from what the output layer takes, [batch, time, width]: [batch, time], in float32.

    weight: the output layer's, [vocabulary, width]. tile: tokens whose logits are there at a time; where there are more, logits
    are computed again for the backward. entropy: the distributions' beside it, in nats: [batch, time, 2].
    """
    flat, wanted = hidden.flatten(0, 1), targets.flatten()
    step = tile if len(flat) > tile else len(flat)
    found = []
    for part, ids in zip(torch.split(flat, step), torch.split(wanted, step), strict=True):

        def of_tile(x: Tensor, ids: Tensor = ids) -> Tensor:
            return _of_logits(F.linear(x, weight).float(), ids, entropy)

        found.append(again(of_tile, part) if step < len(flat) and torch.is_grad_enabled() else of_tile(part))
    # A copy: what FSDP2 takes for an output must not be a view.
    return torch.cat(found).view(*targets.shape, *([2] if entropy else [])).clone()


def _of_logits(logits: Tensor, targets: Tensor, entropy: bool) -> Tensor:
    if not entropy:
        return -F.cross_entropy(logits, targets, reduction="none")
    every = logits.log_softmax(-1)
    mine = every.gather(-1, targets[:, None])[:, 0]
    return torch.stack([mine, -(every.exp() * every).sum(-1)], dim=-1)


def log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target: logits [batch, time, vocabulary], targets [batch, time] -> [batch, time]."""
    return -F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
