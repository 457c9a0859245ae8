"""The entries of the journal: what happened to a run, each a tagged struct, written as a line of JSON."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from midwatch.protocol import Lineage


class JournalEntry(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What every entry has: when it was written, and for whom."""

    time: float
    author: str = ""
    report: int = 0
    """Number of rank 0's message, in its generation, that this entry stores."""


class TermBegan(JournalEntry, frozen=True):
    term: int
    host: str
    pid: int
    accepts: dict[str, int]
    """Bytes of each older file, by name, that count."""
    versions: dict[str, str] = {}
    generation: int = 0
    """Generations, lineages and commands up to these numbers may have existed, though the journal no longer says so."""
    lineage: int = 0
    command: int = 0


class RunBegan(JournalEntry, frozen=True):
    name: str
    recipe: str
    """Hash of the recipe."""
    file: str = ""
    """Hash of what recipe.toml says, defaults left out."""
    stated: dict[str, str] = {}
    """What recipe.toml says, by dotted keys; the values of secrets left out."""
    id: str = ""
    """The run's own; empty in journals of earlier versions."""


class RecipeChanged(JournalEntry, frozen=True):
    """recipe.toml was edited; what starts from now on follows it."""

    file: str
    stated: dict[str, str]
    changes: tuple[str, ...]
    """As `key: old -> new`."""


class RunCopied(JournalEntry, frozen=True):
    """This directory was found to be a copy of another run: what follows is of a run of its own."""

    id: str
    original: str
    """Id of the run that it was copied from."""
    path: str = ""
    """Where that was."""


class StateChanged(JournalEntry, frozen=True):
    state: str
    reason: str = ""


class DataBuilt(JournalEntry, frozen=True):
    directory: str
    seconds: float


class AgentStarted(JournalEntry, frozen=True):
    node: str
    pid: int
    birth: str = ""
    """Tells the process from any other that ever has its number (midwatch.processes); empty in journals of earlier versions."""
    created: float = 0.0
    """When the process began, by the system's clock; only in journals of earlier versions."""


class NodeMarked(JournalEntry, frozen=True):
    """What a node may be used for from now on; its failures are forgotten where it is in use again."""

    node: str
    mark: Literal["in use", "drained", "quarantined"]
    reason: str = ""


class NodeFailed(JournalEntry, frozen=True):
    """A generation ended through this node."""

    node: str
    generation: int
    reason: str


class RanksEnvironment(JournalEntry, frozen=True):
    """What a node's ranks find in their environment, the values of secrets left out."""

    node: str
    generation: int
    environment: dict[str, str]


class GenerationBegan(JournalEntry, frozen=True):
    generation: int
    lineage: int
    checkpoint: str | None
    nodes: tuple[str, ...]
    world: int
    environment: dict[str, str] = {}


class GenerationEnded(JournalEntry, frozen=True):
    generation: int
    cause: str
    step: int


class CommandAccepted(JournalEntry, frozen=True):
    number: int
    id: str
    verb: str
    arguments: dict[str, Any] = {}


class CommandSent(JournalEntry, frozen=True):
    number: int
    generation: int


class CommandEnded(JournalEntry, frozen=True):
    number: int
    state: Literal["done", "refused", "failed", "cancelled"]
    step: int | None = None
    detail: dict[str, Any] = {}
    reason: str = ""


class LineageOpened(JournalEntry, frozen=True):
    lineage: Lineage
    number: int | None = None
    """The command that asked for it."""
    undone: int = 0
    """Steps that are taken again."""


class LineageAbandoned(JournalEntry, frozen=True):
    """A rollback that did not come about: its lineage has no step, and the parent goes on."""

    lineage: int


class CheckpointCommitted(JournalEntry, frozen=True):
    id: str
    digest: str
    step: int
    lineage: int
    stage: str
    stage_step: int
    ended: bool
    generation: int
    bytes: int
    suspect: bool
    seconds: float
    stall_seconds: float
    loss: float | None = None
    adopted: bool = False
    """It lay in the checkpoint directory, whole and verified, and the journal did not know it."""
    doubt: str = ""
    """Why an operator should not trust it, where its step's metrics are finite but something else speaks against it."""
    settings: dict[str, float] = {}
    """Live settings that it holds."""


class CheckpointPruned(JournalEntry, frozen=True):
    """The controller is about to delete a checkpoint."""

    id: str


class CheckpointDamaged(JournalEntry, frozen=True):
    """A checkpoint failed verification; or passed it after all, where the reason is empty."""

    id: str
    reason: str


class CheckpointFailed(JournalEntry, frozen=True):
    id: str
    step: int
    reason: str


class GoldenMarked(JournalEntry, frozen=True):
    id: str
    golden: bool


class StageBegan(JournalEntry, frozen=True):
    stage: str
    step: int
    lineage: int
    stage_step: int = 0


class StageEnded(JournalEntry, frozen=True):
    stage: str
    step: int
    stage_step: int
    lineage: int
    product: str | None


class SettingsInForce(JournalEntry, frozen=True):
    """Reported by the ranks after a start, a rollback or a change."""

    lineage: int
    step: int
    settings: dict[str, float]


class SampleTaken(JournalEntry, frozen=True):
    stage: str
    step: int
    lineage: int
    prompt: str
    text: str


class Noted(JournalEntry, frozen=True):
    level: Literal["info", "warning", "alarm"]
    text: str
    step: int | None = None
    rule: str = ""
    """Watch rule that raised it; empty: none did."""
    value: float | None = None
    """Of the rule's metric."""
    threshold: str = ""
    """What the rule compares the value with, as `above 4`."""


Entry = (
    TermBegan
    | RunBegan
    | RecipeChanged
    | RunCopied
    | StateChanged
    | DataBuilt
    | AgentStarted
    | NodeMarked
    | NodeFailed
    | RanksEnvironment
    | GenerationBegan
    | GenerationEnded
    | CommandAccepted
    | CommandSent
    | CommandEnded
    | LineageOpened
    | LineageAbandoned
    | CheckpointCommitted
    | CheckpointPruned
    | CheckpointDamaged
    | CheckpointFailed
    | GoldenMarked
    | StageBegan
    | StageEnded
    | SettingsInForce
    | SampleTaken
    | Noted
)

decoder: msgspec.json.Decoder[Entry] = msgspec.json.Decoder(Entry)
"""Of one entry's JSON."""
