"""The exam: held-out loss of this stage's sources and of all earlier ones', so that forgetting shows.

Each stage is examined before its first step. The stage before ended at that very step, and its rows stand there: what a later
stage finds has `_before` behind its name, and its own name as well where no earlier stage read the source.
"""

from __future__ import annotations

import math
from contextlib import ExitStack

import torch
from torch import Tensor

from midwatch.recipe import Stage
from shards.common.errors import ShardError
from shards.sampling.batches import Batch
from shards.sampling.mixing import covers
from trainer.batches import DeviceRows, may_trim, micro_batches, samples_a_replica, share
from trainer.distributed.mesh import together
from trainer.loop.text_samples import policy_metrics
from trainer.objectives.dpo import METRICS, complete
from trainer.objectives.reward import gaps, score_places
from trainer.optimizer import total
from trainer.stage.reference_logprobs import prepare
from trainer.stage.stage import EvalTask
from trainer.stage.training import Training

BINS = 10
"""Of the calibration of a reward model's margins."""
_SHORT = {name: name.rpartition("/")[2] for name in METRICS}


@torch.no_grad()
def evaluate(training: Training) -> bool:
    """Examines the model and reports; whether it was broken off, because the run was paused and then told something else."""
    training.reporter.flush()
    training.evaluated = training.mark
    training.phase("evaluating")
    values: dict[str, float] = {}
    if training.stage.stage.reference_cached and not prepare(training):
        training.evaluated = None
        return True
    try:
        for task in training.stage.tasks:
            found = _evaluate_task(training, task)
            if found is None:
                training.note("info", f"evaluation at step {training.progress.step} was broken off")
                return True
            values |= _as_reported(training, task, found)
        if training.stage.stage.needs_reference:
            sampled = policy_metrics(training)
            if sampled is None:
                return True
            values |= sampled
    finally:
        for model in training.models:
            model.reshard()
    at = training.progress
    training.reporter.send(at.lineage, at.step, at.tokens, values)
    training.phase("training")
    return False


def _evaluate_task(training: Training, task: EvalTask) -> dict[str, float] | None:
    """Mean loss and metrics over one source's held-out samples, as its own stage trains on them; None if broken off."""
    with ExitStack() as configured:
        for each in training.models:
            configured.enter_context(each.configured(temperature=1.0, documents_masked=task.stage.documents_masked))
        return _examined(training, task)


def _examined(training: Training, task: EvalTask) -> dict[str, float] | None:
    world, model, stage = training.world, training.model, task.stage
    reference, cached = training.reference if task.objective.needs_reference else None, training.sums
    if cached is not None and not (task.stage is training.stage.stage and cached.has(task.name, "held_out")):
        cached = None
    if task.objective.needs_reference and reference is None and cached is None:
        return {}
    settings = exam_settings(stage) | training.progress.settings
    sums = torch.zeros(2 + len(task.objective.metrics) + BINS, device=world.device)
    stride, trims = stage.micro_batch * model.replicas, may_trim(training.recipe, stage)
    for start in range(0, len(task.samples), stride):
        if training.boundary.peek():
            return None
        count = min(stride, len(task.samples) - start)
        mine = share(start, count, model.replica, model.replicas)
        batches: list[Batch] = []
        problem = together(lambda mine=mine, read=batches: read.append(task.samples.read(*mine)), world, ShardError)  # type: ignore[misc]  # mypy cannot type a lambda's default
        if problem:
            training.hold_for_data(problem)
            training.evaluated = None
            return None
        samples = samples_a_replica(count, model.replicas)
        for part in micro_batches(batches[0], 2 if task.pairs else 1, samples, samples, world.device, trims):
            fixed = reference.log_probs(part) if reference is not None else None
            if cached is not None and task.objective.needs_reference:
                fixed = cached.of(batches[0].samples, part, "held_out")
            found = model.scores(part) if model.scalar else model.log_probs(part)
            loss, weight, metrics = task.objective.loss(found, part, settings, fixed)
            told = torch.stack([loss, weight, *(metrics[name] for name in task.objective.metrics)])
            if model.is_replica_leader:
                sums += torch.cat([told, _gaps(found, part) if model.scalar else torch.zeros(BINS, device=world.device)])
    return _means(task, total(sums))


def _gaps(scores: Tensor, rows: DeviceRows) -> Tensor:
    """Of the real pairs: [BINS]."""
    chosen, rejected = scores.gather(1, score_places(rows)[:, None])[:, 0].chunk(2)
    return gaps((chosen - rejected)[complete(rows.mask)], BINS).float()


def exam_settings(stage: Stage) -> dict[str, float]:
    """What objectives need of a stage whose live settings are another's by now."""
    return {
        "beta": stage.beta,
        "label_smoothing": stage.label_smoothing,
        "margin": stage.margin,
        "center_rewards": stage.center_rewards,
    }


def _as_reported(training: Training, task: EvalTask, found: dict[str, float]) -> dict[str, float]:
    at = training.progress
    if at.stage_step or not at.stage:
        return found
    before = {f"{name}_before": value for name, value in found.items()}
    known = any(covers(name, task.name) for stage in training.recipe.stage[: at.stage] for name in stage.sources)
    return before if known else before | found


def _means(task: EvalTask, sums: Tensor) -> dict[str, float]:
    loss, weight, *rest = sums.tolist()
    if not weight:
        return {}
    metrics, bins = rest[:-BINS], rest[-BINS:]
    found = {f"eval/{task.name}/loss": loss / weight}
    for name, value in zip(task.objective.metrics, metrics, strict=True):
        found[f"eval/{task.name}/{_SHORT[name]}"] = value / weight
    if task.pairs:
        low, high = interval(found[f"eval/{task.name}/accuracy"], weight)
        found |= {f"eval/{task.name}/accuracy_low": low, f"eval/{task.name}/accuracy_high": high}
    if any(bins):
        found[f"eval/{task.name}/calibration_error"] = sum(map(abs, bins)) / (2 * weight)
    return found


def interval(share: float, count: float) -> tuple[float, float]:
    """In which a share seen in so many lies, 19 times in 20: Wilson 1927's score interval."""
    z = 1.959964
    middle, sharding = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (middle - sharding) / scale, (middle + sharding) / scale
