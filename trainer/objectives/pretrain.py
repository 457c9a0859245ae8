"""Next-token prediction: the summed negative log-likelihood of every real token."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

from trainer.batch import Rows
from trainer.model import Decoder, log_probs


def loss(
    model: Decoder, rows: Rows, settings: Mapping[str, float], reference: Decoder | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Radford et al. 2018, equation 1; weighed by real tokens."""
    logits = model(rows.tokens, rows.positions, rows.segments)
    return -(log_probs(logits, rows.targets) * rows.mask).sum(), rows.mask.sum(), {}


def weight(mask: npt.NDArray[np.float32]) -> float:
    return float(mask.sum())
