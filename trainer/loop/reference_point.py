"""The reference point of objectives that have one: how far the policy is from the reference on mismatched prompts and responses.

It is the mean over the whole global batch, whatever the ranks and micro-batches: each sample's prompt is put together with the
response of the sample before it in the batch's order, the first one's with the last response.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shards.sampling.batches import Batch
from trainer.batches import DeviceRows, may_trim, micro_batches
from trainer.model.sharded_model import ShardedModel
from trainer.objectives.objective import LabelledComparison, Objective
from trainer.objectives.preference_pairs import responses
from trainer.optimizer import total
from trainer.stage.training import Training
from trainer.transfer import sent


def one_before(first: int, start: int, count: int) -> int:
    """The position whose response goes with the prompt at `first`, of `count` positions from `start` on."""
    return start + (first - start - 1) % count


def shifted(batch: Batch, previous: Batch) -> Batch:
    """The samples one before each of `batch`; previous: the one before the first."""
    if not len(batch.tokens):
        return batch
    found = Batch.empty(len(batch.tokens), batch.tokens.shape[1], 0, [*previous.samples, *batch.samples][:-1])
    for name in ("tokens", "targets", "mask", "segments", "positions", "desirable"):
        column = getattr(found, name)
        column[:1], column[1:] = getattr(previous, name), getattr(batch, name)[:-1]
    return found


@torch.no_grad()
def log_ratios(
    training: Training, objective: Objective, reference: ShardedModel, batch: Batch, previous: Batch, samples: int, size: int
) -> Tensor:
    """Sum of this replica's log-ratios on mismatched rows and their number, float32 [2]; 0 on ranks that lead no replica.

    samples, size: as `micro_batches` has them, the same on all replicas.
    """
    assert objective.mismatched is not None
    model, device = training.model, training.world.device
    sums = torch.zeros(2, device=device)
    rows = objective.mismatched(batch, shifted(batch, previous))
    for part in micro_batches(rows, 1, samples, size, device, may_trim(training.recipe, training.stage.stage)):
        ratio = responses(model.log_probs(part), part) - responses(reference.log_probs(part), part)
        if model.is_replica_leader:
            sums += torch.stack([ratio.sum(), part.mask.any(-1).float().sum()])
    model.reshard()
    return sums


def point(sums: Tensor) -> Tensor:
    """From every rank's `log_ratios` to the reference point, a scalar. By all ranks alike."""
    added = total(sums)
    return (added[0] / added[1].clamp(min=1)).clamp(min=0)


def comparison(batch: Batch, start: int, rows: DeviceRows, reference: Tensor, reference_point: Tensor) -> LabelledComparison:
    """What `rows` are compared with, which hold the samples of `batch` from number `start` on; those that fill up weigh nothing."""
    desirable = torch.zeros(len(rows.tokens), dtype=torch.bool)
    mine = torch.from_numpy(batch.desirable[start : start + len(desirable)])
    desirable[: len(mine)] = mine
    return LabelledComparison(reference, sent(desirable, rows.tokens.device), reference_point)
