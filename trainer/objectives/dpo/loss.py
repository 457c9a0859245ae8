"""Direct preference optimisation: prefer the chosen response to the rejected one by more than the reference does.

Rafailov et al. 2023, equation 7, with the label smoothing of cDPO (Mitchell 2023); IPO: Azar et al. 2023, equation 17. Implicit
rewards are beta (log pi - log pi_ref), equation 5 without the term that both responses share.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from midwatch.recipe import Stage
from trainer.batches import DeviceRows
from trainer.objectives.dpo.spec import Settings
from trainer.objectives.loss import Loss, summed
from trainer.objectives.objective import Objective
from trainer.objectives.preference_pairs import METRICS, complete, responses, weight

Kind = Literal["sigmoid", "ipo"]


def loss(
    policy: Tensor,
    rows: DeviceRows,
    settings: Mapping[str, float],
    reference: Tensor | None,
    kind: Kind = "sigmoid",
    length_normalised: bool = False,
    reference_free: bool = False,
) -> Loss:
    """Rows [2 pairs, time]: the chosen responses, then the rejected ones in the same order. Weighed by pairs (`complete`).

    `settings`: beta, and for "sigmoid" label_smoothing. reference_free: against a reference that gives all responses the same
    probability, which the difference of two leaves out; `reference` is then not looked at.
    """
    assert reference_free or reference is not None, "DPO holds against a reference"
    there = complete(rows.mask).float()
    ours = responses(policy, rows, length_normalised)
    fixed = torch.zeros_like(ours) if reference_free or reference is None else responses(reference, rows, length_normalised)
    smoothing = settings["label_smoothing"] if kind == "sigmoid" else 0.0
    values, metrics = preferences(ours, fixed, settings["beta"], smoothing, kind)
    return summed(values, there, metrics)


def preferences(
    policy: Tensor, reference: Tensor, beta: float, label_smoothing: float, kind: Kind = "sigmoid"
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair, [pairs], and its metrics, from log-probabilities [2 pairs]: the chosen ones, then the rejected.

    With h the difference of the log-ratios: -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h); "ipo": (h - 1 / (2 beta))^2.
    On summed log-probabilities that is OpenRLHF's IPO; TRL's takes means over the response (`responses`, length_normalised).
    """
    chosen, rejected = (policy - reference).chunk(2)
    rewards = beta * chosen, beta * rejected
    margin = rewards[0] - rewards[1]
    if kind == "ipo":
        values = (chosen - rejected - 1 / (2 * beta)).square()
    else:
        values = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    detached = (margin > 0).float(), margin.detach(), rewards[0].detach(), rewards[1].detach()
    return values, dict(zip(METRICS, detached, strict=True))


def objective(stage: Stage) -> Objective:
    given = stage.settings
    assert isinstance(given, Settings)
    bound = partial(loss, kind=given.dpo_loss, length_normalised=given.length_normalised, reference_free=given.reference_free)
    return Objective(bound, weight, METRICS, needs_reference=stage.needs_reference)
