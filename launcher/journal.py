"""The journal: one append-only file a controller term, each entry a checksummed line of JSON, durable before it is acted upon.

`journal/TERM.log` is claimed by exclusive creation, so two controllers never write the same file; the first entry of each names the
lengths of the older files that it accepts, so what an ousted controller still writes counts for nothing. A torn last line is left
out.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from launcher.protocol import Lineage


class _Entry(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """What every entry has: when it was written, and for whom."""

    time: float
    author: str = ""
    report: int = 0
    """Number of rank 0's message, in its generation, that this entry stores."""


class TermBegan(_Entry, frozen=True):
    term: int
    host: str
    pid: int
    accepts: dict[str, int]
    """Bytes of each older file, by name, that count."""
    versions: dict[str, str] = {}


class RunBegan(_Entry, frozen=True):
    name: str
    recipe: str
    """Hash of the recipe."""


class StateChanged(_Entry, frozen=True):
    state: str
    reason: str = ""


class DataBuilt(_Entry, frozen=True):
    directory: str
    seconds: float


class AgentStarted(_Entry, frozen=True):
    node: str
    pid: int
    created: float
    """When the process began, by the system's clock, so that its number cannot be mistaken for another's."""


class NodeMarked(_Entry, frozen=True):
    """What a node may be used for from now on; its failures are forgotten where it is in use again."""

    node: str
    mark: Literal["in use", "drained", "quarantined"]
    reason: str = ""


class NodeFailed(_Entry, frozen=True):
    """A generation ended through this node."""

    node: str
    generation: int
    reason: str


class RanksEnvironment(_Entry, frozen=True):
    """What a node's ranks find in their environment, the values of secrets left out."""

    node: str
    generation: int
    environment: dict[str, str]


class GenerationBegan(_Entry, frozen=True):
    generation: int
    lineage: int
    checkpoint: str | None
    nodes: tuple[str, ...]
    world: int
    environment: dict[str, str] = {}


class GenerationEnded(_Entry, frozen=True):
    generation: int
    cause: str
    step: int


class CommandAccepted(_Entry, frozen=True):
    number: int
    id: str
    verb: str
    arguments: dict[str, Any] = {}


class CommandSent(_Entry, frozen=True):
    number: int
    generation: int


class CommandEnded(_Entry, frozen=True):
    number: int
    state: Literal["done", "refused", "failed", "cancelled"]
    step: int | None = None
    detail: dict[str, Any] = {}
    reason: str = ""


class LineageOpened(_Entry, frozen=True):
    lineage: Lineage
    number: int | None = None
    """The command that asked for it."""
    undone: int = 0
    """Steps that are taken again."""


class LineageAbandoned(_Entry, frozen=True):
    """A rollback that did not come about: its lineage has no step, and the parent goes on."""

    lineage: int


class CheckpointCommitted(_Entry, frozen=True):
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
    settings: dict[str, float] = {}
    """Live settings that it holds."""


class CheckpointPruned(_Entry, frozen=True):
    id: str


class CheckpointFailed(_Entry, frozen=True):
    id: str
    step: int
    reason: str


class GoldenMarked(_Entry, frozen=True):
    id: str
    golden: bool


class StageBegan(_Entry, frozen=True):
    stage: str
    step: int
    lineage: int
    stage_step: int = 0


class StageEnded(_Entry, frozen=True):
    stage: str
    step: int
    stage_step: int
    lineage: int
    product: str | None


class SettingsInForce(_Entry, frozen=True):
    """Reported by the ranks after a start, a rollback or a change."""

    lineage: int
    step: int
    settings: dict[str, float]


class SampleTaken(_Entry, frozen=True):
    stage: str
    step: int
    lineage: int
    prompt: str
    text: str


class Noted(_Entry, frozen=True):
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
    | CheckpointFailed
    | GoldenMarked
    | StageBegan
    | StageEnded
    | SettingsInForce
    | SampleTaken
    | Noted
)

_decoder: msgspec.json.Decoder[Entry] = msgspec.json.Decoder(Entry)
_NAME = re.compile(r"(\d{6})\.log")
BALLAST = "ballast"
"""A file beside the journal whose room is given to it when the disk is full."""


class JournalError(Exception):
    """The journal cannot be read or written."""


class Ousted(JournalError):
    """A later term has begun: this controller's time is over."""


