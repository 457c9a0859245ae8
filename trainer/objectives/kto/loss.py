"""Kahneman-Tversky optimisation: from responses that are desirable or not, each on its own.

Ethayarajh et al. 2024, section 4.1, equation 8. With r = log pi - log pi_ref of a response and z0 the reference point:

    desirable      desirable_weight   (1 - sigmoid(beta (r - z0)))
    undesirable    undesirable_weight (1 - sigmoid(beta (z0 - r)))

z0 is the mean of r over the batch's prompts, each with the response to another prompt, not below 0, and takes no gradient. A
preference pair gives one desirable and one undesirable response. TRL's `KTOTrainer` takes the mean of the same terms.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from midwatch.recipe import Stage
from shards.sampling.batches import Batch
from trainer.batches import DeviceRows
from trainer.objectives.loss import Loss, summed
from trainer.objectives.objective import LabelledComparison, Objective
from trainer.objectives.preference_pairs import responses

METRICS = ("desirable", "desirable_reward", "undesirable_reward", "reference_point")
"""Sums, of which `report` makes what is reported."""


def objective(stage: Stage) -> Objective:
    return Objective(loss, weight, METRICS, report, needs_reference=True, mismatched=mismatched)


def loss(policy: Tensor, rows: DeviceRows, settings: Mapping[str, float], extra: LabelledComparison) -> Loss:
    """Rows [responses, time]. Weighed by responses; one that is empty weighs nothing.

    `settings`: beta, desirable_weight, undesirable_weight.
    """
    there = rows.mask.any(-1).float()
    ratio = responses(policy, rows) - responses(extra.reference, rows)
    values, metrics = examples(
        ratio,
        extra.desirable,
        extra.reference_point,
        settings["beta"],
        settings["desirable_weight"],
        settings["undesirable_weight"],
    )
    return summed(values, there, metrics)


def examples(
    ratio: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each response, [responses], and its metrics.

    ratio, desirable (bool): [responses]; reference_point: a scalar.
    """
    apart = beta * (ratio - reference_point)
    values = torch.where(desirable, desirable_weight * torch.sigmoid(-apart), undesirable_weight * torch.sigmoid(apart))
    reward, good = beta * ratio.detach(), desirable.float()
    point = reference_point.expand_as(reward)
    return values, dict(zip(METRICS, (good, reward * good, reward * (1 - good), point), strict=True))


def report(means: Mapping[str, float]) -> dict[str, float]:
    """What is reported of the means over a batch's responses."""
    good = means["desirable"]
    found = {"preference/desirable_fraction": good, "preference/reference_point": means["reference_point"]}
    if good > 0:
        found["preference/chosen_reward"] = means["desirable_reward"] / good
    if good < 1:
        found["preference/rejected_reward"] = means["undesirable_reward"] / (1 - good)
    if 0 < good < 1:
        found["preference/margin"] = found["preference/chosen_reward"] - found["preference/rejected_reward"]
    return found


def mismatched(batch: Batch, before: Batch) -> Batch:
    """Each sample's prompt with the response of the sample before it, cut where it does not fit.

    before: as many rows as `batch`, of the samples that come one earlier.
    """
    rows, context = batch.tokens.shape
    found = Batch.empty(rows, context, 0, batch.samples)
    for row in range(rows):
        asked, answered = batch.mask[row] > 0, before.mask[row] > 0
        if not asked.any() or not answered.any():
            continue
        prompt = batch.tokens[row, : int(np.argmax(asked)) + 1]
        sequence = np.concatenate([prompt, before.targets[row][answered]])[: context + 1]
        found.put(row, 0, sequence, np.arange(1, len(sequence)) >= len(prompt), 0)
    return found


def weight(mask: npt.NDArray[np.float32]) -> float:
    """Responses that are not empty."""
    return float(mask.any(-1).sum())
