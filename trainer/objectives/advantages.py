"""From rewards to advantages, and how far a policy is from its reference; all [rows, time], over the mask's tokens alone.

The mask is 1 at the tokens of a response. Padding may stand before, behind and, as what a tool said does, between them.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from trainer.objectives.loss import last_place, real

Estimator = Literal["k1", "k2", "k3"]
_FARTHEST = 20.0
"""Of log pi_ref - log pi, as in verl's `kl_penalty`: from 88 on exp overflows to inf in float32."""


def kl(policy: Tensor, reference: Tensor, estimator: Estimator) -> Tensor:
    """KL(policy || reference) by token, in nats, from log-probabilities of tokens that the policy drew; of any one shape.

    Schulman 2020, "Approximating KL divergence", with d = log pi - log pi_ref: k1 = d, of which a mean is unbiased but may be
    negative; k2 = d^2 / 2, biased, never negative; k3 = exp(-d) - 1 + d, unbiased and never negative.

    k3 takes a d below -20 for -20, without a gradient. It is exact above: tokens that the reference holds for very unlikely must
    keep their weight and their gradient. verl clamps both sides, and k3 itself to 10.
    """
    d = policy - reference
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    d = d.clamp(min=-_FARTHEST)
    # For a d near 0 rounding leaves a difference of either sign.
    return (torch.expm1(-d) + d).clamp(min=0)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, beta: float) -> Tensor:
    """r_t = -beta kl_t, and at each response's last token its score besides (Stiennon et al. 2020, section 3.4; by token).

    scores [rows]; kl [rows, time], of which k1 makes the sum the log-ratio of the whole response. An empty response has none.
    """
    last = torch.arange(mask.shape[1], device=mask.device) == last_place(mask > 0)[:, None]
    return real(torch.where(last, scores[:, None] - beta * kl, -beta * kl), mask)


@torch.no_grad()
def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and returns by generalised advantage estimation (Schulman et al. 2016, equations 11 and 16).

    delta_t = r_t + gamma V' - V_t and A_t = delta_t + gamma lam A', where V' and A' are those of the next token of the
    response, however many masked ones lie between, and 0 behind the last one: a response that was cut short is taken for ended.
    Returns are A + V. Both are 0 at masked tokens, whose rewards and values are left out. Not whitened.
    """
    advantage = following = rewards.new_zeros(len(rewards))
    found = []
    for reward, value, here in zip(*(x.unbind(1)[::-1] for x in (rewards, values, mask > 0)), strict=True):
        advantage = torch.where(here, reward + gamma * following - value + gamma * lam * advantage, advantage)
        following = torch.where(here, value, following)
        found.append(advantage)
    advantages = torch.stack(found[::-1], 1)
    return real(advantages, mask), real(advantages + values, mask)


def moments(x: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of the tokens that count, float64 [3]: added over micro-batches and ranks for `whiten`."""
    counted = real(x, mask).double()
    return torch.stack([(mask > 0).double().sum(), counted.sum(), counted.square().sum()])


def whiten(x: Tensor, mask: Tensor, sums: Tensor | None = None) -> Tensor:
    """Mean 0 and sample variance 1 over the tokens that count, (x - mean) / sqrt(variance + 1e-8); 0 at masked ones.

    sums: `moments` of the whole global batch, of which x is a part; x's own where it is left out. As TRL's and verl's
    `masked_whiten`, whose variance is divided by count - 1; OpenRLHF's by count.
    """
    count, total, squares = (moments(x, mask) if sums is None else sums).unbind()
    mean = total / count.clamp(min=1)
    variance = ((squares - count * mean.square()) / (count - 1).clamp(min=1)).clamp(min=0)
    return real((x - mean) * torch.rsqrt(variance + 1e-8), mask).to(x.dtype)


def adaptive(beta: float, kl: float, target: float, horizon: float, count: float) -> float:
    """The KL coefficient after `count` more responses (Ziegler et al. 2019, section 2.2).

    kl, target: of a whole response, in nats. Over `horizon` responses beta changes by a fifth at the most.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + error * count / horizon)
