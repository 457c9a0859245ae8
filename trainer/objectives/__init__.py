"""What a stage trains for: pure functions from log-probabilities of a batch's targets to a loss.

An objective returns sums, not means: the loop divides by the weight of the whole global batch, over all micro-batches and
ranks. It knows nothing of ranks, files or screens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from midwatch.recipe import Stage
from trainer.batches import DeviceRows
from trainer.objectives import dpo, grpo, ppo, pretrain, reward, sft
from trainer.objectives.loss import Loss


@dataclass(frozen=True)
class Objective:
    loss: Callable[[Tensor, DeviceRows, Mapping[str, float], Any], Loss]
    """(log-probabilities of the rows' targets, or scores, [rows, time]; rows; live settings; what it is held against).

    That is the reference's log-probabilities, [rows, time], or an `Experience`, or nothing.
    """
    weight: Callable[[npt.NDArray[np.float32]], float]
    """What a mask [rows, time] weighs, as `loss` sums it."""
    metrics: tuple[str, ...] = ()
    """Names of its metrics, in order."""
    needs_reference: bool = False
    by_token: bool = False
    """Weighed by tokens, of which some are near the beginnings of documents."""


OBJECTIVES = {
    "pretrain": Objective(pretrain.loss, pretrain.weight, by_token=True),
    "sft": Objective(sft.loss, sft.weight, by_token=True),
    "reward": Objective(reward.loss, reward.weight, reward.METRICS),
    "dpo": Objective(dpo.loss, dpo.weight, dpo.METRICS, needs_reference=True),
    "ppo": Objective(ppo.loss, ppo.weight, ppo.METRICS),
    "grpo": Objective(grpo.loss, ppo.weight, grpo.METRICS),
}
CRITIC = Objective(ppo.critic_loss, ppo.weight, ppo.CRITIC_METRICS)
"""The value model's, beside PPO's."""


def objective_of(stage: Stage) -> Objective:
    """The stage's objective, as its settings make it."""
    if stage.makes:
        return OBJECTIVES["sft"]  # what it makes is examined by later stages; it trains nothing
    objective = OBJECTIVES[stage.objective]
    if stage.objective == "grpo":
        by = stage.rollout_settings.normalisation
        return replace(objective, loss=partial(grpo.loss, normalisation=by), weight=partial(grpo.weight, normalisation=by))
    if stage.objective != "dpo":
        return objective
    loss = partial(dpo.loss, kind=stage.dpo_loss, length_normalised=stage.length_normalised, reference_free=stage.reference_free)
    return replace(objective, loss=loss, needs_reference=stage.needs_reference)
