"""A stage as it runs: its order of samples, its objective, what it is evaluated on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from midwatch.recipe import Recipe, Stage
from midwatch.recipe.mixture import declared
from shards.common.errors import ShardError
from shards.sampling.batches import BatchFeed, HeldOut, ObjectiveKind, open_held_out
from shards.sampling.mixing import Mixing, parts
from shards.sampling.prefetch import Prefetcher
from trainer.objectives import OBJECTIVES, Objective, objective_of


@dataclass(frozen=True)
class EvalTask:
    """Held-out samples of one source, measured as the newest stage that reads it trains on it."""

    name: str
    samples: HeldOut
    objective: Objective
    stage: Stage
    pairs: bool
    """Whether a sample is two rows."""


@dataclass
class StageRun:
    """One stage's data and objective, open."""

    index: int
    stage: Stage
    feed: BatchFeed
    reader: Prefetcher
    objective: Objective
    tasks: list[EvalTask]
    made: Mapping[str, Path]
    """Where sources lie that stages have made."""

    def close(self) -> None:
        self.reader.close()


def rows_of_a_sample(stage: Stage) -> int:
    return 2 if stage.pairs else 1


def open_stage(
    recipe: Recipe, data: Path, index: int, feed_state: dict[str, Any] | None, made: Mapping[str, Path] | None = None
) -> StageRun:
    """Opens a stage's data, in the order of `feed_state` where it is given. Raises ShardError where that cannot be had.

    made: where sources lie that stages have made. Each stage has an order of its own: two that read the same sources do not read
    them alike.
    """
    stage, made = recipe.stage[index], made or {}
    missing = [source.name for source in recipe.data.source if source.origin == "stage" and source.name not in made]
    if lacking := [name for name in stage.sources if name in missing]:
        raise ShardError(
            f'stage "{stage.name}" reads "{lacking[0]}", and the stage that makes it was passed over (advance to that first)'
        )
    seed, coming = recipe.run.seed + index, stage.schedule
    more: _Reading = {"roots": made, "mixing": stage.mixing, "schedule": coming}
    feed = BatchFeed(data, "train", stage.feed_kind, stage.context, stage.mixture, seed, **more, **_packing(stage))
    if feed_state:
        feed.restore(feed_state)
    kinds = {source.name: source.kind for source in recipe.data.source}
    tasks = []
    for name, reading in _readers(recipe, index, data).items():
        source = declared(name, kinds)
        assert source is not None  # which the check of the recipe has seen to
        kind, objective = _task(kinds[source], stage, reading)
        if objective is None or name in missing:
            continue
        samples = open_held_out(made.get(name, data), name, kind, reading.context, limit=reading.eval_samples, **_packing(reading))
        if len(samples):
            tasks.append(EvalTask(name, samples, objective, reading, pairs=kinds[source] == "preference"))
    return StageRun(index, stage, feed, Prefetcher(feed, stage.global_batch), objective_of(stage), tasks, made)


def _task(kind: str, stage: Stage, reading: Stage) -> tuple[ObjectiveKind, Objective | None]:
    """How a source of that kind is examined while `stage` is trained: what of it, and by which objective; None: not at all.

    reading: the newest stage that reads it.
    """
    if stage.makes:
        return "text", None
    if stage.scalar:
        return "scored", OBJECTIVES["reward"] if kind == "preference" else None
    if kind == "preference":
        return "preference", objective_of(reading) if reading.objective == "dpo" else OBJECTIVES["dpo"]
    return ("text", OBJECTIVES["pretrain"]) if kind == "text" else ("sft", OBJECTIVES["sft"])


def _readers(recipe: Recipe, index: int, data: Path) -> dict[str, Stage]:
    """Sources of this stage and all before it, each with the newest stage that reads it; this stage's first.

    Of a source that was split by label, its parts.
    """
    found: dict[str, Stage] = {}
    for stage in reversed(recipe.stage[: index + 1]):
        for name in stage.sources:
            for part in parts(data, name):
                found.setdefault(part, stage)
    return found


class _Reading(TypedDict):
    roots: Mapping[str, Path]
    mixing: Mixing
    schedule: list[tuple[int, dict[str, float]]]


class _Packing(TypedDict):
    masked_documents: bool
    restart_positions: bool


def _packing(stage: Stage) -> _Packing:
    return {"masked_documents": stage.documents_masked, "restart_positions": stage.positions_restarted}
