"""What the screen shows of a run, pushed to every client."""

from __future__ import annotations

from typing import Literal

import msgspec

from midwatch.protocol.agents import NodeStats
from midwatch.protocol.base import LenientMessage, State
from midwatch.protocol.commands import CommandView
from midwatch.protocol.queries import JournalLine
from midwatch.protocol.ranks import Lineage


class StageView(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    objective: str
    """`data` for the building of tokenizer and shards."""
    state: Literal["waiting", "running", "done", "cut short", "failed"]
    step: int
    steps: int
    """Of optimizer updates; of percent for the data."""
    context: int = 0
    global_batch: int = 0
    mixture: dict[str, float] = {}
    lr: float = 0.0
    seconds: float = 0.0
    """Spent in it so far."""
    seconds_left: float | None = None
    tokens: int = 0
    product: str | None = None
    origin: str | None = None
    """Checkpoint it began from; of the first stage the `hf:DIR` of the model."""
    note: str = ""
    """What is being done, for the data."""
    losses: dict[str, tuple[float, float]] = {}
    """Held-out loss of each source at the stage's beginning and at its latest evaluation."""
    updates: int = 0
    """Of each rollout; 0: it draws none."""
    kl_target: float | None = None
    """Summed KL of a response that the coefficient is steered to."""


class CheckpointView(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    step: int
    lineage: int
    stage: str
    stage_step: int
    ended: bool
    time: float
    bytes: int
    golden: bool = False
    suspect: bool = False
    on_line: bool = True
    """On the line in force: not undone by a rollback since."""
    loss: float | None = None
    missing: bool = False
    """Its directory is out of sight; it is used again when it comes back."""
    doubt: str = ""
    """Why an operator should not trust it: an alarm before its step, damage, or metrics that nobody knows."""
    settings: dict[str, float] = {}
    """Live settings that it holds; empty: not known."""


class Alarm(msgspec.Struct, frozen=True, kw_only=True):
    """An alarm and its repeats, until somebody acknowledges it."""

    key: str
    """What `acknowledge` names it by."""
    text: str
    """Of the newest repeat."""
    rule: str = ""
    """Watch rule that raised it; empty: none did."""
    value: float | None = None
    """Of the rule's metric, at the newest repeat."""
    threshold: str = ""
    """What the rule compares it with, as `above 4`."""
    step: int | None = None
    """Of the first one on the line in force; None: it concerns no step."""
    lineage: int = 0
    time: float
    """Of the first one, likewise."""
    last_step: int | None = None
    last_time: float
    count: int = 1
    acknowledged: bool = False
    acknowledged_by: str = ""


class Straggler(msgspec.Struct, frozen=True, array_like=True):
    """A rank that has been slower than the others for some time."""

    rank: int
    node: str
    own: float
    """Seconds of its own a step."""
    median: float
    """Of all ranks."""
    since: float


class NodeView(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    name: str
    state: Literal["up", "out of reach", "gone", "starting", "spare", "drained", "quarantined"]
    ranks: int
    """Its ranks in the living generation."""
    stats: NodeStats | None = None
    first_rank: int = 0
    failures: int = 0
    """Counted against it since it was last added."""
    note: str = ""
    """Why it is not in use, where that needs saying."""


class Snapshot(LenientMessage, frozen=True, kw_only=True):
    """All that a screen shows but series, logs and the journal's past."""

    run: str
    directory: str
    state: State
    reason: str = ""
    """Why it is in that state, where that needs saying."""
    phase: str = ""
    time: float
    started: float
    term: int
    generation: int
    lineage: int
    world: int = 0
    step: int
    """Last step reported."""
    total_steps: int
    tokens: int = 0
    stage: str = ""
    seconds_left: float | None = None
    stages: tuple[StageView, ...] = ()
    lineages: tuple[Lineage, ...] = ()
    checkpoints: tuple[CheckpointView, ...] = ()
    commands: tuple[CommandView, ...] = ()
    """Those not yet ended and the last few that have."""
    nodes: tuple[NodeView, ...] = ()
    latest: dict[str, float] = {}
    """Newest value of each metric."""
    settings: dict[str, float] = {}
    """Live settings in force."""
    settings_asked: dict[str, float] = {}
    """Those asked for since and not in force, after a rollback."""
    events: tuple[JournalLine, ...] = ()
    """Newest entries of the journal."""
    changes: tuple[str, ...] = ()
    """What changed in the environment since the last start."""
    dropped: int = 0
    refused_peers: int = 0
    """Connections that were turned away in this term: of strangers, or of peers that made no sense."""
    stragglers: tuple[Straggler, ...] = ()
    samples: int = 0
    """There have been so many: another number means that there are new ones."""
    phase_since: float = 0.0
    """When the ranks went over to their phase."""
    faults: tuple[str, ...] = ()
    """What stands in the controller's own way until it is put right: a journal that cannot be written, storage that is away."""
    archived: bool = False
    """No controller is running: this is what the run's files say."""
    undone: str = ""
    """The checkpoint that `rollback undone` goes back to; empty: there is none."""
    left_at: dict[int, int] = {}
    """Last step of each lineage that is not in force."""
    heard: float = 0.0
    """When the ranks last reported anything; 0: not yet in this term."""
    step_seconds: float | None = None
    """Of a usual step."""
    alarms: tuple[Alarm, ...] = ()
    """Those that nobody has acknowledged, the newest first."""
