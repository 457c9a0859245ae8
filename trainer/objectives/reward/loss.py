"""A reward model from preferences: the chosen response is to score higher than the rejected one.

Bradley and Terry 1952; Ouyang et al. 2022 (InstructGPT), equation 1; the margin of Touvron et al. 2023 (Llama 2), equation 2,
one for all pairs; the centring of Eisenstein et al. 2023, which fixes the level that a difference leaves open.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from midwatch.recipe import Stage
from trainer.batches import DeviceRows
from trainer.objectives.loss import Loss, last_place, real, summed
from trainer.objectives.objective import Objective
from trainer.objectives.preference_pairs import METRICS, complete, weight


def loss(values: Tensor, rows: DeviceRows, settings: Mapping[str, float], reference: Tensor | None = None) -> Loss:
    """Rows [2 pairs, time]: the chosen responses, then the rejected ones in the same order. Weighed by pairs that have both.

    values: the scalar head's, [rows, time]; the score is that at `score_places`. `settings`: margin, centre.
    """
    there = complete(rows.mask).float()
    place = torch.arange(values.shape[1], device=values.device) == score_places(rows)[:, None]
    # Not by `gather`, whose gradient is added up, for which CUDA has no order of its own.
    scores = real(values, place & (there.repeat(2) > 0)[:, None]).sum(1)
    found, metrics = preferences(scores, settings["margin"], settings["center_rewards"])
    return summed(found, there, metrics)


def objective(stage: Stage) -> Objective:
    return Objective(loss, weight, METRICS)


def score_places(rows: DeviceRows) -> Tensor:
    """Where each row's score is read: the last input that is no padding, [rows]; 0 in a row that has none.

    The mask does not tell: it is 1 where the *target* is of the response, and the input whose target is EOS has not seen the EOS.
    So rows of a reward model have the EOS as their last input, whose target does not count, and segments tell where that is.
    """
    return last_place(rows.segments >= 0)


def preferences(scores: Tensor, margin: float = 0.0, centre: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair, [pairs], and its metrics, from scores [2 pairs]: the chosen ones, then the rejected.

    -log sigmoid(r_c - r_r - margin) + centre (r_c + r_r)^2. `preference/margin` is r_c - r_r, the given margin not taken off.
    """
    chosen, rejected = scores.chunk(2)
    apart = chosen - rejected
    values = -F.logsigmoid(apart - margin) + centre * (chosen + rejected).square()
    detached = (apart > 0).float(), apart.detach(), chosen.detach(), rejected.detach()
    return values, dict(zip(METRICS, detached, strict=True))


def calibration(margins: Tensor, bins: int = 10) -> Tensor:
    """Expected calibration error of sigmoid(r_c - r_r) as the probability that the first response of a pair is the better one.

    margins [pairs] of held-out pairs -> scalar: 0 is perfect; of a model that is always sure, its error rate. Each pair counts
    both ways round, or every outcome would be 1. Bins are of equal width in probability (Guo et al. 2017, equation 3).
    """
    return gaps(margins, bins).abs().sum() / (2 * len(margins))


def gaps(margins: Tensor, bins: int = 10) -> Tensor:
    """Summed probability less summed outcome of each bin, float64 [bins]; to be added over ranks before `calibration`'s sum."""
    both = torch.cat([margins, -margins]).double()
    said, happened = both.sigmoid(), (torch.arange(len(both), device=both.device) < len(margins)).double()
    places = (said * bins).long().clamp(max=bins - 1)
    return said.new_zeros(bins).index_add(0, places, said - happened)
