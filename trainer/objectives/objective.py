"""An objective as the ranks use it: pure functions from log-probabilities of a batch's targets to a loss.

An objective returns sums, not means: the loop divides by the weight of the whole global batch, over all micro-batches and
ranks. It knows nothing of ranks, files or screens.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from midwatch.objectives.registry import ObjectiveError
from midwatch.recipe import Stage
from midwatch.recipe.rollout import Rollout
from shards.sampling.batches import Batch
from trainer.batches import DeviceRows
from trainer.objectives.loss import Loss


class LabelledComparison(NamedTuple):
    """What responses that are desirable or not are compared with."""

    reference: Tensor
    """The reference's log-probabilities, [rows, time]."""
    desirable: Tensor
    """Bool, [rows]."""
    reference_point: Tensor
    """In nats, a scalar, the same for the whole global batch."""


class ScoredResponses(NamedTuple):
    """Responses of a rollout with their scores, [responses] or [responses, time]."""

    scores: Tensor
    """[responses]; 0 where there is none."""
    scored: Tensor
    """Bool, [responses]: which have one."""
    mask: Tensor
    """1 at the tokens that are learned from."""
    policy: Tensor
    """Log-probabilities under the policy that wrote them."""
    reference: Tensor
    values: Tensor | None
    """The value model's, where there is one."""
    kl_coefficient: float
    settings: Rollout


class Credit(NamedTuple):
    """What each token of a rollout is worth, [responses, time]."""

    advantages: Tensor
    returns: Tensor | None = None
    """What the value model is to learn."""
    metrics: Mapping[str, float] = {}


@dataclass(frozen=True)
class RolloutRules:
    """How scores become advantages."""

    learned: Callable[[Tensor, Rollout], Tensor]
    """Which responses are learned from, by those that have a score: bool [responses] to the same."""
    credit: Callable[[ScoredResponses], Credit]


@dataclass(frozen=True)
class Objective:
    loss: Callable[[Tensor, DeviceRows, Mapping[str, float], Any], Loss]
    """(log-probabilities of the rows' targets, or scores, [rows, time]; rows; live settings; what it compares with).

    That is the reference's log-probabilities, [rows, time], or a `LabelledComparison`, or `RolloutData`, or nothing.
    """
    weight: Callable[[npt.NDArray[np.float32]], float]
    """What a mask [rows, time] weighs, as `loss` sums it."""
    metrics: tuple[str, ...] = ()
    """Names of the metrics that `loss` sums, in order."""
    report: Callable[[Mapping[str, float]], dict[str, float]] = dict
    """From their means to what is reported."""
    needs_reference: bool = False
    by_token: bool = False
    """Weighed by tokens, of which some are near the beginnings of documents."""
    mismatched: Callable[[Batch, Batch], Batch] | None = None
    """Of an objective that compares with a reference point: from samples, and as many that come one before each, the rows on whose
    mean log-ratio of policy and reference the loss depends. `loss` is then given a `LabelledComparison`."""
    rollout: RolloutRules | None = None
    """Of an objective that learns from the model's own responses."""
    critic: Objective | None = None
    """Of the value model that is trained as well."""


def objective_of(stage: Stage) -> Objective:
    """The stage's objective, as its settings make it. Raises ObjectiveError."""
    if stage.makes:
        return Objective(_no_loss, _no_weight)
    made: Objective = implementation(stage)(stage)
    return made


def _no_loss(values: Tensor, rows: DeviceRows, settings: Mapping[str, float], extra: Any) -> Loss:
    raise AssertionError("an objective that makes data has no loss")


def _no_weight(mask: npt.NDArray[np.float32]) -> float:
    return 0.0


def implementation(stage: Stage) -> Callable[..., Any]:
    """What the stage's spec names. Raises ObjectiveError."""
    return _imported(stage.objective, stage.spec.implementation)


@functools.cache
def _imported(name: str, place: str) -> Callable[..., Any]:
    module, _, attribute = place.partition(":")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the code of another package raises
        text = f'objective "{name}": {place} cannot be loaded: {type(error).__name__}: {error} (correct or reinstall its package)'
        raise ObjectiveError(text) from error
    return found
