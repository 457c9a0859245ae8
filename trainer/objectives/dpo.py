"""Direct preference optimization: prefer the chosen response to the rejected one by more than the reference does.

Rafailov et al. 2023, equation 7, with the label smoothing of cDPO (Mitchell 2023). Implicit rewards are
beta (log pi - log pi_ref), equation 5 without the term that both responses share.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch.nn.functional as F
from torch import Tensor

from trainer.batch import Rows

METRICS = ("preference/accuracy", "preference/margin", "preference/chosen_reward", "preference/rejected_reward")


def loss(
    policy: Tensor, rows: Rows, settings: Mapping[str, float], reference: Tensor | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Rows [2 pairs, time]: the chosen responses, then the rejected ones in the same order. Weighed by pairs."""
    assert reference is not None, "DPO holds against a reference"
    pairs = len(rows.tokens) // 2
    real = rows.mask[:pairs].any(-1).float()
    values, sums = preferences(responses(policy, rows), responses(reference, rows), settings["beta"], settings["label_smoothing"])
    return (values * real).sum(), real.sum(), {name: (value * real).sum() for name, value in sums.items()}


def responses(log_probs: Tensor, rows: Rows) -> Tensor:
    """Log-probability of each row's response, summed over its tokens: [rows]."""
    return (log_probs * rows.mask).sum(-1)


def preferences(policy: Tensor, reference: Tensor, beta: float, label_smoothing: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of each pair, [pairs], and its metrics, from log-probabilities [2 pairs]: the chosen ones, then the rejected.

    With h the difference of the log-ratios: -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h).
    """
    chosen, rejected = (beta * (policy - reference)).chunk(2)
    margin = chosen - rejected
    values = -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
    detached = (margin > 0).float(), margin.detach(), chosen.detach(), rejected.detach()
    return values, dict(zip(METRICS, detached, strict=True))


def weight(mask: npt.NDArray[np.float32]) -> float:
    """Pairs: rows whose chosen half has a response."""
    return float(mask[: len(mask) // 2].any(-1).sum())
