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
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from midwatch.protocol import Lineage
from midwatch.run_directory import PRIVATE_FILE
from shards.common.files import sync_directory


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
    generation: int = 0
    """Generations, lineages and commands up to these numbers may have existed, though the journal no longer says so."""
    lineage: int = 0
    command: int = 0


class RunBegan(_Entry, frozen=True):
    name: str
    recipe: str
    """Hash of the recipe."""
    file: str = ""
    """Hash of what recipe.toml says, defaults left out."""
    stated: dict[str, str] = {}
    """What recipe.toml says, by dotted keys; the values of secrets left out."""
    id: str = ""
    """The run's own; empty in journals of earlier versions."""


class RecipeChanged(_Entry, frozen=True):
    """recipe.toml was edited; what starts from now on follows it."""

    file: str
    stated: dict[str, str]
    changes: tuple[str, ...]
    """As `key: old -> new`."""


class RunCopied(_Entry, frozen=True):
    """This directory was found to be a copy of another run: what follows is of a run of its own."""

    id: str
    original: str
    """Id of the run that it was copied from."""
    path: str = ""
    """Where that was."""


class StateChanged(_Entry, frozen=True):
    state: str
    reason: str = ""


class DataBuilt(_Entry, frozen=True):
    directory: str
    seconds: float


class AgentStarted(_Entry, frozen=True):
    node: str
    pid: int
    birth: str = ""
    """Tells the process from any other that ever has its number (midwatch.processes); empty in journals of earlier versions."""
    created: float = 0.0
    """When the process began, by the system's clock; only in journals of earlier versions."""


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
    adopted: bool = False
    """It lay in the checkpoint directory, whole and verified, and the journal did not know it."""
    doubt: str = ""
    """Why an operator should not trust it, where its step's metrics are finite but something else speaks against it."""
    settings: dict[str, float] = {}
    """Live settings that it holds."""


class CheckpointPruned(_Entry, frozen=True):
    """The controller is about to delete a checkpoint."""

    id: str


class CheckpointDamaged(_Entry, frozen=True):
    """A checkpoint failed verification; or passed it after all, where the reason is empty."""

    id: str
    reason: str


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

_decoder: msgspec.json.Decoder[Entry] = msgspec.json.Decoder(Entry)
_NAME = re.compile(r"(\d{6})\.log")
BALLAST = "ballast"
"""A file beside the journal whose room is given to it when the disk is full."""


class JournalError(Exception):
    """The journal cannot be read or written."""


class Ousted(JournalError):
    """A later term has begun: this controller's time is over."""


class Floors(msgspec.Struct, frozen=True):
    """The highest numbers that files other than the journal speak of: the journal must never give one of them again."""

    term: int = 0
    generation: int = 0
    lineage: int = 0


_BYTES_OF_A_COMMAND = 64
"""A command, a generation or a lineage takes at least so many bytes of journal: what is lost held no more of them than that."""
_UNKNOWN_LOSS = 1 << 20
"""Bytes assumed of a lost term file whose length nothing tells."""


