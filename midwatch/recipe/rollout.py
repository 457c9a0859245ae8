"""A stage's `policy`: how responses are drawn, what they are worth, and how far an update may go."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from midwatch.recipe.bounds import MOST_COUNT, MOST_TOKENS, bounded

LEAST_TEMPERATURE, MOST_TEMPERATURE = 0.01, 100
"""vLLM draws at 0.01 what is asked for at less; the log-probabilities would be of another temperature."""


class Rollout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a stage whose model learns from its own responses. Coefficients are of the papers that docs/post-training.md names."""

    prompts: int | None = None
    """Of one rollout; as many as make one update's responses, where it is left out."""
    num_generations: int = 1
    """To each prompt; GRPO holds those to one prompt against each other and needs at least 2."""
    max_new_tokens: int = 128
    """Of a response at the most."""
    temperature: float = 1.0
    """At which responses are drawn, and their log-probabilities taken."""
    epochs: int = 1
    """Times that an update sees each response of a rollout."""
    reward: str | None = None
    """Stage whose product scores the responses; the newest reward stage before this one, where it is left out."""
    function: str | None = None
    """`FILE.py:NAME` instead: of lists of prompts and responses, a list of numbers."""
    missing_eos_penalty: float = 0.0
    """Taken from the score of a response that did not come to its end."""
    normalise: bool = False
    """Scores are divided by their running standard deviation."""
    kl_coef: float = 0.1
    """Coefficient of the distance from the reference: on the KL of each token, which sums over the response."""
    kl_target: float | None = None
    """Summed KL of a response that the coefficient is steered to; left out, the coefficient stays."""
    kl_horizon: float = 10_000.0
    """Responses over which it is steered."""
    ratio_clip: float = 0.2
    value_clip: float | None = None
    """PPO: how far an update may move a value from what it was when the rollout was drawn, in the scores' own units. Not limited
    where it is left out. The usual 0.2 is for returns that are normalised; where a reward model's scores lie far from the first
    values, it holds up what the value model has to make up for. Andrychowicz et al. 2021 found no threshold that helps."""
    value_lr: float | None = None
    """Peak learning rate of the value model; the stage's, where it is left out."""
    gamma: float = 1.0
    gae_lambda: float = 0.95
    whiten: bool = True
    """Advantages are brought to mean 0 and variance 1 over a rollout."""
    advantage: Literal["group", "leave-one-out"] = "group"
    """GRPO: against the mean and deviation of the prompt's responses, or against the mean of the others (RLOO)."""
    normalisation: Literal["token", "sequence"] = "token"
    """GRPO: every token of an update weighs the same, or every response does, each of its tokens by 1 / the response's length."""
    mismatch: float = 0.05
    """Nats. Mean difference of the engine's and the trainer's log-probabilities of a token, above which there is an alarm.

    A rollout that a server drew is not learned from then.
    """

    def of_one_objective(self) -> list[tuple[str, str]]:
        """Keys that are set and that only one objective reads, with that objective."""
        keys = dict.fromkeys(("kl_target", "kl_horizon", "value_clip", "value_lr", "gamma", "gae_lambda", "whiten"), "ppo")
        keys |= dict.fromkeys(("advantage", "normalisation"), "grpo")
        usual = Rollout()
        return [(key, objective) for key, objective in keys.items() if getattr(self, key) != getattr(usual, key)]

    def problems(self) -> list[tuple[str, str]]:
        """(key, what is wrong and the way out)."""
        found = bounded(self, 1, MOST_COUNT, ("prompts", "num_generations", "epochs"))
        found += bounded(self, 1, MOST_TOKENS, ("max_new_tokens",))
        if not LEAST_TEMPERATURE <= self.temperature <= MOST_TEMPERATURE:
            found.append(("temperature", f"must lie between {LEAST_TEMPERATURE} and {MOST_TEMPERATURE}"))
        for key in ("kl_target", "kl_horizon", "ratio_clip", "value_clip", "value_lr", "mismatch"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                found.append((key, "must be greater than 0 and finite"))
        for key in ("kl_coef", "missing_eos_penalty"):
            if not 0 <= getattr(self, key) < math.inf:
                found.append((key, "must not be negative, and finite"))
        for key in ("gamma", "gae_lambda"):
            if not 0 <= getattr(self, key) <= 1:
                found.append((key, "must lie between 0 and 1"))
        if self.function is not None and self.reward is not None:
            found.append(("function", "scores instead of a reward stage; leave one of them out"))
        if self.function is not None and not self.function.partition(".py:")[2].isidentifier():
            found.append(("function", f'{self.function!r} is not of the form "FILE.py:NAME"'))
        return found
