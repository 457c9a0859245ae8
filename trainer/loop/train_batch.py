"""What one update learns from: the next batch of the stage's data, or the next responses of a rollout."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from shards.common.errors import ShardError
from shards.sampling.batches import Batch
from trainer.batches import DeviceRows, filled, may_trim, micro_batches, samples_a_replica, share
from trainer.distributed.mesh import first_problem, reduce
from trainer.rollout import rollout
from trainer.stage.reference_logprobs import prepare
from trainer.stage.stage import rows_of_a_sample
from trainer.stage.training import Training


@dataclass(frozen=True)
class TrainBatch:
    """This replica's micro-batches, and what each is held against."""

    parts: list[DeviceRows]
    held: list[Any]
    weight: float
    """Of the whole global batch, as the objective weighs it."""
    tokens: int
    """Of the same, that count."""
    known: dict[str, float]
    """Metrics of how it was come by."""
    waited: float
    """Seconds."""


def next_batch(training: Training) -> TrainBatch | None:
    """None where there is none yet: the run is paused, because data cannot be read, or an order waits. By all ranks alike."""
    return _drawn(training) if training.stage.stage.draws else _read(training)


def _drawn(training: Training) -> TrainBatch | None:
    """The next responses of the rollout, and of a new one where none are left."""
    known: dict[str, float] = {}
    began = time.monotonic()
    if not training.progress.drawn.left:
        collected = rollout.collect(training)
        if collected is None:
            return None
        known = collected
    parts, held, weight, tokens = rollout.minibatch(training)
    return TrainBatch(parts, held, weight, tokens, known, time.monotonic() - began)


def _read(training: Training) -> TrainBatch | None:
    """This replica's share of the batch; None where a rank cannot read its own."""
    began = time.monotonic()
    world, stage, model = training.world, training.stage.stage, training.model
    if stage.reference_cached and not prepare(training):
        return None
    batch, problem = _batch(training)
    waited = time.monotonic() - began
    unread, weight, tokens, empty, *counts = reduce(_counted(training, batch), world.control)
    if unread or batch is None:
        training.hold_for_data(first_problem(problem, world) or "")
        return None
    samples, size = filled(samples_a_replica(stage.global_batch, model.replicas), stage.micro_batch, world.pipeline.size)
    trims = may_trim(training.recipe, stage)
    parts = list(micro_batches(batch, rows_of_a_sample(stage), samples, size, world.device, trims))
    fixed, sums = training.reference if stage.needs_reference else None, training.sums
    if sums is not None:
        held: list[Any] = [sums.of(batch.samples[at * size :], part, "train") for at, part in enumerate(parts)]
    else:
        held = [fixed.log_probs(part) if fixed is not None else None for part in parts]
    known = {f"data/{name}/fraction": count / stage.global_batch for name, count in zip(stage.sources, counts, strict=True)}
    known |= {"data/empty_samples": float(empty)} if empty else {}
    return TrainBatch(parts, held, weight, tokens, known | {"perf/data_wait_seconds": waited}, waited)


def _counted(training: Training, batch: Batch | None) -> tuple[int, ...]:
    """Whether this rank could not read its share; from one rank of a replica its weight, tokens, empty samples, and all by source.

    An empty sample has nothing to learn from: no token that counts, or of a pair one response without any.
    """
    stage, objective = training.stage.stage, training.stage.objective
    if batch is None or not training.model.is_replica_leader:
        return (int(batch is None), 0, 0, 0, *(0 for _ in stage.sources))
    named = training.stage.feed.named
    read = Counter(named.get(source, source) for source, _, _ in batch.samples)
    empty = int((~batch.mask.any(-1).reshape(rows_of_a_sample(stage), -1).all(0)).sum())
    return (0, int(objective.weight(batch.mask)), int(batch.mask.sum()), empty, *(read[name] for name in stage.sources))


def _batch(training: Training) -> tuple[Batch | None, str | None]:
    """This rank's share of the step, or why there is none."""
    model, stage = training.model, training.stage.stage
    try:
        mine = share(training.progress.position, stage.global_batch, model.replica, model.replicas)
        return training.stage.reader.read(*mine), None
    except ShardError as error:
        return None, str(error)
