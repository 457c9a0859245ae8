"""Next-token prediction: the summed negative log-likelihood of every real token."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

from midwatch.recipe import Stage
from trainer.batches import DeviceRows
from trainer.objectives.loss import Loss, real
from trainer.objectives.objective import Objective


def loss(policy: Tensor, rows: DeviceRows, settings: Mapping[str, float], reference: Tensor | None) -> Loss:
    """Radford et al. 2018, equation 1; weighed by real tokens."""
    return -(real(policy, rows.mask) * rows.mask).sum(), rows.mask.sum(), {}


def weight(mask: npt.NDArray[np.float32]) -> float:
    return float(mask.sum())


def objective(stage: Stage) -> Objective:
    return Objective(loss, weight, by_token=True)
