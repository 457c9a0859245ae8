"""`[[stage]]`: one part of the pipeline, an objective with a length, a data mixture and an optimizer schedule."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

import msgspec

from midwatch.objectives import setting
from midwatch.objectives.registry import ObjectiveError, built_in, spec_of
from midwatch.objectives.spec import ObjectiveSpec
from midwatch.recipe import mixture as mixtures
from midwatch.recipe.bounds import MOST_COUNT, MOST_STEPS, MOST_TOKENS, bounded
from midwatch.recipe.mixture import Anneal
from midwatch.recipe.model import Model, Rope
from midwatch.recipe.rollout import Rollout
from shards.common.decoding import LARGEST
from shards.sampling.mixing import Mixing, MixtureBy
from shards.spec import ObjectiveKind

_WAY_OUT = {
    "learned": "use position_factor",
    "sinusoidal": "use position_factor",
    "alibi": "drop it: ALiBi reaches further as it is",
    "none": "drop it",
}


class Repeat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Stages in a round."""

    times: int
    since: str
    """The first of them."""


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stage of the pipeline. Lengths are in optimizer steps, contexts in tokens, batches in samples."""

    name: str
    objective: str
    """Name of an objective: a folder of `trainer.objectives`, or an entry point of the group `midwatch.objectives`."""
    steps: int
    context: int
    global_batch: int
    """Samples of one optimizer step over all ranks; the same at any number of ranks. Where a policy learns from its own
    responses, these."""
    mixture: dict[str, float]
    """Weight of each source by its name; need not sum to 1. `NAME.LABEL` is one part of a source that is split by label."""
    mixture_by: MixtureBy = "weight"
    """`tokens`: the weights are factors on what sources have for their tokens."""
    mixture_temperature: float = 1.0
    """By tokens, the share of a source is its tokens to the power of 1 / this."""
    max_epochs: dict[str, float] = {}
    """Times that a source is read at the most; used up, it leaves its place to the others."""
    anneal: tuple[Anneal, ...] = ()
    """Mixtures to come."""
    base: str | None = msgspec.field(default=None, name="from")
    """Earlier stage whose product this one begins with; the one before it, past reward models, where it is left out."""
    rollout: Rollout | None = None
    """Of objectives whose model writes responses: how it does, and how it learns from them."""
    repeat: Repeat | None = None
    """The stages since an earlier one, and this one, are taken several times."""
    micro_batch: int = 8
    """Samples of one forward pass on one rank; the rest is accumulated."""
    lr: float = 3e-4
    """Peak learning rate."""
    min_lr_ratio: float = 0.1
    """Where the cosine ends, as a part of the peak."""
    warmup_steps: int | None = None
    """Steps of linear warm-up: 2,000, or 1 % of a shorter stage, where it is left out."""
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    """Largest norm of the whole gradient."""
    masked_documents: bool | None = None
    """Documents packed into one row do not see each other: so for fine-tuning, not for pretraining, unless said here."""
    restart_positions: bool | None = None
    """Positions begin anew with each document of a row: so where documents are masked, unless said here."""
    context_parallel: int = 1
    """Ranks that split each row's tokens among them."""
    activation_checkpointing: Literal["none", "selective", "block", "offloaded"] = "none"
    """What is computed again for the backward. `selective`: all but matrix products and attention; `block`: whole blocks;
    `offloaded`: whole blocks, whose inputs wait in the host's memory."""
    mlp_chunk_tokens: int | None = None
    """Tokens that pass through an MLP at a time; all, where left out."""
    loss_chunk_tokens: int = 4096
    """Tokens whose logits are there at a time."""
    rope: Rope | None = None
    """How rotary positions are stretched in this stage; as the model's `rope` where it is left out."""
    position_factor: float = 1.0
    """Learned and sinusoidal positions are divided by this, and learned ones read between the table's rows."""
    eval_every: int = 200
    """Steps between evaluations on held-out data; also at the start and the end of a stage."""
    eval_samples: int = 64
    """Held-out samples of each source that an evaluation reads."""
    prompts: tuple[str, ...] = ()
    """Prompts whose continuations are shown at the end of the stage."""
    sample_tokens: int = 64
    """Tokens of each such continuation at the most."""
    settings: Any = None
    """The objective's own keys, as the struct that its spec names. In TOML they are keys of the stage itself."""

    def __post_init__(self) -> None:
        try:
            kind = self.spec.settings
        except ObjectiveError:
            return  # `problems` tells
        if not isinstance(self.settings, kind):
            msgspec.structs.force_setattr(self, "settings", kind())

    @property
    def spec(self) -> ObjectiveSpec:
        """Raises ObjectiveError."""
        return spec_of(self.objective)

    def with_settings(self, **changes: Any) -> Stage:
        """With other values of the objective's own keys."""
        return msgspec.structs.replace(self, settings=msgspec.structs.replace(self.settings, **changes))

    @property
    def resolved_warmup_steps(self) -> int:
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(2000, max(1, self.steps // 100))

    @property
    def documents_masked(self) -> bool:
        return not self.spec.by_text if self.masked_documents is None else self.masked_documents

    @property
    def positions_restarted(self) -> bool:
        return self.documents_masked if self.restart_positions is None else self.restart_positions

    @property
    def sources(self) -> tuple[str, ...]:
        """All names that its mixtures read by, those to come included."""
        return tuple(dict.fromkeys([*self.mixture, *(name for each in self.anneal for name in each.mixture)]))

    @property
    def mixing(self) -> Mixing:
        """How its mixtures are taken."""
        return Mixing(self.mixture_by, self.mixture_temperature, self.max_epochs)

    @property
    def schedule(self) -> list[tuple[int, dict[str, float]]]:
        """Its mixtures to come, by the position of its samples' order from which they hold."""
        return [(self.position_after(each.step(self.steps)), each.mixture) for each in self.anneal]

    def position_after(self, steps: int) -> int:
        """Samples that so many steps take; of prompts that responses are drawn to, whole rollouts."""
        return -(-steps // self.updates_drawn) * self.prompts_drawn if self.draws else steps * self.global_batch

    @property
    def feed_kind(self) -> ObjectiveKind:
        """What of its sources it reads."""
        return self.spec.sample

    @property
    def data_kinds(self) -> tuple[str, ...]:
        """The kinds of source that this stage's objective reads."""
        return self.spec.sources

    @property
    def scalar(self) -> bool:
        """Whether its product gives texts numbers, and is no language model."""
        return self.spec.scalar

    @property
    def draws(self) -> bool:
        """Whether it learns from responses that the model draws."""
        return self.spec.draws

    @property
    def makes(self) -> bool:
        """Whether it makes data for later stages, and trains nothing: its steps are batches of prompts."""
        return bool(self.spec.makes)

    @property
    def pairs(self) -> bool:
        """Whether a sample is two rows: the chosen response and the rejected one."""
        return self.spec.pairs

    @property
    def reference_cached(self) -> bool:
        """Whether the reference's log-probabilities are worked out before the first step: a setting that an objective may have."""
        return bool(getattr(self.settings, "reference_cached", False))

    @property
    def rows_per_sample(self) -> int:
        return 2 if self.pairs else 1

    @property
    def rollout_settings(self) -> Rollout:
        """How it draws its responses."""
        return self.rollout or Rollout()

    @property
    def temperature(self) -> float:
        """At which its log-probabilities are taken: that of the responses that it learns from."""
        return self.rollout_settings.temperature if self.draws else 1.0

    @property
    def needs_reference(self) -> bool:
        """Whether the stage holds what it trains against a frozen copy of what it began with."""
        return self.spec.needs_reference(self.settings)

    @property
    def prompts_drawn(self) -> int:
        """Prompts of one rollout."""
        return self.rollout_settings.prompts or max(1, self.global_batch // self.rollout_settings.num_generations)

    @property
    def updates_drawn(self) -> int:
        """Updates that one rollout is good for."""
        return self.prompts_drawn * self.rollout_settings.num_generations // self.global_batch * self.rollout_settings.epochs

    def problems(self) -> list[tuple[str, str]]:
        """(key, what is wrong and the way out) for each impossible setting."""
        try:
            spec = self.spec
        except ObjectiveError as error:
            return [("objective", str(error))]
        found: list[tuple[str, str]] = []
        found += bounded(self, 1, MOST_STEPS, ("steps", "eval_every"))
        found += bounded(self, 1, MOST_TOKENS, ("context", "global_batch", "micro_batch", "mlp_chunk_tokens", "loss_chunk_tokens"))
        found += bounded(self, 1, MOST_COUNT, ("context_parallel",))
        found += bounded(self, 0, MOST_COUNT, ("eval_samples", "sample_tokens"))
        if not found and 2 * self.steps * self.global_batch * self.context > LARGEST:
            found.append(("steps", "its tokens (steps x global_batch x context, twice for pairs) do not fit in 64 bits"))
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}", self.name):
            found.append(("name", "is up to 100 letters, digits, `_`, `-` or `.`, and does not begin with `.`"))
        for key in ("lr", "max_grad_norm", "eps"):
            if not 0 < getattr(self, key) < math.inf:
                found.append((key, "must be greater than 0 and finite"))
        if not 0 <= self.weight_decay < math.inf:
            found.append(("weight_decay", "must not be negative, and finite"))
        if not 0 <= self.min_lr_ratio <= 1:
            found.append(("min_lr_ratio", "must lie between 0 and 1"))
        found += setting.problems(self.settings)
        found += spec.check(self.settings)
        if 0 < self.global_batch < spec.fewest_samples:
            found.append(("global_batch", f"must be at least {spec.fewest_samples}: {spec.name} compares samples of a step"))
        if not all(0 <= b < 1 for b in self.betas):
            found.append(("betas", "must each lie between 0 and 1"))
        found += mixtures.problems(self)
        if not 0 < self.position_factor < math.inf:
            found.append(("position_factor", "must be greater than 0 and finite"))
        if spec.rollout:
            found += [(f"rollout.{key}", message) for key, message in self.rollout_settings.problems()]
            found += [("rollout", message) for message in self._rollout_problems()]
            found += [(f"rollout.{key}", _elsewhere(key, self.objective)) for key in self._unread_rollout_keys(spec)]
        elif self.rollout is not None:
            message = f"is for objectives that draw responses, and the objective is {self.objective} (drop it)"
            found.append(("rollout", message))
        if self.warmup_steps is not None and not 0 <= self.warmup_steps <= self.steps:
            found.append(
                ("warmup_steps", f"{self.warmup_steps} steps do not fit into a stage of {self.steps} (use 0 to {self.steps})")
            )
        return found

    def _rollout_problems(self) -> list[str]:
        drawn, found = self.prompts_drawn * self.rollout_settings.num_generations, []
        if self.draws and self.global_batch > 0 and drawn % self.global_batch:
            ways = f"{-(-drawn // self.global_batch) * self.global_batch // self.rollout_settings.num_generations} prompts"
            found.append(f"a rollout of {drawn} responses is not a multiple of global_batch {self.global_batch} (use {ways})")
        if self.rollout_settings.max_new_tokens >= self.context:
            response = self.rollout_settings.max_new_tokens
            found.append(f"{response} tokens of a response leave no room for a prompt in a context of {self.context}")
        fewest = self.spec.fewest_generations
        if self.rollout_settings.num_generations < fewest:
            found.append(f"responses to one prompt are compared with each other (set num_generations to {fewest} or more)")
        return found

    def _unread_rollout_keys(self, spec: ObjectiveSpec) -> list[str]:
        """Keys of `[stage.rollout]` that say something and that the objective does not read."""
        defaults = Rollout()
        keys = (key for key in Rollout.__struct_fields__ if key not in spec.rollout)
        return [key for key in keys if getattr(self.rollout_settings, key) != getattr(defaults, key)]

    def position_problems(self, model: Model) -> list[tuple[str, str]]:
        """The same for what this stage makes of the model's positions."""
        if model.position == "rope":
            found = [("rope", message) for message in self.rope.problems(model.head)] if self.rope is not None else []
        elif self.rope is not None:
            found = [("rope", f'is for rotary positions, the model\'s are "{model.position}" ({_WAY_OUT[model.position]})')]
        else:
            found = []
        if self.position_factor != 1.0 and model.position not in ("learned", "sinusoidal"):
            way = "use rope" if model.position == "rope" else "drop it"
            message = f'is for learned and sinusoidal positions, the model\'s are "{model.position}" ({way})'
            found.append(("position_factor", message))
        elif model.position_rows and self.context > model.position_rows * self.position_factor:
            least = math.ceil(100 * self.context / model.position_rows) / 100
            message = f"{self.context} is more than the model's {model.position_rows} learned positions reach"
            found.append(("context", f"{message} (set the stage's position_factor to {least:g}, or [model] max_positions)"))
        return found


def _elsewhere(key: str, objective: str) -> str:
    names = [f'"{spec.name}"' for spec in built_in() if key in spec.rollout]
    return f'is for objective {" or ".join(names)}, this stage\'s is "{objective}" (drop it)'
