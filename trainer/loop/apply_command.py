"""What each order does to the training, on every rank alike, at a boundary.

Pausing, resuming and stopping at once are the boundary's own. Every order ends with one outcome, but for a checkpoint that has
yet to be written: its outcome comes with its commit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from midwatch.checkpoint_format.manifest import CheckpointError
from midwatch.protocol import Ended, Op, Order
from shards.common.errors import ShardError
from trainer.loop.stage_end import end_stage
from trainer.stage.training import Training

_ENDINGS: dict[int, Literal["stopped", "released", "regrouped"]] = {
    Op.STOP: "stopped",
    Op.RELEASE: "released",
    Op.REGROUP: "regrouped",
}
"""Orders after which the ranks leave, and what for."""


def apply(training: Training, order: Order) -> None:
    """Applies an order and reports its outcome."""
    handler = HANDLERS.get(order.op)
    if handler is None:
        training.boundary.settle(order, ok=False, reason=f"operation {order.op} is not known to this version")
    else:
        handler(training, order)


def _checkpoint(training: Training, order: Order) -> None:
    training.reporter.flush()
    id, there = training.save(numbers=(order.number,))
    if there:
        training.boundary.settle(order, ok=True, detail={"checkpoint": id})
    else:
        training.boundary.acknowledge(order)


def _rollback(training: Training, order: Order) -> None:
    arguments, before = order.arguments, training.progress
    training.phase("loading")
    try:
        training.resume_from(
            str(arguments["checkpoint"]),
            int(arguments["lineage"]["id"]),
            int(arguments.get("skip") or 0),
            float(arguments.get("lr_scale") or 1.0),
        )
    except CheckpointError as error:
        training.boundary.settle(order, ok=False, reason=str(error))
    else:
        at = training.progress
        undone = before.step - at.step
        training.boundary.settle(order, ok=True, detail={"lineage": at.lineage, "step": at.step, "undone": undone})
    training.obeyed()


def _advance(training: Training, order: Order) -> None:
    recipe, here = training.recipe, training.progress.stage
    wanted = order.arguments.get("to")
    names = [stage.name for stage in recipe.stage]
    index = here + 1 if wanted is None else names.index(wanted) if wanted in names else -1
    reason = None
    if wanted is None and index == len(names):
        reason = f'"{names[here]}" is the last stage (stop ends the run)'
    elif index <= here:
        later = ", ".join(names[here + 1 :]) or "none"
        reason = f'"{wanted}" is not a stage after "{names[here]}" (there are: {later})'
    elif index < len(names):
        reason = training.passed_over(index)
    product = None
    if reason is None:
        product, reason = end_stage(training, index)
    if reason is not None:
        training.boundary.settle(order, ok=False, reason=reason)
    else:
        training.boundary.settle(order, ok=True, detail={"stage": training.progress.stage_name, "checkpoint": product})
    training.obeyed()


def _set(training: Training, order: Order) -> None:
    key, value = str(order.arguments["key"]), float(order.arguments["value"])
    try:
        old = training.change(key, value)
    except (ValueError, ShardError) as error:
        training.boundary.settle(order, ok=False, reason=str(error))
        return
    training.boundary.settle(order, ok=True, detail={"key": key, "old": old, "new": value})
    training.obeyed()


def _end(training: Training, order: Order) -> None:
    id, problem = training.save_and_wait()
    if problem is not None:
        training.boundary.settle(order, ok=False, reason=problem)
        training.obeyed()
        return
    training.boundary.settle(order, ok=True, detail={"checkpoint": id})
    training.ending = Ended(cause=_ENDINGS[order.op], step=training.progress.step, checkpoint=id)


HANDLERS: dict[int, Callable[[Training, Order], None]] = {
    Op.CHECKPOINT: _checkpoint,
    Op.ROLLBACK: _rollback,
    Op.ADVANCE: _advance,
    Op.SET: _set,
    **dict.fromkeys(_ENDINGS, _end),
}
"""What carries out each order; the boundary itself sees to the others."""
