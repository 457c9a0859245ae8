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

import msgspec

from midwatch.journal.entries import (
    CheckpointCommitted,
    CommandAccepted,
    CommandEnded,
    CommandSent,
    Entry,
    GenerationBegan,
    GenerationEnded,
    LineageOpened,
    NodeFailed,
    RanksEnvironment,
    TermBegan,
    decoder,
)
from midwatch.run_directory import PRIVATE_FILE
from shards.common.files import sync_directory

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
            yield start, decoder.decode(line[9:])
        except (ValueError, RecursionError):
            yield start, None


def _what_to_do(error: OSError) -> str:
    """The error, and the way out."""
    if error.errno == errno.ENOSPC:
        return f"{error.strerror}; free some space"
    if error.errno == errno.EDQUOT:
        return f"{error.strerror}; free some space of your quota, or have it raised"
    return f"{error.strerror}; the storage is at fault, not full"
