"""The settings that can be changed while a run trains, their bounds, and what a stage begins with."""

from __future__ import annotations

from midwatch.recipe.recipe import Recipe
from midwatch.recipe.renamed_keys import SETTINGS
from midwatch.recipe.stage import Stage

MOST_VALUE_CLIP = 1e9
"""No value is clipped."""

_BOUNDS: dict[str, tuple[float, float, str]] = {
    "lr": (0.0, 100.0, "peak learning rate of the stage"),
    "lr_scale": (0.0, 1000.0, "factor on the learning rate"),
    "min_lr_ratio": (0.0, 1.0, "end of the cosine as a part of the peak"),
    "weight_decay": (0.0, 100.0, "AdamW's weight decay"),
    "max_grad_norm": (1e-9, 1e9, "largest norm of the gradient"),
    "beta1": (0.0, 0.999999, "AdamW's first beta"),
    "beta2": (0.0, 0.999999, "AdamW's second beta"),
    "beta": (0.0, 100.0, "DPO's tie to the reference"),
    "label_smoothing": (0.0, 0.499, "DPO's part of wrong labels"),
    "kl_coef": (0.0, 1000.0, "coefficient of the distance from the reference"),
    "ratio_clip": (1e-6, 10.0, "how far the policy's ratio may go"),
    "margin": (-1000.0, 1000.0, "by which the chosen response is to score higher"),
    "center_rewards": (0.0, 1000.0, "weight of the scores' distance from 0"),
    "value_clip": (1e-6, MOST_VALUE_CLIP, "how far a value may go"),
    "value_lr": (0.0, 100.0, "peak learning rate of the value model"),
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
    if stage.objective == "dpo":
        settings["beta"] = stage.beta
        if stage.dpo_loss == "sigmoid":
            settings["label_smoothing"] = stage.label_smoothing
    if stage.objective == "reward":
        settings |= {"margin": stage.margin, "center_rewards": stage.center_rewards}
    if stage.draws:
        settings |= {"kl_coef": stage.rollout_settings.kl_coef, "ratio_clip": stage.rollout_settings.ratio_clip}
    if stage.objective == "ppo":
        value_lr = stage.lr if stage.rollout_settings.value_lr is None else stage.rollout_settings.value_lr
        value_clip = MOST_VALUE_CLIP if stage.rollout_settings.value_clip is None else stage.rollout_settings.value_clip
        settings |= {"value_clip": value_clip, "value_lr": value_lr}
    settings |= {f"mixture.{name}": stage.mixture.get(name, 0.0) for name in stage.sources}
    return settings


def check_setting(recipe: Recipe, stage: Stage, key: str, value: float) -> float:
    """The value as it will be set. Raises ValueError with the reason and what is possible."""
    known = stage_settings(recipe, stage)
    if key not in known and SETTINGS.get(key) in known:
        raise ValueError(f"{key} is named {SETTINGS[key]} now")
    if key not in known:
        raise ValueError(f'stage "{stage.name}" has no setting {key!r}; it has: {", ".join(known)}')
    if value != value or value in (float("inf"), float("-inf")):
        raise ValueError(f"{key}: {value} is not a number to set")
    low, high, meaning = _BOUNDS.get(key, (0.0, 1e9, "weight in the mixture"))
    if not low <= value <= high:
        raise ValueError(f"{key} ({meaning}): {value:g} is not between {low:g} and {high:g}")
    if key == "beta" and value == 0 and stage.dpo_loss == "ipo":
        raise ValueError(f"{key} ({meaning}): IPO aims at 1 / (2 beta), so it must be greater than 0")
    if key in _WHOLE and value != int(value):
        raise ValueError(f"{key} ({meaning}): {value:g} is not a whole number")
    return value
