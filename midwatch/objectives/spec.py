"""The spec of an objective: all that a recipe's checks, the plan, the live settings and the screen need to know of it.

It imports no torch. The loss itself is named by `implementation` and is imported on the ranks alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from midwatch.objectives.setting import NoSettings, Problem
from shards.spec import Kind, ObjectiveKind

SAMPLING = ("max_new_tokens", "temperature")
"""Keys of `[stage.rollout]` of all objectives whose model writes responses."""
SCORING = ("num_generations", "reward", "function", "missing_eos_penalty")
"""Of those whose responses are scored."""
LEARNING = (*SAMPLING, *SCORING, "prompts", "epochs", "normalise", "kl_coef", "ratio_clip", "mismatch")
"""Of those that learn from scored responses."""


LOSS = "train/loss"
GRADIENT_NORM = "train/grad_norm"


@dataclass(frozen=True)
class Chart:
    """A chart of the screen's first view."""

    metric: str
    """The metric that it draws."""
    title: str
    held_out: str = ""
    """Draws `eval/*/NAME` as well."""
    setting: str = ""
    """A live setting whose value the title shows."""


def _none(settings: Any) -> list[Problem]:
    return []


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """One objective. The object that an entry point of the group `midwatch.objectives` names."""

    name: str
    """As a stage's `objective` gives it, and the entry point's own name."""
    summary: str
    """One sentence."""
    implementation: str
    """`MODULE:NAME` of a function from a `Stage` to a `trainer.objectives.objective.Objective`, or, of an objective that makes
    data, of one from a `Training` and prompts to records."""
    sources: tuple[Kind, ...]
    """Kinds of source that it reads."""
    sample: ObjectiveKind
    """What a sample is: a window of text, packed conversations, a pair of rows, a row with a label, or a prompt."""
    settings: type[msgspec.Struct] = NoSettings
    """Its keys of `[[stage]]`, each with a default."""
    check: Callable[[Any], list[Problem]] = _none
    """What is wrong with the settings beyond each key's own bounds."""
    rollout: tuple[str, ...] = ()
    """Keys of `[stage.rollout]` that it reads; empty: it writes no responses."""
    fewest_generations: int = 1
    """Responses to one prompt at the least."""
    fewest_samples: int = 1
    """Samples of a step at the least."""
    makes: Mapping[str, Kind] = field(default_factory=dict)
    """Parts of the data that it makes for later stages, each with its kind; an objective that makes data trains nothing."""
    scalar: bool = False
    """Whether it trains a model with a scalar head, which scores texts."""
    reference: bool | str = False
    """Whether a frozen copy of the model that the stage began with is needed; or the key of a boolean setting that says that it is
    not."""
    reward_model: bool = False
    """Whether responses are scored, by a reward model or by a function."""
    critic: bool = False
    """Whether a value model is trained as well."""
    evaluates: Kind | None = None
    """Held-out sources of this kind are measured by this objective where the stage that reads them has no measure of its own."""
    implicit_reward: str | None = None
    """The live setting that turns a log-ratio of policy and reference into the objective's implicit reward."""
    extra_forwards: float = 0.0
    """Forward passes over each row besides those of training and of the reference: what the plan counts."""
    metrics: Mapping[str, str] = field(default_factory=dict)
    """Its own metrics, each with its meaning."""
    charts: tuple[tuple[Chart, ...], ...] = ()
    """What the screen's first view shows, the most telling first. Each place has the first of its charts whose metric is reported.

    Where the loss is not among them it comes first, and the held-out loss and the figures of all objectives come last.
    """

    @property
    def draws(self) -> bool:
        """Whether it learns from responses that the model writes."""
        return bool(self.rollout) and not self.makes

    @property
    def by_text(self) -> bool:
        """Whether it learns all of a text, and not an assistant's part of a conversation."""
        return self.sample == "text"

    @property
    def pairs(self) -> bool:
        """Whether a sample is two rows: the chosen response and the rejected one."""
        return self.sample in ("preference", "scored")

    def needs_reference(self, settings: msgspec.Struct) -> bool:
        if isinstance(self.reference, str):
            return not getattr(settings, self.reference)
        return self.reference
