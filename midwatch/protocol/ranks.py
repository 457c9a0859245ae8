"""Rank 0 and the controller: the start of a generation, what rank 0 reports, and what it is sent."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from midwatch.protocol.base import LenientMessage, StrictMessage

# The start of a generation: put into its store by the agent, read by every rank.


class Lineage(msgspec.Struct, frozen=True, kw_only=True):
    """A line of steps none of which was taken twice."""

    id: int
    parent: int | None = None
    fork: str | None = None
    """Checkpoint from which it goes on; None: from the beginning."""
    fork_step: int = 0
    cause: Literal["start", "rollback", "crash"] = "start"
    skip: int = 0
    """Steps of data passed over right after the fork."""
    lr_scale: float = 1.0
    """Factor on the learning rate from the fork on."""
    author: str = ""
    time: float = 0.0


class Replay(msgspec.Struct, frozen=True, kw_only=True):
    """A `set` of an earlier generation that is applied again at its step."""

    step: int
    key: str
    value: float


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """What a generation of ranks starts from."""

    generation: int
    term: int
    lineage: Lineage
    checkpoint: str | None = None
    """Committed checkpoint to load; None: initialise."""
    skip: int = 0
    """Steps of data to pass over after loading: the lineage's, where `checkpoint` is its fork."""
    lr_scale: float = 1.0
    """Factor on the learning rate to apply after loading, likewise."""
    applied: int = 0
    """Number of the last command that earlier generations applied."""
    replays: tuple[Replay, ...] = ()
    paused: bool = False
    """Hold at the first boundary."""


# Rank 0 to the controller. Each travels in a Numbered frame and is kept until acknowledged.


class RankHello(StrictMessage, frozen=True):
    version: int
    run: str
    generation: int
    term: int
    pid: int
    world: int
    channel: Literal["control", "telemetry"] = "control"
    """Control and telemetry travel apart and are numbered apart."""


class Metrics(LenientMessage, frozen=True):
    """One step's metrics. Droppable when the spool is full."""

    lineage: int
    step: int
    tokens: int
    """Tokens trained on in the whole run, up to and with this step."""
    time: float
    values: dict[str, float]


class Phase(LenientMessage, frozen=True):
    """What the ranks are at, sent when it changes."""

    phase: Literal["loading", "training", "evaluating", "sampling", "generating", "scoring", "saving", "paused", "ending"]
    step: int
    stage: str
    stage_step: int
    lineage: int
    settings: dict[str, float] = {}
    """Live settings in force."""
    position: int = 0
    """Samples of the stage's order that were read or passed over."""


class StageBorder(LenientMessage, frozen=True):
    """A stage begins or ends."""

    stage: str
    event: Literal["begin", "end"]
    step: int
    stage_step: int
    lineage: int
    product: str | None = None
    """Checkpoint that ends the stage."""


class Outcome(LenientMessage, frozen=True):
    """What came of a command, the same on all ranks."""

    number: int
    ok: bool
    step: int
    detail: dict[str, Any] = {}
    reason: str = ""


class CheckpointReady(LenientMessage, frozen=True):
    """All ranks have written their part into `directory` below checkpoints/; the controller may commit it."""

    id: str
    directory: str
    digest: str
    """Hash of its manifest file."""
    step: int
    lineage: int
    stage: str
    stage_step: int
    ended: bool
    """It ends its stage."""
    generation: int
    bytes: int
    suspect: bool
    """Its step's metrics were not finite."""
    seconds: float
    """From the boundary until everything was written."""
    stall_seconds: float
    """Of those, the ones in which training stood still."""
    numbers: tuple[int, ...] = ()
    """Commands that this checkpoint answers."""
    loss: float | None = None
    settings: dict[str, float] = {}
    """Live settings that it holds: a rollback to it puts them in force."""


class CheckpointFailed(LenientMessage, frozen=True):
    id: str
    step: int
    reason: str
    numbers: tuple[int, ...] = ()


class Sampled(LenientMessage, frozen=True):
    """Text that the model wrote. One of a rollout, which has a reward, is droppable when the spool is full."""

    stage: str
    step: int
    lineage: int
    prompt: str
    text: str
    reward: float | None = None
    """Its score, where it has one."""
    kl: float | None = None
    """Log-ratio to the reference, summed over its tokens, in nats."""
    tokens: int | None = None


class Note(LenientMessage, frozen=True):
    """Something an operator should see: a warning or an alarm."""

    level: Literal["info", "warning", "alarm"]
    text: str
    step: int


class Ended(LenientMessage, frozen=True):
    """The ranks leave by themselves."""

    cause: Literal["finished", "stopped", "stopped-now", "released", "regrouped"]
    step: int
    checkpoint: str | None = None


class Dropped(LenientMessage, frozen=True):
    """Telemetry that the spool had no room for."""

    count: int


RankBody = Metrics | Phase | StageBorder | Outcome | CheckpointReady | CheckpointFailed | Sampled | Note | Ended | Dropped


class Numbered(LenientMessage, frozen=True):
    """A message that is sent again until acknowledged; `number` counts from 1 within a source."""

    number: int
    body: RankBody


# The controller to rank 0.


class RankWelcome(StrictMessage, frozen=True):
    term: int
    acknowledged: int
    """Highest number of this source that is stored."""
    hold: bool = False
    """As `Hold`."""


class Hold(StrictMessage, frozen=True):
    """The ranks wait at the next boundary for as long as it is on: the controller cannot journal what they do."""

    on: bool


class Ack(StrictMessage, frozen=True):
    number: int


class Order(StrictMessage, frozen=True):
    """A command for all ranks, at one boundary.

    Arguments by op. ROLLBACK: checkpoint (id), lineage (`Lineage` as builtins), skip, lr_scale. ADVANCE: to (stage name, or
    none for the next). SET: key, value. The others have none.
    """

    number: int
    op: int
    arguments: dict[str, Any] = {}


class Committed(StrictMessage, frozen=True):
    """The checkpoint is committed under its id."""

    id: str


class CommitRefused(StrictMessage, frozen=True):
    id: str
    reason: str
