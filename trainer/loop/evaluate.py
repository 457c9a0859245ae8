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
from shards.errors import ShardError
from shards.sampling.batches import Batch
from shards.sampling.mixing import covers
from trainer.batches import Rows, may_trim, micro_batches, samples_a_replica, share
from trainer.distributed.mesh import together
from trainer.loop.text_samples import policy_metrics
from trainer.objectives.dpo import METRICS, complete
from trainer.objectives.reward import gaps, score_places
from trainer.optimizer import total
from trainer.stage.reference_logprobs import prepare
from trainer.stage.stage import Exam
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
        for exam in training.stage.exams:
            found = _sit(training, exam)
            if found is None:
                training.note("info", f"evaluation at step {training.progress.step} was broken off")
                return True
            values |= _as_reported(training, exam, found)
        if training.stage.stage.needs_reference:
            sampled = policy_metrics(training)
            if sampled is None:
                return True
            values |= sampled
    finally:
        for network in training.networks:
            network.reshard()
    at = training.progress
    training.reporter.send(at.lineage, at.step, at.tokens, values)
    training.phase("training")
    return False


def _sit(training: Training, exam: Exam) -> dict[str, float] | None:
    """Mean loss and metrics over one source's held-out samples, as its own stage trains on them; None if broken off."""
    with ExitStack() as configured:
        for each in training.networks:
            configured.enter_context(each.configured(temperature=1.0, documents_masked=exam.stage.documents_masked))
        return _examined(training, exam)


def _examined(training: Training, exam: Exam) -> dict[str, float] | None:
    world, network, stage = training.world, training.network, exam.stage
    reference, cached = training.reference if exam.objective.needs_reference else None, training.sums
    if cached is not None and not (exam.stage is training.stage.stage and cached.has(exam.name, "held_out")):
        cached = None
    if exam.objective.needs_reference and reference is None and cached is None:
        return {}
    settings = exam_settings(stage) | training.progress.settings
    sums = torch.zeros(2 + len(exam.objective.metrics) + BINS, device=world.device)
    stride, trims = stage.micro_batch * network.replicas, may_trim(training.recipe, stage)
    for start in range(0, len(exam.samples), stride):
        if training.boundary.peek():
            return None
        count = min(stride, len(exam.samples) - start)
        mine = share(start, count, network.replica, network.replicas)
        batches: list[Batch] = []
        problem = together(lambda mine=mine, read=batches: read.append(exam.samples.read(*mine)), world, ShardError)  # type: ignore[misc]  # mypy cannot type a lambda's default
        if problem:
            training.hold_for_data(problem)
            training.evaluated = None
            return None
        samples = samples_a_replica(count, network.replicas)
        for part in micro_batches(batches[0], 2 if exam.pairs else 1, samples, samples, world.device, trims):
            fixed = reference.log_probs(part) if reference is not None else None
            if cached is not None and exam.objective.needs_reference:
                fixed = cached.of(batches[0].samples, part, "held_out")
            found = network.scores(part) if network.scalar else network.log_probs(part)
            loss, weight, metrics = exam.objective.loss(found, part, settings, fixed)
            told = torch.stack([loss, weight, *(metrics[name] for name in exam.objective.metrics)])
            if network.speaks:
                sums += torch.cat([told, _gaps(found, part) if network.scalar else torch.zeros(BINS, device=world.device)])
    return _means(exam, total(sums))


def _gaps(scores: Tensor, rows: Rows) -> Tensor:
    """Of the real pairs: [BINS]."""
    chosen, rejected = scores.gather(1, score_places(rows)[:, None])[:, 0].chunk(2)
    return gaps((chosen - rejected)[complete(rows.mask)], BINS).float()


def exam_settings(stage: Stage) -> dict[str, float]:
    """What objectives need of a stage whose live settings are another's by now."""
    return {"beta": stage.beta, "label_smoothing": stage.label_smoothing, "margin": stage.margin, "centre": stage.centre}


def _as_reported(training: Training, exam: Exam, found: dict[str, float]) -> dict[str, float]:
    at = training.progress
    if at.stage_step or not at.stage:
        return found
    before = {f"{name}_before": value for name, value in found.items()}
    known = any(covers(name, exam.name) for stage in training.recipe.stage[: at.stage] for name in stage.sources)
    return before if known else before | found


def _means(exam: Exam, sums: Tensor) -> dict[str, float]:
    loss, weight, *rest = sums.tolist()
    if not weight:
        return {}
    metrics, bins = rest[:-BINS], rest[-BINS:]
    found = {f"eval/{exam.name}/loss": loss / weight}
    for name, value in zip(exam.objective.metrics, metrics, strict=True):
        found[f"eval/{exam.name}/{_SHORT[name]}"] = value / weight
    if exam.pairs:
        low, high = interval(found[f"eval/{exam.name}/accuracy"], weight)
        found |= {f"eval/{exam.name}/accuracy_low": low, f"eval/{exam.name}/accuracy_high": high}
    if any(bins):
        found[f"eval/{exam.name}/calibration_error"] = sum(map(abs, bins)) / (2 * weight)
    return found


def interval(share: float, count: float) -> tuple[float, float]:
    """In which a share seen in so many lies, 19 times in 20: Wilson 1927's score interval."""
    z = 1.959964
    middle, spread = share + z * z / (2 * count), z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return (middle - spread) / scale, (middle + spread) / scale