class Journal:
    """The journal of one term, open for appending. `entries` holds what all accepted terms said, oldest first."""

    def __init__(
        self,
        directory: Path,
        now: float,
        host: str,
        pid: int,
        versions: dict[str, str] | None = None,
        floors: Floors = Floors(),  # noqa: B008  # frozen
    ) -> None:
        """Claims the next term, above all that the journal or `floors` name.

        Raises Ousted if another claims it at the same moment.
        """
        self.term = _newest_term(directory, floors.term) + 1
        self._file = directory / f"{self.term:06d}.log"
        self._next = directory / f"{self.term + 1:06d}.log"
        try:
            self._handle = os.open(self._file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, PRIVATE_FILE)
        except FileExistsError:
            raise Ousted(f"{self._file}: another controller has just taken over") from None
        except OSError as error:
            raise JournalError(f"{self._file}: {error.strerror}") from None
        try:
            sync_directory(directory)
            older = read_journal(directory, floors.term)  # after the claim: from now on the term before can append no more
            del older.lengths[self._file.name]
            self.entries: list[tuple[int, Entry]] = older.entries
            self.damaged, self.lost = older.damaged, older.lost
            self._length, self._torn = 0, False
            began = TermBegan(time=now, term=self.term, host=host, pid=pid, accepts=older.lengths, versions=versions or {})
            self._begin(msgspec.structs.replace(began, **_numbers(older, floors)))
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
        self._check_term()
        content = b"".join(_line(entry) for entry in entries)
        try:
            if self._torn:
                self._reopen()
            self._torn = True
            written = 0
            while written < len(content):
                written += os.write(self._handle, content[written:])
            os.fsync(self._handle)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self._length)
            raise JournalError(f"{self._file}: {_what_to_do(error)}") from None
        self._check_term()  # a later controller that has claimed its term since may have read too early to count these
        self._torn = False
        self._length += len(content)
        self.entries.extend((self.term, entry) for entry in entries)

    def _reopen(self) -> None:
        """After a failed write: the handle may be of storage that is gone, and half a line may lie at the file's end."""
        handle = os.open(self._file, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
        os.close(self._handle)
        self._handle = handle
        size = os.fstat(handle).st_size
        if size < self._length:
            raise OSError(errno.EIO, f"{self._length - size} bytes that were written are no longer there")
        os.ftruncate(handle, self._length)

    def _check_term(self) -> None:
        try:
            os.stat(self._next)
        except FileNotFoundError:
            return
        except OSError as error:
            raise JournalError(f"{self._next}: {_what_to_do(error)}") from None
        raise Ousted(f"{self._next} has been begun by a later controller")

    def close(self) -> None:
        os.close(self._handle)


class JournalContents(msgspec.Struct):
    """What a journal directory holds."""

    entries: list[tuple[int, Entry]]
    """(term, entry), oldest first."""
    lengths: dict[str, int]
    """Bytes of each file that hold whole entries."""
    damaged: list[str]
    """Places of entries that fail their checksum."""
    lost: list[str]
    """Files, or their ends, that the newest term has read and that are gone, each with what it may have held."""
    lost_bytes: int = 0


def read_journal(directory: Path, newest_term: int = 0) -> JournalContents:
    """Reads all terms, each up to the length that the term after it accepts. Raises JournalError if it cannot be read.

    newest_term: the newest that other files speak of; it counts as lost where its file is not there.
    """
    names = [f"{term:06d}.log" for term in _terms(directory)]
    try:
        contents = {name: (directory / name).read_bytes() for name in names}
    except OSError as error:
        raise JournalError(f"{directory}: {error.strerror}") from None
    limits: dict[str, int] = {}
    """Bytes of each file that count: what its successor accepts. Terms after that can only have seen as much, or less."""
    newest: dict[str, int] = {}
    """What the newest term has read."""
    began: dict[str, float] = {}
    for name, content in contents.items():
        first = next(iter(_parse(content)), None)
        if first is not None and isinstance(first[1], TermBegan):
            began[name] = first[1].time
            newest = {older: max(0, length) for older, length in first[1].accepts.items() if _NAME.fullmatch(older)}
            for older, length in newest.items():
                limits[older] = max(limits.get(older, 0), length)
    reading = JournalContents(entries=[], lengths={}, damaged=[], lost=[])
    ends: dict[str, float] = {}
    for name in names:
        end = 0
        for stop, entry in _parse(contents[name][: limits.get(name)]):
            if entry is None:
                reading.damaged.append(f"{directory / name}: entry before byte {stop}")
            else:
                reading.entries.append((int(name[:6]), entry))
                ends[name] = entry.time
            end = stop
        reading.lengths[name] = end
    if newest_term > max((int(name[:6]) for name in names if contents[name]), default=0):
        newest = newest | {f"{newest_term:06d}.log": 0}
    for name, length in sorted(newest.items()):
        there = len(contents[name]) if name in contents else None
        if there is None or there < length:
            reading.lost_bytes += length - (there or 0) if length else _UNKNOWN_LOSS
            reading.lost.append(_loss(directory / name, length, there, ends, began))
    return reading


def _newest_term(directory: Path, floor: int) -> int:
    """The highest number of a term that there is, or that another term has read, or `floor`."""
    terms = _terms(directory)
    named = [floor, *terms]
    for term in terms:
        try:
            with (directory / f"{term:06d}.log").open("rb") as file:
                _, entry = next(iter(_parse(file.readline())), (0, None))
        except OSError as error:
            raise JournalError(f"{directory}: {error.strerror}") from None
        if isinstance(entry, TermBegan):
            named += [int(name[:6]) for name in entry.accepts if _NAME.fullmatch(name)]
    return max(named)


def _loss(file: Path, length: int, there: int | None, ends: dict[str, float], began: dict[str, float]) -> str:
    """What is gone of a term's file, and what it may have held."""
    before = [when for name, when in ends.items() if name < file.name or (there and name == file.name)]
    after = [when for name, when in began.items() if name > file.name]
    span = f" from {_clock(max(before))}" if before else ""
    span += f" until {_clock(min(after))}" if after else ""
    if there is None:
        what = f"the journal of term {int(file.stem)} is missing ({file}" + (f", {length:,} bytes)" if length else ")")
    else:
        what = f"the last {length - there:,} of {length:,} bytes of {file} are gone"
    held = "it may have held commands, golden marks, rollbacks and settings"
    return f"{what}: {held}{span}; put the file back from a copy before the run goes on, if there is one"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def _numbers(reading: JournalContents, floors: Floors) -> dict[str, int]:
    """Floors of the numbers that a term may give; none where nothing is lost and nothing else speaks of higher ones."""
    known = {"generation": 0, "lineage": 0, "command": 0}
    for _, entry in reading.entries:
        numbers = {"lineage": entry.lineage.id} if isinstance(entry, LineageOpened) else {}
        if isinstance(entry, GenerationBegan | GenerationEnded | RanksEnvironment | NodeFailed | CheckpointCommitted | CommandSent):
            numbers["generation"] = entry.generation
        if isinstance(entry, CommandAccepted | CommandSent | CommandEnded):
            numbers["command"] = entry.number
        if isinstance(entry, TermBegan):
            numbers = {"generation": entry.generation, "lineage": entry.lineage, "command": entry.command}
        for name, number in numbers.items():
            known[name] = max(known[name], number)
    most = reading.lost_bytes // _BYTES_OF_A_COMMAND
    named = {
        "generation": max(floors.generation, known["generation"] + most),
        "lineage": max(floors.lineage, known["lineage"] + most),
        "command": known["command"] + most,
    }
    return {name: number for name, number in named.items() if number > known[name]}


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
        except (ValueError, RecursionError):
            yield start, None


def _what_to_do(error: OSError) -> str:
    """The error, and the way out."""
    if error.errno == errno.ENOSPC:
        return f"{error.strerror}; free some space"
    if error.errno == errno.EDQUOT:
        return f"{error.strerror}; free some space of your quota, or have it raised"
    return f"{error.strerror}; the storage is at fault, not full"
