"""Files of JSON lines that are only ever appended to, and survive being killed at any byte: `RUN/preferences`.

A line counts once its newline is there. What a kill left behind the last newline was never acknowledged to anybody; it is moved to
`FILE.torn` when the file is opened for writing, and passed over by readers.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import NamedTuple

import msgspec

from launcher.controller.annotation.records import NAME, Decision, Pair, Record, Undo, standing
from shards.common.decoding import UNDECODABLE

DRAWN = "pairs-drawn.jsonl"
EXPORTED = "pairs.jsonl"

_decoder: msgspec.json.Decoder[Record] = msgspec.json.Decoder(Record)


class PreferenceError(Exception):
    """The message says what stands in the way, and the way out."""


class JsonLines(NamedTuple):
    records: list[Record]
    whole: int
    """Bytes up to the end of the last line."""
    torn: bytes
    """What is behind it."""
    damaged: int
    """Lines that say nothing."""


def read(file: Path) -> JsonLines:
    """All lines of a file; none where it is not there."""
    try:
        content = file.read_bytes()
    except FileNotFoundError:
        content = b""
    whole = content.rfind(b"\n") + 1
    records: list[Record] = []
    damaged = 0
    for line in content[:whole].splitlines():
        try:
            records.append(_decoder.decode(line))
        except UNDECODABLE:
            damaged += 1
    return JsonLines(records, whole, content[whole:], damaged)


class AppendOnlyFile:
    """One file, open for appending; `records` is what it held, `notes` what was wrong with it."""

    def __init__(self, file: Path) -> None:
        """Raises OSError."""
        file.parent.mkdir(exist_ok=True)
        found = read(file)
        self.records = found.records
        self.notes: list[str] = []
        if found.damaged:
            self.notes.append(f"{file}: {found.damaged} lines are damaged and were skipped")
        self._handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            if found.torn:
                aside = file.with_name(f"{file.name}.torn")
                with aside.open("ab") as out:
                    out.write(found.torn + b"\n")
                    out.flush()
                    os.fsync(out.fileno())
                self.notes.append(f"{file}: its last line is incomplete; it was moved to {aside.name}")
            self._size = found.whole
            os.ftruncate(self._handle, self._size)
            _sync(file.parent)
        except BaseException:
            os.close(self._handle)
            raise

    def append(self, record: Record) -> None:
        """Returns when the line would survive a loss of power. Raises OSError, and then the file is as it was."""
        line = memoryview(msgspec.json.encode(record) + b"\n")
        size = len(line)
        try:
            at = self._size
            while line:
                written = os.pwrite(self._handle, line, at)
                at, line = at + written, line[written:]
            os.fsync(self._handle)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self._size)
            raise
        self._size += size
        self.records.append(record)

    def close(self) -> None:
        os.close(self._handle)


class Store:
    """One annotator's decisions, held against everybody else who would write under the same name."""

    def __init__(self, directory: Path, annotator: str, holder: str) -> None:
        """holder: who writes, in words for whoever is refused meanwhile. Raises PreferenceError and OSError."""
        check_name(annotator)
        directory.mkdir(exist_ok=True)
        self.annotator = annotator
        self._lock = _take(directory / f".{annotator}.lock", annotator, holder)
        try:
            self._lines = AppendOnlyFile(directory / f"{annotator}.jsonl")
        except BaseException:
            os.close(self._lock)
            raise
        self.notes = self._lines.notes
        self.decisions = standing(self._lines.records)
        """Those that stand."""
        self._known = {record.id for record in self._lines.records}

    def knows(self, id: str) -> bool:
        """Whether a decision or an undo of that id was made, even if it was taken back since."""
        return id in self._known

    def add(self, decision: Decision) -> None:
        """Makes a decision durable; one that is known already changes nothing. Raises OSError."""
        if decision.id not in self._known:
            self._lines.append(decision)
            self._known.add(decision.id)
            self.decisions.append(decision)

    def undo(self, id: str, time: str) -> Decision | None:
        """Takes back the newest decision that stands; None where there is none, or `id` is known already. Raises OSError."""
        if id in self._known or not self.decisions:
            return None
        last = self.decisions[-1]
        self._lines.append(Undo(id=id, time=time, annotator=self.annotator, decision=last.id))
        self._known.add(id)
        return self.decisions.pop()

    def close(self) -> None:
        self._lines.close()
        os.close(self._lock)


class SampledPairs:
    """The pairs that were drawn, by the prompt they answer."""

    def __init__(self, directory: Path) -> None:
        """Raises OSError."""
        self._lines = AppendOnlyFile(directory / DRAWN)
        self.notes = self._lines.notes
        self._by_id: dict[str, Pair] = {}
        for record in self._lines.records:
            if isinstance(record, Pair):
                self._by_id[record.id] = record
        self._by_prompt: dict[tuple[object, ...], list[Pair]] = {}
        for pair in self._by_id.values():
            self._by_prompt.setdefault(pair.prompt, []).append(pair)

    def add(self, pair: Pair) -> None:
        """Raises OSError."""
        self._lines.append(pair)
        self._by_id[pair.id] = pair
        self._by_prompt.setdefault(pair.prompt, []).append(pair)

    def get(self, id: str) -> Pair | None:
        return self._by_id.get(id)

    def of(self, prompt: tuple[object, ...]) -> list[Pair]:
        """Oldest first."""
        return self._by_prompt.get(prompt, [])

    def close(self) -> None:
        self._lines.close()


def check_name(annotator: str) -> None:
    """Raises PreferenceError."""
    if not NAME.fullmatch(annotator):
        raise PreferenceError(
            f'"{annotator}" cannot name an annotator: use up to 64 letters, digits, `_`, `-` and `.`, and neither a `.` first'
            " nor pairs or pairs-drawn (--as NAME)"
        )


def annotators(directory: Path) -> list[str]:
    """Whoever has a file."""
    files = directory.glob("*.jsonl") if directory.is_dir() else ()
    return sorted(file.stem for file in files if NAME.fullmatch(file.stem))


def all_decisions(directory: Path) -> dict[str, list[Decision]]:
    """By annotator, those that stand; whoever has none is left out, and so is any other file that lies there."""
    found = {name: standing(read(directory / f"{name}.jsonl").records) for name in annotators(directory)}
    return {name: made for name, made in found.items() if made}


def _take(file: Path, annotator: str, holder: str) -> int:
    """The handle of a lock that the system lets go of when this process ends."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = os.read(handle, 1000).decode(errors="replace") or "another process"
        os.close(handle)
        raise PreferenceError(f"{annotator} annotates already: {who} (end that first, or use another name: --as NAME)") from None
    os.ftruncate(handle, 0)
    os.pwrite(handle, holder.encode(), 0)
    return handle


def _sync(directory: Path) -> None:
    """A new file's name survives a loss of power only with its directory."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
