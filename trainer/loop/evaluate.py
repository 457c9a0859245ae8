"""The exam: held-out loss of this stage's sources and of all earlier ones', so that forgetting shows.

Each stage is examined before its first step. The stage before ended at that very step, and its rows stand there: what a later
stage finds has `_before` behind its name, and its own name as well where no earlier stage read the source.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from midwatch.metrics.wilson import wilson_interval
from midwatch.recipe.live_settings import objective_settings
from shards.common.errors import ShardError
from shards.sampling.batches import Batch
from shards.sampling.mixing import covers
from trainer.batches import DeviceRows, may_trim, micro_batches, samples_a_replica, share
from trainer.distributed.mesh import together
from trainer.loop.reference_point import comparison, log_ratios, one_before, point
from trainer.loop.text_samples import policy_metrics
from trainer.model.sharded_model import ShardedModel
from trainer.objectives.preference_pairs import complete
from trainer.objectives.reward.loss import gaps, score_places
from trainer.optimizer import total
from trainer.stage.reference_logprobs import prepare
from trainer.stage.stage import EvalTask
from trainer.stage.training import Training

BINS = 10
"""Of the calibration of a reward model's margins."""


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
    settings, compared = _settings(training, task), None
    if task.objective.mismatched is not None:
        assert reference is not None
        compared = _reference_point(training, task, reference)
        if compared is None:
            return None
    sums = torch.zeros(2 + len(task.objective.metrics) + BINS, device=world.device)
    stride, trims = stage.micro_batch * model.replicas, may_trim(training.recipe, stage)
    for start in range(0, len(task.samples), stride):
        if training.boundary.peek():
            return None
        count = min(stride, len(task.samples) - start)
        batch = _read(training, task, *share(start, count, model.replica, model.replicas))
        if batch is None:
            return None
        samples = samples_a_replica(count, model.replicas)
        for part in micro_batches(batch, 2 if task.pairs else 1, samples, samples, world.device, trims):
            extra: Any = reference.log_probs(part) if reference is not None else None
            if cached is not None and task.objective.needs_reference:
                extra = cached.of(batch.samples, part, "held_out")
            if compared is not None:
                extra = comparison(batch, 0, part, extra, compared)
            found = model.scores(part) if model.scalar else model.log_probs(part)
            loss, weight, metrics = task.objective.loss(found, part, settings, extra)
            told = torch.stack([loss, weight, *(metrics[name] for name in task.objective.metrics)])
            if model.is_replica_leader:
                sums += torch.cat([told, _gaps(found, part) if model.scalar else torch.zeros(BINS, device=world.device)])
    return _means(task, total(sums))


def _read(training: Training, task: EvalTask, first: int, last: int) -> Batch | None:
    """Held-out samples; None where a rank cannot read its own. By all ranks alike."""
    batches: list[Batch] = []
    problem = together(lambda: batches.append(task.samples.read(first, last)), training.world, ShardError)
    if problem:
        training.hold_for_data(problem)
        training.evaluated = None
        return None
    return batches[0]


def _reference_point(training: Training, task: EvalTask, reference: ShardedModel) -> Tensor | None:
    """Of all held-out samples; None if broken off."""
    model, every = training.model, len(task.samples)
    sums, stride = torch.zeros(2, device=training.world.device), task.stage.micro_batch * model.replicas
    for start in range(0, every, stride):
        if training.boundary.peek():
            return None
        count = min(stride, every - start)
        mine = share(start, count, model.replica, model.replicas)
        batch, before = _read(training, task, *mine), one_before(mine[0], 0, every)
        previous = None if batch is None else _read(training, task, before, before + 1)
        if batch is None or previous is None:
            return None
        samples = samples_a_replica(count, model.replicas)
        sums += log_ratios(training, task.objective, reference, batch, previous, samples, samples)
    return point(sums)


def _gaps(scores: Tensor, rows: DeviceRows) -> Tensor:
    """Of the real pairs: [BINS]."""
    chosen, rejected = scores.gather(1, score_places(rows)[:, None])[:, 0].chunk(2)
    return gaps((chosen - rejected)[complete(rows.mask)], BINS).float()


def _settings(training: Training, task: EvalTask) -> dict[str, float]:
    """The settings of the objective that measures: as they are now where the stage that is trained has the same objective."""
    own = objective_settings(task.measure)
    return own | training.progress.settings if task.measure.spec is training.stage.stage.spec else own


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
    means = {name: value / weight for name, value in zip(task.objective.metrics, metrics, strict=True)}
    for name, value in task.objective.report(means).items():
        found[f"eval/{task.name}/{name.rpartition('/')[2]}"] = value
    if task.pairs and "preference/accuracy" in means:
        low, high = wilson_interval(means["preference/accuracy"], weight)
        found |= {f"eval/{task.name}/accuracy_low": low, f"eval/{task.name}/accuracy_high": high}
    if any(bins):
        found[f"eval/{task.name}/calibration_error"] = sum(map(abs, bins)) / (2 * weight)
    return found