class Journal:
    """The journal of one term, open for appending. `entries` holds what all accepted terms said, oldest first."""

    def __init__(self, directory: Path, now: float, host: str, pid: int, versions: dict[str, str] | None = None) -> None:
        """Claims the next term. Raises Ousted if another claims it at the same moment."""
        terms = _terms(directory)
        self.term = terms[-1] + 1 if terms else 1
        self._file = directory / f"{self.term:06d}.log"
        self._next = directory / f"{self.term + 1:06d}.log"
        try:
            self._handle = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except FileExistsError:
            raise Ousted(f"{self._file}: another controller has just taken over") from None
        except OSError as error:
            raise JournalError(f"{self._file}: {error.strerror}") from None
        try:
            _sync_directory(directory)
            older = read_journal(directory)  # after the claim: from now on the term before can append no more
            del older.lengths[self._file.name]
            self.entries: list[tuple[int, Entry]] = older.entries
            self.damaged = older.damaged
            self._length = 0
            self._begin(TermBegan(time=now, term=self.term, host=host, pid=pid, accepts=older.lengths, versions=versions or {}))
        except BaseException:
            os.close(self._handle)
            raise

    def _begin(self, entry: TermBegan) -> None:
        """Writes the first entry, into the room that the last term has kept free where there is no other."""
        try:
            self.append(entry)
        except Ousted:
            raise
        except JournalError:
            (self._file.parent / BALLAST).unlink(missing_ok=True)
            self.append(entry)

    def append(self, *entries: Entry) -> None:
        """Writes entries durably. Raises Ousted after a takeover, and JournalError, nothing half-written, if the disk refuses."""
        self._check_in_office()
        content = b"".join(_line(entry) for entry in entries)
        try:
            written = 0
            while written < len(content):
                written += os.write(self._handle, content[written:])
            os.fsync(self._handle)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self._length)
            way = "; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
            raise JournalError(f"{self._file}: {error.strerror}{way}") from None
        self._check_in_office()  # a later controller that has claimed its term since may have read too early to count these
        self._length += len(content)
        self.entries.extend((self.term, entry) for entry in entries)

    def _check_in_office(self) -> None:
        if self._next.exists():
            raise Ousted(f"{self._next} has been begun by a later controller")

    def close(self) -> None:
        os.close(self._handle)


class Reading(msgspec.Struct):
    """What a journal directory holds."""

    entries: list[tuple[int, Entry]]
    """(term, entry), oldest first."""
    lengths: dict[str, int]
    """Bytes of each file that hold whole entries."""
    damaged: list[str]
    """Places of entries that fail their checksum."""


def read_journal(directory: Path) -> Reading:
    """Reads all terms, each up to the length that the later ones accept. Raises JournalError if it cannot be read."""
    names = [f"{term:06d}.log" for term in _terms(directory)]
    try:
        contents = {name: (directory / name).read_bytes() for name in names}
    except OSError as error:
        raise JournalError(f"{directory}: {error.strerror}") from None
    accepted = {name: len(content) for name, content in contents.items()}
    for content in contents.values():
        first = next(iter(_parse(content)), None)
        if first is not None and isinstance(first[1], TermBegan):
            for name, length in first[1].accepts.items():
                accepted[name] = min(accepted.get(name, 0), length)
    reading = Reading(entries=[], lengths={}, damaged=[])
    for name in names:
        end = 0
        for stop, entry in _parse(contents[name][: accepted[name]]):
            if entry is None:
                reading.damaged.append(f"{directory / name}: entry before byte {stop}")
            else:
                reading.entries.append((int(name[:6]), entry))
            end = stop
        reading.lengths[name] = end
    return reading


def _terms(directory: Path) -> list[int]:
    try:
        return sorted(int(match.group(1)) for p in directory.iterdir() if (match := _NAME.fullmatch(p.name)))
    except OSError as error:
        raise JournalError(f"{directory}: {error.strerror}") from None


def _line(entry: Entry) -> bytes:
    body = msgspec.json.encode(entry)
    return b"%08x " % zlib.crc32(body) + body + b"\n"


def _parse(content: bytes) -> Iterator[tuple[int, Entry | None]]:
    """(end of the entry, entry) for each whole line; None for one that fails its checksum."""
    start = 0
    while (stop := content.find(b"\n", start)) >= 0:
        line, start = content[start:stop], stop + 1
        try:
            if int(line[:8], 16) != zlib.crc32(line[9:]):
                raise ValueError
            yield start, _decoder.decode(line[9:])
        except (ValueError, msgspec.DecodeError):
            yield start, None


def _sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
