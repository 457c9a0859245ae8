"""Proximal policy optimisation: clipped losses of policy and critic on responses that an older policy gave.

Schulman et al. 2017. All [rows, time], a response a row; sums over the mask's tokens, to be divided by those of the whole
global batch, so that a token of a long response weighs as one of a short one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from trainer.batches import DeviceRows
from trainer.objectives.advantages import kl
from trainer.objectives.loss import Loss, real, summed
from trainer.objectives.pretrain import weight as tokens

METRICS = ("policy/clip_fraction", "policy/ratio", "policy/ratio_outlier_fraction", "policy/approx_kl")
CRITIC_METRICS = (
    "value/loss",
    "value/clip_fraction",
    "value/return",
    "value/return_squared",
    "value/error",
    "value/error_squared",
)
USUAL_RATIOS = (0.5, 2.0)
"""Outside of these a ratio is counted as `policy/ratio_outlier_fraction`."""
_LARGEST = 20.0
"""Of a log-ratio; beyond it exp overflows to inf, and times an advantage of 0 to NaN. verl and OpenRLHF end there too."""


class RolloutData(NamedTuple):
    """What was noted when the responses were given, all [rows, time] as the rows are."""

    old: Tensor
    """Log-probabilities under the policy that drew the tokens, at the temperature they were drawn at."""
    advantages: Tensor
    returns: Tensor | None = None
    """What the critic is to say."""
    old_values: Tensor | None = None
    """What the critic said."""
    reference: Tensor | None = None
    """Log-probabilities under the reference."""


def loss(policy: Tensor, rows: DeviceRows, settings: Mapping[str, float], extra: RolloutData) -> Loss:
    """Of the policy, weighed by tokens; `settings`: ratio_clip."""
    values, metrics = policy_loss(policy, extra.old, extra.advantages, rows.mask, settings["ratio_clip"])
    return summed(values, rows.mask, metrics)


def critic_loss(values: Tensor, rows: DeviceRows, settings: Mapping[str, float], extra: RolloutData) -> Loss:
    """Of the critic, weighed by tokens; `settings`: value_clip."""
    assert extra.returns is not None and extra.old_values is not None, "a critic learns returns"
    found, metrics = value_loss(values, extra.old_values, extra.returns, rows.mask, settings["value_clip"])
    return summed(found, rows.mask, metrics)


def policy_loss(log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """max(-A rho, -A clip(rho, 1 - clip, 1 + clip)) with rho = pi / pi_old (equation 7), and metrics; 0 at masked tokens.

    `policy/approx_kl` is k3 of KL(old || policy), as the tokens are the old policy's. A smallest and a largest ratio cannot
    be had as sums, so `policy/ratio_outlier_fraction` counts those outside 0.5 to 2.
    """
    d = real(log_probs - old, mask).clamp(-_LARGEST, _LARGEST)
    ratio, advantages = d.exp(), real(advantages, mask)
    free, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    low, high = USUAL_RATIOS
    drawn = ratio.detach()
    detached = (clipped > free).float(), drawn, ((drawn < low) | (drawn > high)).float(), kl(torch.zeros_like(d), d.detach(), "k3")
    return torch.maximum(free, clipped), dict(zip(METRICS, detached, strict=True))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float) -> tuple[Tensor, dict[str, Tensor]]:
    """max((V - R)^2, (V_clip - R)^2) / 2 with V_clip within `clip` of the old V, and metrics; 0 at masked tokens.

    Not in the paper but in its code (openai/baselines, ppo2); Engstrom et al. 2020 tell of it as value function clipping.
    """
    values, old_values, returns = (real(x, mask) for x in (values, old_values, returns))
    near = old_values + (values - old_values).clamp(-clip, clip)
    free, clipped = (values - returns).square() / 2, (near - returns).square() / 2
    found = torch.maximum(free, clipped)
    # In float64: in float32 the mean of squares less the squared mean is noise where returns differ little for their size.
    wide, error = returns.double(), (returns - values).detach().double()
    detached = found.detach(), (clipped > free).float(), wide, wide.square(), error, error.square()
    return found, dict(zip(CRITIC_METRICS, detached, strict=True))


def critic_metrics(means: Mapping[str, float]) -> dict[str, float]:
    """What is told of the means of `value_loss`'s metrics."""
    told = {name: means[name] for name in ("value/loss", "value/clip_fraction", "value/return")}
    explained = explained_variance(means)
    return told if math.isnan(explained) else told | {"value/explained_variance": explained}


def explained_variance(means: Mapping[str, float]) -> float:
    """1 - var(R - V) / var(R) from the means of `value_loss`'s metrics over all tokens: 1 is a perfect critic, 0 one that
    says the same of every token, below 0 a worse one. NaN where returns do not differ."""
    returns = means["value/return_squared"] - means["value/return"] ** 2
    errors = means["value/error_squared"] - means["value/error"] ** 2
    return 1 - errors / returns if returns > 0 else float("nan")


def weight(mask: npt.NDArray[np.float32]) -> float:
    """Tokens of responses."""
    return tokens(mask)
