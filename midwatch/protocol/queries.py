"""Questions of clients, answered from what is stored: charts, metrics, journal, logs, texts, samples, what a rollback undoes."""

from __future__ import annotations

from typing import Literal

import msgspec

from midwatch.protocol.base import StrictMessage
from midwatch.protocol.ranks import Sampled


class ChartQuery(StrictMessage, frozen=True):
    """M4 columns of one metric between two steps; the width in dots. `lineage`: None for the line in force."""

    id: int
    metric: str
    start: int
    stop: int
    width: int
    lineage: int | None = None


class ChartReply(StrictMessage, frozen=True):
    """`columns` as `midwatch.metrics.m4_columns.Columns.encode` makes them."""

    id: int
    columns: bytes


class MetricsQuery(StrictMessage, frozen=True):
    """Names of all metrics, and rows of some."""

    id: int
    names: tuple[str, ...] = ()
    last: int = 0
    """Newest rows of each."""


class MetricRow(msgspec.Struct, frozen=True, array_like=True):
    lineage: int
    step: int
    tokens: int
    time: float
    value: float


class MetricsReply(StrictMessage, frozen=True):
    id: int
    names: tuple[str, ...]
    rows: dict[str, tuple[MetricRow, ...]] = {}


class JournalQuery(StrictMessage, frozen=True):
    """Entries after the given one; the newest `limit` where `after` is negative."""

    id: int
    after: int = -1
    limit: int = 500


class JournalLine(msgspec.Struct, frozen=True, kw_only=True):
    """A journal entry as screens show it."""

    index: int
    time: float
    term: int
    kind: str
    author: str
    text: str
    level: Literal["info", "warning", "alarm"] = "info"


class JournalReply(StrictMessage, frozen=True):
    id: int
    lines: tuple[JournalLine, ...]


class LogQuery(StrictMessage, frozen=True):
    """Lines of a log: the newest where `offset` is negative, else from that byte on. Without a `file`: the list of files."""

    id: int
    file: str = ""
    offset: int = -1
    lines: int = 500
    pattern: str = ""
    """Regular expression that lines must match; empty: all."""


class LogReply(StrictMessage, frozen=True):
    id: int
    files: tuple[str, ...]
    lines: tuple[str, ...] = ()
    offset: int = 0
    """Byte after the last line given; ask from here for what follows."""


class UndoQuery(StrictMessage, frozen=True):
    """What a rollback to `checkpoint` would undo."""

    id: int
    checkpoint: str
    lr_scale: float = 1.0
    """Factor on the learning rate that would be asked for."""


class UndoReply(StrictMessage, frozen=True):
    id: int
    checkpoint: str
    step: int
    stage: str
    steps: int
    tokens: int
    seconds: float
    settings: tuple[str, ...] = ()
    """Live settings that it changes, as `lr 0.0003 -> 0.001`."""
    problem: str = ""
    """Why it cannot be done, where it cannot."""


class TextQuery(StrictMessage, frozen=True):
    """`recipe`: the recipe in force; `samples`: what the model wrote; `batch`: the text read at a step."""

    id: int
    what: Literal["recipe", "samples"]


class TextReply(StrictMessage, frozen=True):
    id: int
    text: str = ""
    samples: tuple[Sampled, ...] = ()


class SampleQuery(StrictMessage, frozen=True):
    """What the model wrote: those that match, from the `offset`-th on."""

    id: int
    order: Literal["step", "reward", "worst", "kl", "longest"] = "step"
    """Newest, best, worst, furthest from the reference or longest first; of equals the newest."""
    offset: int = 0
    limit: int = 100
    cut: int = 0
    """Characters of prompt and text that are enough; 0: all."""
    stage: str = ""
    lineage: int | None = None
    start: int = 0
    stop: int | None = None
    """Steps of the run, `stop` not among them."""
    pattern: str = ""
    """Regular expression that prompt or text must match."""
    sample: str = ""
    """Name of the only one that is wanted."""


class SampleView(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    name: str
    stage: str
    step: int
    lineage: int
    on_line: bool = True
    """On the line in force: not undone by a rollback since."""
    reward: float | None = None
    kl: float | None = None
    tokens: int | None = None
    prompt: str = ""
    text: str = ""


class SampleReply(StrictMessage, frozen=True):
    id: int
    samples: tuple[SampleView, ...] = ()
    total: int = 0
    """That match."""
    stages: tuple[str, ...] = ()
    """That have any."""
    taken: int = 0
    """Samples there have been: another number means that there are new ones."""
