"""The exam: held-out loss of this stage's sources and of all earlier ones', so that forgetting shows.

Each stage is examined before its first step. The stage before ended at that very step, and its rows stand there: what a later
stage finds has `_before` behind its name, and its own name as well where no earlier stage read the source.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shards.errors import ShardError
from shards.feed import Batch
from trainer.batch import micro_batches, samples_a_replica, share
from trainer.objectives.dpo import METRICS
from trainer.optimizer import total
from trainer.parallel import together
from trainer.samples import policy_metrics
from trainer.stages import Exam, rows_of_a_sample
from trainer.training import Training

_SHORT = {name: name.rpartition("/")[2] for name in METRICS}


@torch.no_grad()
def evaluate(training: Training) -> bool:
    """Examines the model and reports; whether it was broken off, because the run was paused and then told something else."""
    training.reporter.flush()
    training.evaluated = training.mark
    training.phase("evaluating")
    values: dict[str, float] = {}
    try:
        for exam in training.stage.exams:
            found = _sit(training, exam)
            if found is None:
                training.note("info", f"evaluation at step {training.progress.step} was broken off")
                return True
            values |= _as_reported(training, exam, found)
        if training.stage.objective.needs_reference:
            sampled = policy_metrics(training)
            if sampled is None:
                return True
            values |= sampled
    finally:
        for network in training.networks:
            network.documents_masked = training.stage.stage.documents_masked
            network.reshard()
    at = training.progress
    training.reporter.send(at.lineage, at.step, at.tokens, values)
    training.phase("training")
    return False


def _sit(training: Training, exam: Exam) -> dict[str, float] | None:
    """Mean loss and metrics over one source's held-out samples; None if broken off."""
    world, network, stage = training.world, training.network, exam.stage
    if exam.objective.needs_reference and training.reference is None:
        return {}
    for each in training.networks:
        each.documents_masked = stage.documents_masked
    settings = {"beta": stage.beta, "label_smoothing": stage.label_smoothing} | training.progress.settings
    sums = torch.zeros(2 + len(exam.objective.metrics), device=world.device)
    stride = stage.micro_batch * network.replicas
    for start in range(0, len(exam.samples), stride):
        if training.boundary.peek():
            return None
        count = min(stride, len(exam.samples) - start)
        mine = share(start, count, network.replica, network.replicas)
        batches: list[Batch] = []
        problem = together(lambda mine=mine, read=batches: read.append(exam.samples.read(*mine)), world, ShardError)  # type: ignore[misc]
        if problem:
            training.hold_for_data(problem)
            training.evaluated = None
            return None
        samples = samples_a_replica(count, network.replicas)
        for part in micro_batches(batches[0], rows_of_a_sample(stage), samples, samples, world.device):
            fixed = training.reference.log_probs(part) if exam.objective.needs_reference and training.reference else None
            loss, weight, metrics = exam.objective.loss(network.log_probs(part), part, settings, fixed)
            if network.speaks:
                sums += torch.stack([loss, weight, *(metrics[name] for name in exam.objective.metrics)])
    return _means(exam, total(sums))


def _as_reported(training: Training, exam: Exam, found: dict[str, float]) -> dict[str, float]:
    at = training.progress
    if at.stage_step or not at.stage:
        return found
    before = {f"{name}_before": value for name, value in found.items()}
    known = any(exam.name in stage.mixture for stage in training.recipe.stage[: at.stage])
    return before if known else before | found


def _means(exam: Exam, sums: Tensor) -> dict[str, float]:
    loss, weight, *metrics = sums.tolist()
    if not weight:
        return {}
    found = {f"eval/{exam.name}/loss": loss / weight}
    for name, value in zip(exam.objective.metrics, metrics, strict=True):
        found[f"eval/{exam.name}/{_SHORT[name]}"] = value / weight
    return found
