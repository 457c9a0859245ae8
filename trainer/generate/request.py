"""What the engine is asked for, what it answers, and a request on its way between the two."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Finish = Literal["stop", "length", "aborted"]


class RequestError(ValueError):
    """The request cannot be served; the message says why and the way out."""


@dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    prompt: tuple[int, ...]
    limit: int
    """Tokens of the response at the most."""
    temperature: float = 1.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Only the likeliest tokens that together have this probability: Holtzman et al. 2020, section 3.1."""
    top_k: int = 0
    """Only that many of the likeliest; 0: all."""
    seed: int = 0
    """With the token's number it decides what is drawn, whoever shares the batch."""
    stops: frozenset[int] = frozenset()
    """Ids that end the response; the one that does is part of it."""
    stop_strings: tuple[str, ...] = ()
    """Texts that end the response once it contains one; needs an engine that can decode."""
    alternatives: int = 0
    """Likeliest ids told beside each token."""

    def problem(self, context: int, vocabulary: int) -> str | None:
        """Why this cannot be served at all."""
        if not self.prompt:
            return "the prompt is empty (begin it with BOS)"
        if len(self.prompt) >= context:
            return f"the prompt has {len(self.prompt)} tokens and the context {context} (shorten it to {context - 1} or less)"
        if not all(0 <= id < vocabulary for id in self.prompt):
            return f"the prompt has an id outside the vocabulary of {vocabulary}"
        if self.limit < 1:
            return f"limit is {self.limit} (use at least 1)"
        if not 0 <= self.temperature <= 100:
            return f"temperature is {self.temperature} (use 0 to 100)"
        if not 0 < self.top_p <= 1:
            return f"top_p is {self.top_p} (use more than 0, up to 1)"
        if self.top_k < 0 or self.alternatives < 0:
            return "top_k and alternatives must not be negative"
        return None


@dataclass(frozen=True)
class Event:
    """One more token of a response, and how it ended where it did."""

    id: int
    """Of the request."""
    token: int
    log_prob: float
    """Of the token, at the request's temperature (at 1 where that is 0), before top_p and top_k cut the tail off; in nats."""
    finish: Finish | None
    alternatives: tuple[tuple[int, float], ...] = ()
    """Likeliest ids and their log-probabilities, the likeliest first; at temperature 1."""


@dataclass(frozen=True)
class Response:
    tokens: list[int]
    log_probs: list[float]
    finish: Finish
    version: int
    """Of the weights that its last token was drawn with."""
    first_version: int
    """Of those that its first token was drawn with."""


@dataclass
class Sequence:
    """A request on its way."""

    id: int
    request: Request
    tokens: list[int]
    """The prompt and what has been drawn so far."""
    limit: int
    """Tokens of the response at the most, within the context."""
    log_probs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    cached: int = 0
    """Tokens whose keys and values are in its pages."""
    keyed: int = 0
    """Pages that others may find, from the first on."""
    key: bytes = b""
    """Of the last of these."""
    finish: Finish | None = None
    first_version: int = -1

    @property
    def drawn(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def response(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]


@dataclass(frozen=True)
class TokenChunk:
    """Tokens [start, stop) of a sequence that pass through the model in one step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def draws(self) -> bool:
        """Whether the sequence's next token follows from it."""
        return self.stop == len(self.sequence.tokens)
