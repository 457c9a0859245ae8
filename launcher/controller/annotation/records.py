"""What is kept of preferences: pairs as they were drawn, decisions, and what took decisions back; each a line of JSON."""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable
from typing import Literal

import msgspec
import xxhash

from midwatch.protocol import Choice, ProbeTurn

NAME = re.compile(r"(?!pairs$|pairs-drawn$)[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")
"""Of an annotator: it names a file. Two files beside it have other uses."""


class PromptMessage(msgspec.Struct, frozen=True):
    """A message of a prompt, as shards read it."""

    role: Literal["system", "user", "assistant"]
    content: str


Prompt = tuple[PromptMessage, ...]


class CandidateResponse(msgspec.Struct, frozen=True, kw_only=True):
    """One of the two."""

    text: str
    checkpoint: str
    seed: int
    tokens: int = 0
    finish: str = "stop"
    score: float | None = None
    """The reward model's; None where there was none."""


class Pair(msgspec.Struct, frozen=True, kw_only=True, tag="pair"):
    """Two answers to a prompt, as they were drawn; every annotator who gets the pair gets these very answers."""

    id: str
    time: str
    prompt: Prompt
    first: CandidateResponse
    second: CandidateResponse
    temperature: float
    limit: int

    @property
    def checkpoints(self) -> tuple[str, str]:
        return self.first.checkpoint, self.second.checkpoint

    def swapped(self, annotator: str) -> bool:
        """Whether the second answer is shown to the annotator on the left: a coin that falls the same way each time."""
        return bool(xxhash.xxh3_64_intdigest(f"{self.id}/{annotator}".encode()) & 1)


class Decision(msgspec.Struct, frozen=True, kw_only=True, tag="decision"):
    """What an annotator chose, with all that is needed to learn from it."""

    id: str
    """Made up by the annotator's screen: the same decision sent twice is made once."""
    time: str
    """UTC, ISO 8601."""
    annotator: str
    author: str
    """The system's name of the user whose screen it was."""
    pair: str
    prompt: Prompt
    left: CandidateResponse
    right: CandidateResponse
    swapped: bool
    """The pair's second answer was on the left."""
    choice: Choice
    seconds: float
    """From the pair's showing to the key."""
    shared: bool = False
    """Every annotator is to get it."""

    @property
    def chosen(self) -> tuple[CandidateResponse, CandidateResponse] | None:
        """The better and the worse answer; None where neither is."""
        if self.choice == "left":
            return self.left, self.right
        return (self.right, self.left) if self.choice == "right" else None

    @property
    def label(self) -> str:
        """The choice by the pair's own order, which is the same for all annotators; empty for a skip."""
        if self.choice == "skip":
            return ""
        if self.choice in ("tie", "both-bad"):
            return "neither"
        return "second" if (self.choice == "left") == self.swapped else "first"


class Undo(msgspec.Struct, frozen=True, kw_only=True, tag="undo"):
    """Takes a decision back; nothing is ever rewritten."""

    id: str
    time: str
    annotator: str
    decision: str


Record = Pair | Decision | Undo


def key_of(prompt: Prompt) -> str:
    """A prompt's name, everywhere the same; hex."""
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(prompt))


def standing(records: Iterable[Record]) -> list[Decision]:
    """The decisions that were not taken back, in order."""
    made: dict[str, Decision] = {}
    for record in records:
        if isinstance(record, Decision):
            made.setdefault(record.id, record)
        elif isinstance(record, Undo):
            made.pop(record.decision, None)
    return list(made.values())


def utc(moment: float) -> str:
    """A time as it is written down, to the millisecond."""
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def turns(prompt: Iterable[ProbeTurn]) -> Prompt:
    return tuple(PromptMessage(turn.role, turn.text) for turn in prompt)
