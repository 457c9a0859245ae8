"""Whether a server that was told to load new weights answers with them, by the log-probabilities of tokens that both sides score.

A server says that it loaded a directory, and may have loaded a part of it. What it then draws is not the policy's, and a run that
learns from it drifts with no other sign. Both sides score the same prompts before anything is drawn:

    absolute    the mean difference must not exceed a limit, which rounding sets: servers compute in bfloat16
    relative    what the server's log-probabilities moved by since the last reload must be what the trainer's moved by. The
                difference that rounding makes is about the same before and after, so this finds an old layer far below the limit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEAST = 1e-5
"""Nats. Differences of float32 log-probabilities below this mean nothing."""
_SURE = 10.0
"""Times its error that a movement must be before the relative test judges it. A smaller one adds to the next reload's."""
_TOLERANCE = 0.3
"""Share of the trainer's movement that the server's may differ from it."""


class ReloadCheck:
    def __init__(self, limit: float) -> None:
        """limit: nats, the mean absolute difference of trainer and server at the most."""
        self._limit = limit
        self._base: tuple[Tensor, Tensor] | None = None
        """The trainer's and the server's log-probabilities that movements are measured from."""
        self._rounding = 0.0
        """Root mean square of their difference after the first reload. Later ones must not come to differ by much more: a part that
        stays behind at every reload would be within the tolerance each time, and add up."""

    def problem(self, trainer: Tensor, server: Tensor) -> str | None:
        """What is wrong after a reload, as the rest of "the server ..."; both [tokens], of the same tokens at every call."""
        trainer, server = trainer.double(), server.double()
        apart = float((server - trainer).abs().mean())
        if not apart <= self._limit:
            return f"differs from the policy by {apart:.3g} nats a token (more than rollout.mismatch {self._limit:g})"
        if self._base is None:
            self._base, self._rounding = (trainer, server), max(_root_mean_square(server - trainer), LEAST)
            return None
        gap = _root_mean_square(server - trainer)
        if gap > _SURE * self._rounding:
            return f"differs from the policy by {gap:.3g} nats a token, where it was {self._rounding:.3g} at first"
        moved, followed = trainer - self._base[0], server - self._base[1]
        noise = math.sqrt(2) * self._rounding
        signal = _root_mean_square(moved)
        if signal < _SURE * noise / math.sqrt(len(moved)):
            return None
        share = float((followed * moved).sum() / moved.square().sum())
        rest = _root_mean_square(followed - moved)
        if abs(share - 1) > _TOLERANCE or rest > max(_TOLERANCE * signal, _SURE * noise):
            return (
                f"moved by {share:.0%} of what the policy moved by since its last weights, with {rest:.3g} nats a token elsewhere"
            )
        self._base = trainer, server
        return None


def _root_mean_square(values: Tensor) -> float:
    return float(torch.sqrt(values.square().mean()))
