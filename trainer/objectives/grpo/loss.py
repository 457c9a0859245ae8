"""Group-relative policy optimisation: PPO without a critic, a response held against others to the same prompt.

Shao et al. 2024 (DeepSeekMath), section 4.1; leave-one-out: Ahmadian et al. 2024 (RLOO).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from midwatch.recipe import Stage
from midwatch.recipe.rollout import Rollout
from trainer.batches import DeviceRows
from trainer.objectives.advantages import kl
from trainer.objectives.loss import Loss, real, summed
from trainer.objectives.objective import Credit, Objective, RolloutRules, ScoredResponses
from trainer.objectives.ppo import loss as ppo
from trainer.objectives.ppo.loss import RolloutData

METRICS = (*ppo.METRICS, "policy/kl")
"""`policy/kl`, k3 a token, is there where there is a reference."""
Normalisation = Literal["token", "sequence"]


def objective(stage: Stage) -> Objective:
    by = stage.rollout_settings.normalisation
    rules = RolloutRules(learned, credit)
    return Objective(partial(loss, normalisation=by), partial(weight, normalisation=by), METRICS, rollout=rules)


def learned(scored: Tensor, settings: Rollout) -> Tensor:
    """Those that can be compared with another response to their prompt."""
    return comparable(scored, settings.num_generations)


def credit(responses: ScoredResponses) -> Credit:
    """One advantage for all tokens of a response."""
    group, leave_one_out = responses.settings.num_generations, responses.settings.advantage == "leave-one-out"
    found = advantages(responses.scores, group, leave_one_out, responses.scored)[:, None] * responses.mask
    skipped = ~comparable(responses.scored, group).view(-1, group).any(-1)
    return Credit(found, metrics={"policy/groups_skipped": float(skipped.sum())})


def advantages(scores: Tensor, group: int, leave_one_out: bool = False, scored: Tensor | None = None) -> Tensor:
    """Of each response: scores [prompts * group], the responses to a prompt side by side, to the same shape.

    (r - mean) / (std + 1e-6) within the group. The standard deviation is the sample's (divided by group - 1), as TRL, verl and
    OpenRLHF have it; TRL adds 1e-4 and OpenRLHF 1e-9. leave_one_out: r less the mean of the others, not scaled.

    scored: bool, of the same shape, which responses have a score; all, where it is left out. A group's mean, deviation and size
    are those of its scored responses. The others get 0, as do all in a group with fewer than two scores (see `comparable`).
    """
    if group < 2:
        raise ValueError(f"a group of {group} has nothing to be held against (use at least 2)")
    scored = torch.ones_like(scores, dtype=torch.bool) if scored is None else scored
    # In float32 the rounding of a mean of equal scores, divided by 1e-6, would be an advantage.
    grouped, there = real(scores.double(), scored).view(-1, group), scored.view(-1, group)
    count = there.sum(-1, keepdim=True)
    centred = real(grouped - grouped.sum(-1, keepdim=True) / count.clamp(min=1), there)
    others = (count - 1).clamp(min=1)
    if leave_one_out:
        found = centred * count / others
    else:
        found = centred / ((centred.square().sum(-1, keepdim=True) / others).sqrt() + 1e-6)
    return found.flatten().to(scores.dtype)


def comparable(scored: Tensor, group: int) -> Tensor:
    """Which responses have a score, and another one with a score in their group; bool [prompts * group] to the same shape."""
    there = scored.view(-1, group)
    return (there & (there.sum(-1, keepdim=True) >= 2)).flatten()


def loss(
    policy: Tensor,
    rows: DeviceRows,
    settings: Mapping[str, float],
    extra: RolloutData,
    normalisation: Normalisation = "token",
) -> Loss:
    """PPO's clipped loss and beta k3 of each token (equations 3 and 4); `settings`: ratio_clip, and kl, which is beta.

    Over a global batch every token weighs the same ("token": DAPO, Yu et al. 2025, equation 12; like Dr. GRPO, Liu et al.
    2025, but for its constant divisor), or every response does ("sequence": the first GRPO, which favours short right answers
    and long wrong ones).
    """
    values, metrics = ppo.policy_loss(policy, extra.old, extra.advantages, rows.mask, settings["ratio_clip"])
    if extra.reference is not None:
        distance = kl(real(policy, rows.mask), real(extra.reference, rows.mask), "k3")
        values = values + settings["kl_coef"] * distance
        metrics["policy/kl"] = distance.detach()
    weights = rows.mask
    if normalisation == "sequence":
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    return summed(values, weights, metrics)


def weight(mask: npt.NDArray[np.float32], normalisation: Normalisation = "token") -> float:
    """Tokens of responses, or responses that have any."""
    return ppo.weight(mask) if normalisation == "token" else float(mask.any(-1).sum())
