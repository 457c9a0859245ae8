"""The settings that can be changed while a run trains, their bounds, and what a stage begins with."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from midwatch.objectives.setting import Setting, in_force, settings_of
from midwatch.recipe.recipe import Recipe
from midwatch.recipe.renamed_keys import SETTINGS
from midwatch.recipe.stage import Stage

_BOUNDS: dict[str, tuple[float, float, str]] = {
    "lr": (0.0, 100.0, "peak learning rate of the stage"),
    "lr_scale": (0.0, 1000.0, "factor on the learning rate"),
    "min_lr_ratio": (0.0, 1.0, "end of the cosine as a part of the peak"),
    "weight_decay": (0.0, 100.0, "AdamW's weight decay"),
    "max_grad_norm": (1e-9, 1e9, "largest norm of the gradient"),
    "beta1": (0.0, 0.999999, "AdamW's first beta"),
    "beta2": (0.0, 0.999999, "AdamW's second beta"),
    "eval_every": (1, 1e9, "steps between evaluations"),
    "checkpoint_every": (1, 1e9, "steps between checkpoints"),
}
_WHOLE = ("eval_every", "checkpoint_every")
KEPT_ACROSS_STAGES = ("checkpoint_every",)
"""Settings that a new stage does not reset."""


def stage_settings(recipe: Recipe, stage: Stage) -> dict[str, float]:
    """The live settings with which the stage begins."""
    settings: dict[str, float] = {
        "lr": stage.lr,
        "lr_scale": 1.0,
        "min_lr_ratio": stage.min_lr_ratio,
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.max_grad_norm,
        "beta1": stage.betas[0],
        "beta2": stage.betas[1],
        "eval_every": stage.eval_every,
        "checkpoint_every": recipe.checkpoint.every,
    }
    settings |= objective_settings(stage)
    settings |= {f"mixture.{name}": stage.mixture.get(name, 0.0) for name in stage.sources}
    return settings


def objective_settings(stage: Stage) -> dict[str, float]:
    """Those of them that are the objective's own."""
    found: dict[str, float] = {}
    for part, key, each in _of_objective(stage):
        value = getattr(part, key)
        if value is None:
            value = getattr(stage, each.unset) if isinstance(each.unset, str) else each.unset
        found[key] = value
    return found


def _of_objective(stage: Stage) -> Iterator[tuple[msgspec.Struct, str, Setting]]:
    """The objective's own live settings: the struct that each is a field of, its name, and its bounds."""
    parts: list[tuple[msgspec.Struct, tuple[str, ...]]] = [
        (stage.settings, stage.settings.__struct_fields__),
        (stage.rollout_settings, stage.spec.rollout),
    ]
    for part, keys in parts:
        for key, setting in settings_of(type(part)).items():
            if key in keys and setting.live is not None and in_force(part, setting):
                yield part, key, setting


def check_setting(recipe: Recipe, stage: Stage, key: str, value: float) -> float:
    """The value as it will be set. Raises ValueError with the reason and what is possible."""
    known = stage_settings(recipe, stage)
    if key not in known and SETTINGS.get(key) in known:
        raise ValueError(f"{key} is named {SETTINGS[key]} now")
    if key not in known:
        raise ValueError(f'stage "{stage.name}" has no setting {key!r}; it has: {", ".join(known)}')
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{key}: {value} is not a number to set")
    own = {name: (part, each) for part, name, each in _of_objective(stage)}
    part, setting = own.get(key, (None, None))
    if setting is not None and setting.live is not None:
        bounds = (*setting.live, setting.help)
    else:
        bounds = _BOUNDS.get(key, (0.0, 1e9, "weight in the mixture"))
    low, high, meaning = bounds
    if not low <= value <= high:
        raise ValueError(f"{key} ({meaning}): {value:g} is not between {low:g} and {high:g}")
    if part is not None and part is stage.settings:
        for name, message in stage.spec.check(msgspec.structs.replace(part, **{key: value})):
            if name == key:
                raise ValueError(f"{key} ({meaning}): {message}")
    if key in _WHOLE and value != int(value):
        raise ValueError(f"{key} ({meaning}): {value:g} is not a whole number")
    return value
