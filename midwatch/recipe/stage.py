"""`[[stage]]`: one part of the pipeline, an objective with a length, a data mixture and an optimizer schedule."""

from __future__ import annotations

import math
import re
from typing import Literal

import msgspec

from midwatch.recipe import mixture as mixtures
from midwatch.recipe.bounds import MOST_COUNT, MOST_STEPS, MOST_TOKENS, bounded
from midwatch.recipe.mixture import Anneal
from midwatch.recipe.model import Model, Rope
from midwatch.recipe.rollout import Rollout
from shards.common.decoding import LARGEST
from shards.sampling.mixing import Mixing, MixtureBy

ObjectiveKind = Literal["text", "sft", "preference", "scored", "prompt"]

OBJECTIVE_DATA = {
    "pretrain": ("text",),
    "sft": ("sft",),
    "reward": ("preference",),
    "dpo": ("preference",),
    "ppo": ("sft", "preference"),
    "grpo": ("sft", "preference"),
    "rejection_sampling": ("sft", "preference"),
    "constitutional": ("sft", "preference"),
}
"""The kinds of source each objective reads."""
PARTS = {
    "rejection_sampling": {"best": "sft", "pairs": "preference"},
    "constitutional": {"revisions": "sft", "pairs": "preference", "judged": "preference"},
}
"""What the objectives make that make data, and of which kind each is."""

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
    objective: Literal["pretrain", "sft", "reward", "dpo", "ppo", "grpo", "rejection_sampling", "constitutional"]
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
    """PPO and GRPO: how responses are drawn and learned from. The objectives that make data: how they are drawn."""
    principles: tuple[str, ...] = ()
    """Objective `constitutional`: the principles that responses are revised by, one at a time."""
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
    beta: float = 0.1
    """DPO: strength of the tie to the reference."""
    label_smoothing: float = 0.0
    """DPO: part of the preference pairs assumed to be labelled wrongly."""
    dpo_loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """DPO's own loss, or IPO's: the squared distance of the log-ratios' difference from 1 / (2 beta)."""
    length_normalised: bool = False
    """DPO: a response's log-probability is its tokens' mean, not their sum."""
    reference_cached: bool = False
    """DPO: the reference's log-probabilities of all pairs are worked out before the first step and kept in files; it then leaves
    memory, and the policy's distance from it on fresh responses is not reported."""
    reference_free: bool = False
    """DPO: without a reference, as if one gave all responses the same probability."""
    margin: float = 0.0
    """Reward model: by how much the chosen response is to score higher than the rejected one."""
    center_rewards: float = 0.0
    """Reward model: weight of the squared sum of a pair's scores, which keeps them about 0."""
    prompts: tuple[str, ...] = ()
    """Prompts whose continuations are shown at the end of the stage."""
    sample_tokens: int = 64
    """Tokens of each such continuation at the most."""

    @property
    def resolved_warmup_steps(self) -> int:
        if self.warmup_steps is not None:
            return self.warmup_steps
        return min(2000, max(1, self.steps // 100))

    @property
    def documents_masked(self) -> bool:
        return self.objective != "pretrain" if self.masked_documents is None else self.masked_documents

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
        kinds: dict[str, ObjectiveKind] = {"pretrain": "text", "sft": "sft", "reward": "scored", "dpo": "preference"}
        return kinds.get(self.objective, "prompt")

    @property
    def data_kinds(self) -> tuple[str, ...]:
        """The kinds of source that this stage's objective reads."""
        return OBJECTIVE_DATA[self.objective]

    @property
    def scalar(self) -> bool:
        """Whether its product gives texts numbers, and is no language model."""
        return self.objective == "reward"

    @property
    def draws(self) -> bool:
        """Whether it learns from responses that the model draws."""
        return self.objective in ("ppo", "grpo")

    @property
    def makes(self) -> bool:
        """Whether it makes data for later stages, and trains nothing: its steps are batches of prompts."""
        return self.objective in PARTS

    @property
    def pairs(self) -> bool:
        """Whether a sample is two rows: the chosen response and the rejected one."""
        return self.objective in ("reward", "dpo")

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
        return self.draws or (self.objective == "dpo" and not self.reference_free)

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
        for key in ("weight_decay", "beta", "center_rewards"):
            if not 0 <= getattr(self, key) < math.inf:
                found.append((key, "must not be negative, and finite"))
        for key in ("min_lr_ratio", "label_smoothing"):
            if not 0 <= getattr(self, key) <= 1:
                found.append((key, "must lie between 0 and 1"))
        if self.objective != "dpo":
            keys = ("dpo_loss", "length_normalised", "reference_free")
            given = [key for key in keys if getattr(self, key) not in (False, "sigmoid")]
            found += [(key, f'is for objective "dpo", this stage\'s is "{self.objective}" (drop it)') for key in given]
        elif self.dpo_loss == "ipo":
            if self.beta == 0:
                found.append(("beta", 'must be greater than 0 for dpo_loss "ipo", which aims at 1 / (2 beta)'))
            if self.label_smoothing != 0:
                found.append(("label_smoothing", 'is for dpo_loss "sigmoid" (drop it, or use that loss)'))
        if not all(0 <= b < 1 for b in self.betas):
            found.append(("betas", "must each lie between 0 and 1"))
        found += mixtures.problems(self)
        if not 0 < self.position_factor < math.inf:
            found.append(("position_factor", "must be greater than 0 and finite"))
        if self.reference_cached and not (self.objective == "dpo" and self.needs_reference):
            found.append(("reference_cached", "is for dpo with a reference (drop it)"))
        if self.draws or self.makes:
            found += [(f"rollout.{key}", message) for key, message in self.rollout_settings.problems()]
            found += [("rollout", message) for message in self._rollout_problems()]
            for key, objective in self.rollout_settings.of_one_objective():
                if objective != self.objective:
                    found.append(
                        (f"rollout.{key}", f'is for objective "{objective}", this stage\'s is "{self.objective}" (drop it)')
                    )
        elif self.rollout is not None:
            message = f"is for objectives that draw responses, and the objective is {self.objective} (drop it)"
            found.append(("rollout", message))
        if (self.objective == "constitutional") != bool(self.principles):
            way = "give some" if self.objective == "constitutional" else "drop them"
            found.append(("principles", f"are what constitutional revises responses by ({way})"))
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
        if self.objective in ("grpo", "rejection_sampling") and self.rollout_settings.num_generations < 2:
            found.append("responses to one prompt are held against each other (set num_generations to 2 or more)")
        return found

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
