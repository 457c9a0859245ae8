"""The one loop, the same for every stage: boundary, batch, objective, backward, clip, optimizer, metrics."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from midwatch.protocol import Ended
from trainer.control.boundary import StopNow
from trainer.control.reporting import StepReport
from trainer.loop import packing_metrics
from trainer.loop.apply_command import apply
from trainer.loop.evaluate import evaluate
from trainer.loop.peak_flops import flops_per_second
from trainer.loop.stage_end import end_stage
from trainer.loop.train_batch import TrainBatch, next_batch
from trainer.objectives import CRITIC, Objective
from trainer.objectives.ppo import critic_metrics
from trainer.optimizer import learning_rate, total
from trainer.stage.model_roles import TrainableModel
from trainer.stage.training import Training
from trainer.synthetic import methods
from trainer.synthetic import stage as making


def train(training: Training) -> None:
    """Trains until the run is finished or told to end, and says which."""
    try:
        while not boundary(training):
            if _begins_unseen(training):
                evaluate(training)
            elif training.stage_is_over:
                end_stage(training)
            elif training.stage.stage.makes:
                make(training)
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
    """All that happens between two steps: a checkpoint or a mixture that is due, settings to apply again, orders.

    Whether the run ends here.
    """
    at = training.progress
    if at.stage_step and not training.stage_is_over and _due(training, "checkpoint_every", at.step) and not training.just_loaded:
        training.save()
    training.just_loaded = False
    training.follow_schedule()
    training.replay()
    while training.ending is None and (order := training.boundary.next()) is not None:
        apply(training, order)
    return training.ending is not None


def _begins_unseen(training: Training) -> bool:
    """Whether the stage has not been examined before its first step."""
    at = training.progress
    return at.stage_step == 0 and training.evaluated != training.mark and not training.stage.stage.makes


def _due(training: Training, setting: str, step: int) -> bool:
    return step % int(training.progress.settings[setting]) == 0


def make(training: Training) -> bool:
    """One batch of prompts of a stage that makes data; whether it was taken."""
    began = time.monotonic()
    at, stage = training.progress, training.stage.stage
    found = methods.step(training)
    if found is None or not making.keep(training, found[0]):
        return False
    at.step += 1
    at.stage_step += 1
    at.position += stage.global_batch
    training.revision = 0
    seconds = time.monotonic() - began
    training.reporter.flush()
    training.reporter.send(at.lineage, at.step, at.tokens, found[1] | {"perf/step_seconds": seconds})
    training.checkpointer.observe(at.step, True, None)
    training.phase("training")
    return True


def step(training: Training) -> bool:
    """One optimizer update over the global batch; whether it was taken, or there was nothing to learn from yet."""
    began = time.monotonic()
    world, at, run, model = training.world, training.progress, training.stage, training.model
    stage = run.stage

    training.pace.begin()
    batch = next_batch(training)
    if batch is None:
        return False

    trainables = [TrainableObjective(training.roles.policy, run.objective, "lr")]
    if training.roles.critic is not None:
        trainables.append(TrainableObjective(training.roles.critic, CRITIC, "value_lr"))
    for_each = [
        torch.cat([_gradients(training, each, batch), each.trainable.optimizer.squared_norm()[None]]) for each in trainables
    ]
    values = total(torch.cat(for_each))
    parts = torch.split(values, [len(each) for each in for_each])
    for each, found in zip(trainables, parts, strict=True):
        norm, optimizer = found[-1:].sqrt_(), each.trainable.optimizer
        lr = learning_rate(stage, at.settings, at.stage_step, each.rate)
        optimizer.update(at.settings, lr, stage.eps, norm[0].float())
    training.heartbeat.own = training.pace.end(batch.waited)

    at.step += 1
    at.stage_step += 1
    if stage.draws:
        at.drawn.updates += 1
        at.drawn.left -= 1
    else:
        at.position += stage.global_batch
    at.tokens += batch.tokens
    training.revision = 0
    seconds = time.monotonic() - began
    known = {"train/lr": learning_rate(stage, at.settings, at.stage_step - 1), "train/tokens": float(at.tokens)}
    known |= {"perf/step_seconds": seconds, "perf/tokens_per_second": batch.tokens / seconds} | batch.known
    if stage.draws:
        known["perf/update_seconds"] = seconds - batch.waited
    if training.stall:
        known["perf/checkpoint_stall_seconds"], training.stall = training.stall, 0.0
    if world.pipeline.size > 1:
        known["perf/pipeline_bubble"] = model.bubble(len(batch.parts))
    if (peak := flops_per_second(world.device, training.recipe.model.dtype)) and not stage.draws:
        known["perf/mfu"] = model.flops_per_token(stage.context) * batch.tokens / seconds / (peak * world.size)

    def read(found: list[float]) -> dict[str, float]:
        means = {"train/skipped_updates": found.pop()}
        for each, count in zip(trainables, map(len, for_each), strict=True):
            means |= each.metrics(found[:count], max(batch.weight, 1))
            del found[:count]
        return means

    report = torch.cat([values, training.optimizer.skipped[None]])
    training.reporter.put(StepReport(lineage=at.lineage, step=at.step, tokens=at.tokens, known=known, values=report, read=read))
    return True


@dataclass(frozen=True)
class TrainableObjective:
    """A learner and what it is taught."""

    trainable: TrainableModel
    objective: Objective
    rate: str
    """The setting that is its peak learning rate."""

    def metrics(self, found: list[float], weight: float) -> dict[str, float]:
        """From sums over the global batch, and the gradient's norm after them."""
        *added, norm = found
        names = self.objective.metrics
        means = {name: value / weight for name, value in zip(names, added[1:], strict=False)}
        if self.objective is CRITIC:
            return critic_metrics(means) | {"value/grad_norm": norm}
        means |= {"train/loss": added[0] / weight, "train/grad_norm": norm}
        return means | packing_metrics.means(added[1 + len(names) :])


def _gradients(training: Training, trained: TrainableObjective, batch: TrainBatch) -> Tensor:
    """Forward and backward of all micro-batches: summed loss, metrics, and what `boundaries` sums; of this rank, on the device.

    The loss is the mean over what the whole batch weighs together. Sums are float64: `value/explained_variance` takes a
    difference of them.
    """
    objective, model, settings = trained.objective, trained.trainable.model, training.progress.settings
    sums = torch.zeros(1 + len(objective.metrics), dtype=torch.float64, device=training.world.device)
    placed = torch.zeros(packing_metrics.COUNT, device=training.world.device)

    def loss_of(number: int, policy: Tensor) -> Tensor:
        loss, _, metrics = objective.loss(policy, batch.parts[number], settings, batch.held[number])
        if model.is_replica_leader:
            sums.add_(torch.stack([loss.detach(), *(metrics[name] for name in objective.metrics)]))
            if objective.by_token:
                placed.add_(packing_metrics.sums(policy, batch.parts[number]))
        return loss / max(batch.weight, 1)

    model.backward(batch.parts, loss_of)
    return torch.cat([sums, placed])
