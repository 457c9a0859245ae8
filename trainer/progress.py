"""Where a run stands: all of a checkpoint's state that is not a tensor."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from midwatch.checkpoint_format.manifest import CheckpointError
from midwatch.recipe import Recipe, Stage
from midwatch.recipe.live_settings import KEPT_ACROSS_STAGES, stage_settings


class Origin(msgspec.Struct, kw_only=True):
    """What the weights were made from."""

    recipe: str = ""
    """Digest of the recipe."""
    model: str = ""
    """Digest of the directory that the run began with; empty where it began with weights drawn at random."""
    tokenizer: str = ""
    """Hash of the tokenizer's model."""
    shards: dict[str, dict[str, str]] = {}
    """Stage to source to the digest of its shards."""
    functions: dict[str, str] = {}
    """Stage to the digest of the file of the function that scored its responses."""
    products: dict[str, str] = {}
    """Stage to the checkpoint that ended it."""


class Files(msgspec.Struct, kw_only=True):
    """Steps of a stage whose files are of one lineage."""

    lineage: int
    first: int
    last: int


class Rollout(msgspec.Struct, kw_only=True):
    """Where a policy stands that learns from its own responses."""

    count: int = 0
    """Rollouts of the stage."""
    updates: int = 0
    """Taken with the newest one."""
    left: int = 0
    """Still to be taken with it."""
    version: int = 0
    """Step whose weights drew it."""
    kl_scale: float = 1.0
    """By which the coefficient of the KL has been steered; on the live setting `kl`."""
    scores: int = 0
    """That the running deviation is of; with their mean, and the sum of squares about it."""
    mean: float = 0.0
    squares: float = 0.0


class TrainProgress(msgspec.Struct, kw_only=True):
    """Counted at a boundary: updates done, samples read."""

    lineage: int = 1
    step: int = 0
    stage: int = 0
    """Index of the stage in the recipe."""
    stage_name: str = ""
    stage_step: int = 0
    revision: int = 0
    """Of a checkpoint: changes of settings since its step."""
    ended: bool = False
    """The stage is over; a run that loads this goes on with the next."""
    following: int | None = None
    """Index of the stage to go on with, where that is not simply the next."""
    tokens: int = 0
    """Real tokens trained on in the whole run."""
    position: int = 0
    """Samples of the stage's order that were read or passed over."""
    settings: dict[str, float] = {}
    """Live settings in force."""
    reference: str | None = None
    """Checkpoint whose weights the newest stage with a reference holds against; None: none, or the initial weights."""
    has_reference: bool = False
    reward_model: str | None = None
    """Checkpoint of the reward model that scores this stage's responses."""
    drawn: Rollout = msgspec.field(default_factory=Rollout)
    files: list[Files] = []
    """What this stage has made, where it makes data."""
    made: dict[str, str] = {}
    """Stage to the directory of what it made, below RUN/made."""
    feed: dict[str, Any] = {}
    """The order of samples, as the feed keeps it."""
    origin: Origin = msgspec.field(default_factory=Origin)


def plain(progress: TrainProgress) -> dict[str, Any]:
    """As builtins, for a manifest."""
    state: dict[str, Any] = msgspec.to_builtins(progress)
    return state


def from_manifest(state: dict[str, Any], where: str, recipe: Recipe) -> TrainProgress:
    """Raises CheckpointError if it is not the state of a run of this recipe."""
    try:
        progress = msgspec.convert(state, TrainProgress)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{where}: its state is not that of a run: {error}") from None
    names = [stage.name for stage in recipe.stage]
    if not 0 <= progress.stage < len(names) or names[progress.stage] != progress.stage_name:
        raise CheckpointError(f'{where}: was made in stage "{progress.stage_name}", which this recipe does not have there')
    return progress


def opening_settings(recipe: Recipe, stage: Stage, before: dict[str, float]) -> dict[str, float]:
    """The settings a stage begins with: its own, but for those that no stage resets."""
    return stage_settings(recipe, stage) | {key: before[key] for key in KEPT_ACROSS_STAGES if key in before}


def checkpoint_id(progress: TrainProgress, revision: int = 0) -> str:
    """STEP-LINEAGE, with -STAGE where it ends a stage, and .REVISION where a setting was changed since the one before."""
    name = f"{progress.step}-{progress.lineage}"
    if revision:
        name += f".{revision}"
    return f"{name}-{re.sub(r'[^A-Za-z0-9_.-]', '_', progress.stage_name)}" if progress.ended else name
