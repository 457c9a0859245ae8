"""The annotation of preference pairs."""

from __future__ import annotations

from typing import Literal

import msgspec

from midwatch.protocol.base import StrictMessage
from midwatch.protocol.probe import ProbeTurn

# Preferences by hand: a screen asks for pairs, the controller draws them with the probe and keeps what was decided.

Choice = Literal["left", "right", "tie", "both-bad", "skip"]
BEGIN_FIRST = "you annotate nothing here (begin first)"
"""Why a decision is refused of a client that the controller does not know as an annotator, as after a takeover."""


class Share(msgspec.Struct, frozen=True):
    """So many of so many, and where the share lies 19 times in 20; of none, nothing is known."""

    hits: int
    count: int
    low: float | None
    high: float | None


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """Between annotators on the pairs that more than one has decided, and of all decisions with the reward model."""

    measure: str
    """Which: Cohen's kappa of two, Krippendorff's alpha of more; empty of fewer."""
    value: float | None
    """1: always, 0: as by chance; None: not to be had."""
    pairs: int
    annotators: int
    alike: Share
    """Pairs on which all said the same."""
    reward: Share
    """Decisions for a side in which the reward model scores that one higher."""
    left: Share
    """Decisions for a side that were for the left one."""
    decisions: dict[str, int]
    """How many stand, by annotator."""


class PreferenceBegin(StrictMessage, frozen=True):
    """Makes the client an annotator, until it leaves; answered by `PreferenceState`, as all of these are."""

    id: int
    annotator: str
    session: str
    """Made up by the screen: after a lost connection the same one takes its place back."""
    checkpoints: tuple[str, ...] = ()
    """One that answers twice, or two that answer once; none: the newest that writes text."""
    source: str = ""
    """Whose prompts; empty: those of the newest stage's mixture."""
    prompts: tuple[tuple[ProbeTurn, ...], ...] = ()
    """Instead of a source's."""
    shared: float = 0.2
    """Share of the prompts that all annotators get, with the same answers."""
    limit: int = 256
    temperature: float = 0.8


class PreferenceNext(StrictMessage, frozen=True):
    """Answered when there is a pair, or something to say instead."""

    id: int


class PreferenceMade(StrictMessage, frozen=True):
    """A decision; answered when it is on disk. Sent again under the same `decision` it is made once."""

    id: int
    decision: str
    pair: str
    choice: Choice
    seconds: float


class PreferenceUndo(StrictMessage, frozen=True):
    """Takes back the annotator's last decision, and shows its pair again. Sent again under the same `undo` it is done once."""

    id: int
    undo: str


class PreferenceLeave(StrictMessage, frozen=True):
    """The annotator has gone; what was drawn stays."""

    id: int


class PreferenceQuery(StrictMessage, frozen=True):
    """How far annotators agree; no annotator is needed for it."""

    id: int


class PreferencePair(msgspec.Struct, frozen=True, kw_only=True):
    """Two answers; neither where they come from nor their scores, which would sway the annotator."""

    pair: str
    prompt: tuple[ProbeTurn, ...]
    left: str
    right: str
    shared: bool = False


class PreferenceState(StrictMessage, frozen=True):
    """Where an annotator stands."""

    id: int
    agreement: Agreement
    annotator: str = ""
    pair: PreferencePair | None = None
    """To decide next."""
    today: int = 0
    """Decisions that stand, since midnight where the controller is."""
    total: int = 0
    seconds: float | None = None
    """Median of the last decisions."""
    left: int = 0
    """Prompts that may follow."""
    note: str = ""
    """Something the annotator should know: a file that was repaired, why no pair comes."""
    over: bool = False
    """Every prompt is decided."""
