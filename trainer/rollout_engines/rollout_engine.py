"""What an engine that writes the policy's responses does. All methods are called by all ranks alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from trainer.generate import Request, Response, Usage

Peek = Callable[[], bool]
"""Whether an order waits, so that writing is to be left off."""
Score = Callable[[Sequence[tuple[int, ...]]], Tensor]
"""The policy's log-probabilities of prompts' tokens but each one's first, at temperature 1, one after the other: [tokens]."""


class RolloutEngine(Protocol):
    """One on each rank, or the rank's share of a server's time."""

    usage: list[Usage]
    """Of this rank's engine, at each round of the newest call."""

    @property
    def serves_from(self) -> str | None:
        """The directory with the weights that a server is started from; None where the engine is on the ranks."""

    def refresh(self, version: int) -> None:
        """Takes the policy's weights of now. A version that is there already is not copied again."""

    def hand_over(self, prompts: Sequence[tuple[int, ...]], score: Score, peek: Peek) -> bool:
        """Sees to it that responses come from the weights of now, asked these prompts; false if `peek` said to leave off."""

    def respond(self, requests: Sequence[Request], peek: Peek) -> list[Response] | None:
        """Answers to all of them, in their order, on every rank; None if `peek` said to leave off."""

    def forget(self) -> None:
        """The weights that it has are not known any more: it gets the policy's again before it is next asked."""
