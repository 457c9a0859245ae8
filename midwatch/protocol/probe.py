"""Conversations with a checkpoint."""

from __future__ import annotations

from typing import Literal

import msgspec

from midwatch.protocol.base import StrictMessage

# The probe: a client asks, the controller passes it on to a process that has the weights, and what that answers back.


class ProbeTurn(msgspec.Struct, frozen=True, array_like=True):
    """What was said before in a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str


class ProbeAsk(StrictMessage, frozen=True):
    """A prompt for one checkpoint, or for two side by side."""

    ask: int
    """The asker's number: what is answered carries it."""
    checkpoints: tuple[str, ...]
    """Ids, steps, `newest` or `golden`."""
    prompt: str
    turns: tuple[tuple[ProbeTurn, ...], ...] = ()
    """For each checkpoint the conversation so far, which a text has none of."""
    form: Literal["auto", "chat", "text"] = "auto"
    """`chat`: by the chat template; `text`: continued as it is, after BOS; `auto`: text of a pretraining checkpoint, else chat."""
    limit: int = 256
    """Tokens of the answer at the most."""
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_strings: tuple[str, ...] = ()
    alternatives: int = 10
    """Likeliest tokens told beside each one."""


class ProbeStop(StrictMessage, frozen=True):
    """Ends the answers to an ask where they are; nothing if they have ended."""

    ask: int


class ProbeBegan(StrictMessage, frozen=True):
    """The checkpoint is loaded and answers."""

    ask: int
    which: int
    """Place of the checkpoint in the ask."""
    checkpoint: str
    """Its id."""
    stage: str
    form: Literal["chat", "text"]
    prompt_tokens: int


class ProbeToken(StrictMessage, frozen=True):
    ask: int
    which: int
    text: str
    """What it adds to the answer: empty where it ends within a character, which comes with the token that completes it."""
    piece: str
    """The token by itself."""
    log_prob: float
    """At the ask's temperature (at 1 where that is 0), before top_p and top_k; in nats."""
    alternatives: tuple[tuple[str, float], ...] = ()
    """Likeliest tokens and their probabilities, the likeliest first; at temperature 1."""


class ProbeEnd(StrictMessage, frozen=True):
    """There is one for each checkpoint of an ask, whatever happens."""

    ask: int
    which: int
    checkpoint: str
    finish: Literal["stop", "length", "aborted", "failed"]
    text: str = ""
    """The rest of the answer: a character that was never completed."""
    tokens: int = 0
    seconds: float = 0.0
    """Since it began."""
    score: float | None = None
    """The reward model's, of the whole answer; None: there is none."""
    problem: str = ""
    """Why it failed, and the way out."""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


ProbeAnswer = ProbeBegan | ProbeToken | ProbeEnd
