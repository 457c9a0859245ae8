"""What the screen shows: one frozen scene, made anew whenever a snapshot comes, the link changes or a second passes."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from midwatch.protocol import CheckpointView, Snapshot, StageView

SILENT_SECONDS = 3.0
"""Shortest silence that is said."""


class ConnectionState(NamedTuple):
    """The way to the controller."""

    up: bool = False
    since: float | None = None  # when it was lost; None before the first connection


@dataclass(frozen=True)
class Scene:
    run: str
    now: float
    link: ConnectionState = field(default_factory=ConnectionState)
    snapshot: Snapshot | None = None
    received: float = 0.0  # when the snapshot came, on the operator's clock
    read_only: bool = False
    interval: float = 0.0  # seconds between two snapshots, smoothed

    @property
    def skew(self) -> float:
        """The operator's clock minus the controller's, as of the newest snapshot."""
        return self.received - self.snapshot.time if self.snapshot is not None else 0.0


class Silence(NamedTuple):
    """Nothing new has come for longer than it should."""

    of: Literal["link", "controller", "ranks"]
    seconds: float

    @property
    def words(self) -> str:
        return {
            "link": "the connection is lost",
            "controller": "controller does not answer",
            "ranks": "ranks report nothing (the controller answers)",
        }[self.of]


def silence(scene: Scene) -> Silence | None:
    """Who has said nothing for three of the usual intervals, and at least SILENT_SECONDS; None: what is shown is current."""
    snapshot = scene.snapshot
    if snapshot is None or snapshot.archived or snapshot.state in ("finished", "failed"):
        return None
    old = scene.now - scene.received
    if old > max(SILENT_SECONDS, 3 * scene.interval):
        return Silence("controller" if scene.link.up else "link", old)
    if snapshot.state == "training" and snapshot.phase == "training" and snapshot.heard:
        quiet = scene.now - scene.skew - snapshot.heard
        if quiet > max(SILENT_SECONDS, 3 * (snapshot.step_seconds or 0.0)):
            return Silence("ranks", quiet)
    return None


class StageSpan(NamedTuple):
    """A stage on the line in force: the run's steps at which it begins and ends. Its first update makes step `start + 1`."""

    stage: StageView
    start: int
    stop: int


def stage_spans(snapshot: Snapshot) -> list[StageSpan]:
    """The training stages that have begun, or will, where they lie among the run's steps."""
    spans: list[StageSpan] = []
    at = 0
    for stage in snapshot.stages:
        if stage.objective != "data":
            taken = stage.step if stage.state in ("done", "cut short") else stage.steps
            spans.append(StageSpan(stage, at, at + taken))
            at += taken
    return spans


def running_span(snapshot: Snapshot) -> StageSpan | None:
    """The stage that trains, or the last that did."""
    spans = stage_spans(snapshot)
    begun = [span for span in spans if span.stage.state != "waiting"]
    return next((span for span in spans if span.stage.state == "running"), begun[-1] if begun else None)


def speaks_against(checkpoint: CheckpointView) -> str:
    """Why one should not go back to a checkpoint, in an operator's words; empty where nothing is known against it."""
    if checkpoint.missing:
        return "its directory is missing; it is used again when it is back"
    if checkpoint.suspect and not checkpoint.doubt:
        return "its step's metrics were not finite"
    return checkpoint.doubt


def checkpoint_flags(checkpoint: CheckpointView) -> list[str]:
    """What marks a checkpoint in a list, in a word each."""
    doubtful = bool(checkpoint.doubt) and not checkpoint.suspect
    marks = (
        ("golden", checkpoint.golden),
        ("MISSING", checkpoint.missing),
        ("SUSPECT", checkpoint.suspect),
        ("doubtful", doubtful),
        ("end of stage", checkpoint.ended),
        ("rolled back", not checkpoint.on_line),
    )
    return [word for word, is_so in marks if is_so]


def newest_checkpoint(snapshot: Snapshot) -> CheckpointView | None:
    """On the line in force."""
    on_line = [checkpoint for checkpoint in snapshot.checkpoints if checkpoint.on_line]
    return max(on_line, key=lambda checkpoint: (checkpoint.step, checkpoint.time), default=None)


def on_line(snapshot: Snapshot, lineage: int, step: int | None) -> bool:
    """Whether a step of a lineage lies on the line in force; nothing that concerns no step does."""
    lines = {line.id: line for line in snapshot.lineages}
    current, last = lines.get(snapshot.lineage), snapshot.step
    while current is not None and step is not None:
        if current.id == lineage:
            return step <= last
        last = min(last, current.fork_step)
        current = lines.get(current.parent) if current.parent is not None else None
    return False
