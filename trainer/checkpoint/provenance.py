"""What a checkpoint was made from: the whole chain, from the corpora and the model that the run began with, stage by stage.

Checkpoints name it by digests (`trainer.progress.Origin`); here the digests are put beside what they stand for, as far as that
is still there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from midwatch.checkpoint_format import manifest
from midwatch.checkpoint_format.manifest import CheckpointError
from midwatch.recipe import Recipe, stage_inputs
from shards.common.errors import ShardError
from shards.format import manifest as shards_manifest
from trainer.progress import TrainProgress


def made_from(recipe: Recipe, data: Path, checkpoint: Path, progress: TrainProgress) -> dict[str, Any]:
    """In plain values, for JSON. data: where the shards lie. checkpoint: whose progress it is, among the run's others."""
    origin, model = progress.origin, recipe.model
    began = {"from": model.source, "digest": origin.model or model.source_digest} if model.source is not None else None
    return {
        "recipe": origin.recipe,
        "began_with": began,
        "tokenizer": origin.tokenizer,
        "stages": [_stage(recipe, data, checkpoint, progress, name) for name in _trained(recipe, progress)],
    }


def _trained(recipe: Recipe, progress: TrainProgress) -> list[str]:
    """The stages that made the checkpoint, in their order."""
    return [stage.name for stage in recipe.stage if stage.name in progress.origin.shards]


def _stage(recipe: Recipe, data: Path, checkpoint: Path, progress: TrainProgress, name: str) -> dict[str, Any]:
    index = recipe.stage_index(name)
    stage, taken = recipe.stage[index], _trained(recipe, progress)
    base, reward_model_stage = (
        stage_inputs.base(recipe.stage, index, taken),
        stage_inputs.reward_model_stage(recipe.stage, index, taken),
    )
    product = checkpoint.name if name == progress.stage_name else progress.origin.products.get(name)
    return {
        "name": name,
        "objective": stage.objective,
        "context": stage.context,
        "from": None if base is None else recipe.stage[base].name,
        "scored_by": progress.origin.functions.get(name) if reward_model_stage is None else recipe.stage[reward_model_stage].name,
        "corpora": {source: _corpus(data, source, digest) for source, digest in progress.origin.shards[name].items()},
        "product": product,
        "digest": None if product is None else _digest(checkpoint.with_name(product)),
    }


def _corpus(data: Path, source: str, digest: str) -> dict[str, str | None]:
    """A source's shards by their digest, and where their text came from, if the very same are still there."""
    try:
        found = shards_manifest.load(data / source / "train")
    except ShardError:
        return {"digest": digest, "origin": None}
    return {"digest": digest, "origin": found.origin if found.digest == digest else None}


def _digest(directory: Path) -> str | None:
    """Of a checkpoint that is still there."""
    try:
        return manifest.read(directory)[1]
    except CheckpointError:
        return None
