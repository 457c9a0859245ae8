"""The one loop, the same for every stage: boundary, batch, objective, backward, clip, optimizer, metrics."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from launcher.protocol import Ended
from shards.errors import ShardError
from shards.feed import Batch
from trainer import boundaries
from trainer.batch import Rows, filled, micro_batches, samples_a_replica, share
from trainer.boundary import StopNow
from trainer.commands import apply
from trainer.evaluate import evaluate
from trainer.optimizer import learning_rate, total
from trainer.parallel import first_problem, reduce
from trainer.peak import flops_per_second
from trainer.pipeline import end_stage
from trainer.reporting import StepReport
from trainer.stages import rows_of_a_sample
from trainer.training import Training


def train(training: Training) -> None:
    """Trains until the run is finished or told to end, and says which."""
    try:
        while not boundary(training):
            if training.progress.stage_step == 0 and training.evaluated != training.mark:
                evaluate(training)
            elif training.stage_is_over:
                end_stage(training)
            elif step(training) and not training.stage_is_over and _due(training, "eval_every", training.progress.stage_step):
                evaluate(training)
        training.phase("ending")
        training.reporter.flush()
        training.checkpointer.join()
        training.checkpointer.poll()
    except StopNow:
        training.ending = Ended(cause="stopped-now", step=training.progress.step)
        training.checkpointer.abandon()
    if training.ending is not None:
        training.link.send(training.ending)


def boundary(training: Training) -> bool:
    """All that happens between two steps: a checkpoint that is due, settings to apply again, orders. Whether the run ends here."""
    at = training.progress
    if at.stage_step and not training.stage_is_over and _due(training, "checkpoint_every", at.step) and not training.just_loaded:
        training.save()
    training.just_loaded = False
    training.replay()
    while training.ending is None and (order := training.boundary.next()) is not None:
        apply(training, order)
    return training.ending is not None


def _due(training: Training, setting: str, step: int) -> bool:
    return step % int(training.progress.settings[setting]) == 0


def step(training: Training) -> bool:
    """One optimizer update over the global batch; whether it was taken, or the run paused because a rank cannot read its share."""
    began = time.monotonic()
    world, at, run, network = training.world, training.progress, training.stage, training.network
    stage, objective = run.stage, run.objective

    training.pace.begin()
    batch, problem = _read(training)
    waited = time.monotonic() - began
    unread, weight, tokens, *counts = reduce(_counted(training, batch), world.control)
    if unread or batch is None:
        training.hold_for_data(first_problem(problem, world) or "")
        return False

    samples, size = filled(samples_a_replica(stage.global_batch, network.replicas), stage.micro_batch, world.pipeline.size)
    parts = list(micro_batches(batch, rows_of_a_sample(stage), samples, size, world.device))
    values = total(torch.cat([_gradients(training, parts, weight), training.optimizer.squared_norm()[None]]))
    norm = values[-1].sqrt()
    rate = learning_rate(stage, at.settings, at.stage_step)
    training.optimizer.update(at.settings, rate, stage.eps, norm)
    training.heartbeat.own = training.pace.end(waited)

    at.step += 1
    at.stage_step += 1
    at.position += stage.global_batch
    at.tokens += tokens
    training.revision = 0
    seconds = time.monotonic() - began
    known = {"train/lr": rate, "train/tokens": float(at.tokens)}
    known |= {"perf/step_seconds": seconds, "perf/tokens_per_second": tokens / seconds, "perf/data_wait_seconds": waited}
    known |= {f"data/{name}/fraction": count / stage.global_batch for name, count in zip(stage.mixture, counts, strict=True)}
    if training.stall:
        known["perf/checkpoint_stall_seconds"], training.stall = training.stall, 0.0
    if world.pipeline.size > 1:
        known["perf/pipeline_bubble"] = network.bubble(len(parts))
    if peak := flops_per_second(world.device, training.recipe.model.dtype):
        known["perf/mfu"] = network.flops_per_token(stage.context) * tokens / seconds / (peak * world.size)

    def read(found: list[float]) -> dict[str, float]:
        *added, norm, skipped = found
        names = ("train/loss", *objective.metrics)
        means = {name: value / max(weight, 1) for name, value in zip(names, added, strict=False)}
        return means | boundaries.means(added[len(names) :]) | {"train/grad_norm": norm, "train/skipped_updates": skipped}

    values = torch.cat([values[:-1], norm[None], training.optimizer.skipped[None]])
    training.reporter.put(StepReport(lineage=at.lineage, step=at.step, tokens=at.tokens, known=known, values=values, read=read))
    return True


def _counted(training: Training, batch: Batch | None) -> tuple[int, ...]:
    """Whether this rank could not read its share; from one rank of a replica its weight, tokens and samples by source."""
    stage, objective = training.stage.stage, training.stage.objective
    if batch is None or not training.network.speaks:
        return (int(batch is None), 0, 0, *(0 for _ in stage.mixture))
    sources = [sum(source == name for source, _, _ in batch.samples) for name in stage.mixture]
    return (0, int(objective.weight(batch.mask)), int(batch.mask.sum()), *sources)


def _gradients(training: Training, parts: list[Rows], weight: int) -> Tensor:
    """Forward and backward of all micro-batches: summed loss, metrics, and what `boundaries` sums; of this rank, on the device.

    The loss is the mean over the real tokens of the whole batch, which weigh `weight` together.
    """
    objective, network, settings = training.stage.objective, training.network, training.progress.settings
    fixed = [training.reference.log_probs(part) if training.reference else None for part in parts]
    sums = torch.zeros(1 + len(objective.metrics), device=training.world.device)
    placed = torch.zeros(boundaries.COUNT, device=training.world.device)

    def loss_of(number: int, policy: Tensor) -> Tensor:
        loss, _, metrics = objective.loss(policy, parts[number], settings, fixed[number])
        if network.speaks:
            sums.add_(torch.stack([loss.detach(), *(metrics[name] for name in objective.metrics)]))
            if objective.by_token:
                placed.add_(boundaries.sums(policy, parts[number]))
        return loss / max(weight, 1)

    network.backward(parts, loss_of)
    return torch.cat([sums, placed])


def _read(training: Training) -> tuple[Batch | None, str | None]:
    """This rank's share of the step, or why there is none."""
    network, stage = training.network, training.stage.stage
    try:
        mine = share(training.progress.position, stage.global_batch, network.replica, network.replicas)
        return training.stage.reader.read(*mine), None
    except ShardError as error:
        return None, str(error)
