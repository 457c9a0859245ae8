"""What a policy writes in its rollouts: JSON lines in `samples/`, all of the newest rollouts and the telling ones of older ones.

    samples/000003-00017.jsonl    chunk 17 of the controller's term 3: up to CHUNK rollouts, appended to until it is full

Each line is a `Written`. A term appends to chunks of its own alone. It is no journal: a line that is torn or damaged is passed
over, and nothing is decided by these files. They stay small by thinning: of a rollout older than the newest WHOLE the best, the
worst, the longest and the furthest from the reference are kept, of a chunk older than the newest SINGLE rollouts these four of all
that it has. Lines carry who sent them and as which number, so what is sent again is known.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from midwatch.metrics.m4_columns import LineageSegment
from midwatch.protocol import Sampled, SampleQuery, SampleReply, SampleView
from midwatch.run_directory import PRIVATE_FILE, write_atomically
from shards.common.decoding import UNDECODABLE, Int64

log = logging.getLogger(__name__)

CHUNK = 64
"""Rollouts of a file."""
WHOLE = 256
"""Newest rollouts of which every sample is kept."""
SINGLE = 4096
"""Newest rollouts that keep samples of their own."""
MOST = 1000
"""Samples of one answer."""
MOST_BYTES = 8 << 20
"""Text of one answer, about."""


class Written(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A line of a chunk."""

    source: str
    number: Int64
    time: float
    stage: str
    step: Int64
    lineage: Int64
    reward: float | None = None
    kl: float | None = None
    tokens: Int64 | None = None
    prompt: str = ""
    text: str = ""


class Kept(msgspec.Struct, frozen=True, gc=False):
    """A line without its texts, and where it lies."""

    chunk: str
    offset: int
    length: int
    source: str
    number: int
    stage: str
    step: int
    lineage: int
    reward: float | None
    kl: float | None
    tokens: int | None

    @property
    def rollout(self) -> tuple[str, str, int, int]:
        return self.source, self.stage, self.lineage, self.step


def telling(samples: Iterable[Kept]) -> set[int]:
    """Numbers in line of the best, the worst, the longest and the furthest of these."""
    numbered = list(enumerate(samples))
    return {min(numbered, key=lambda each: rank(each[1]))[0] for rank in RANKS.values()}


def _most(value: float | None) -> tuple[bool, float]:
    """Sorts the largest first, and what has no value last."""
    return value is None, -(value or 0.0)


RANKS: dict[str, Callable[[Kept], tuple[bool, float]]] = {
    "reward": lambda kept: _most(kept.reward),
    "worst": lambda kept: _most(None if kept.reward is None else -kept.reward),
    "kl": lambda kept: _most(kept.kl),
    "longest": lambda kept: _most(kept.tokens),
}


class Samples:
    """The files of one run, and an index of them in memory. `add` never waits for a query; the others may be called in threads."""

    def __init__(self, folder: Path, term: int) -> None:
        self._folder, self._term = folder, term
        self._chunks: dict[str, list[Kept]] = {}
        """By the name of their file, oldest first."""
        self._files = threading.Lock()
        """Held by whoever reads chunks or replaces them."""
        self._newest: dict[str, int] = {}
        """Highest number taken of each source."""
        self._handle: int | None = None
        self._full: list[int] = []
        """Handles of chunks that are full, and not yet on the disk."""
        self._path = folder
        self._length = 0
        self._rollouts = 0
        """Begun in the chunk that is written to."""
        self._written = 0
        self._unsynced = False
        self._to_thin = True
        self.taken = 0
        """Samples ever seen: a higher number means there are new ones."""
        for path in sorted(folder.glob("*.jsonl")):
            self._chunks[path.name] = self._read(path)
            self.taken += len(self._chunks[path.name])

    def _read(self, path: Path) -> list[Kept]:
        found, offset = [], 0
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(*UNDECODABLE):
                found.append(_kept(path.name, offset, len(line), _decoder.decode(line)))
                self._newest[found[-1].source] = max(self._newest.get(found[-1].source, 0), found[-1].number)
            offset += len(line) + 1
        return found

    # Taking in

    def add(self, source: str, number: int, time: float, sample: Sampled) -> bool:
        """Takes in what a source sent; False where it was there already.

        Raises OSError, nothing half-written, if the disk refuses.
        """
        if number <= self._newest.get(source, 0):
            return False
        written = Written(
            source=source,
            number=number,
            time=time,
            stage=sample.stage,
            step=sample.step,
            lineage=sample.lineage,
            reward=sample.reward,
            kl=sample.kl,
            tokens=sample.tokens,
            prompt=sample.prompt,
            text=sample.text,
        )
        line = _encoder.encode(written)
        before = self._chunks.get(self._path.name, [])
        if self._handle is None or (before and before[-1].rollout != (source, sample.stage, sample.lineage, sample.step)):
            self._begin_rollout()
        self._append(line + b"\n")
        kept = _kept(self._path.name, self._length, len(line), written)
        self._length += len(line) + 1
        self._newest[source] = number
        self._chunks.setdefault(self._path.name, []).append(kept)
        self.taken += 1
        self._unsynced = True
        return True

    def _begin_rollout(self) -> None:
        """The next rollout's chunk: the one at hand while it has room, else a new one."""
        if self._handle is None or self._rollouts >= CHUNK:
            path = self._folder / f"{self._term:06d}-{self._written:05d}.jsonl"
            self._folder.mkdir(exist_ok=True)
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, PRIVATE_FILE)
            if self._handle is not None:
                self._full.append(self._handle)
            self._handle, self._path, self._length, self._rollouts = handle, path, 0, 0
            self._written += 1
            self._to_thin = True
        self._rollouts += 1

    def _append(self, line: bytes) -> None:
        assert self._handle is not None
        try:
            done = 0
            while done < len(line):
                done += os.write(self._handle, line[done:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._handle, self._length)
            raise

    def sync(self) -> None:
        """Returns once what was added would survive a loss of power; thins older chunks now and then."""
        while self._full:
            os.fsync(self._full[0])
            os.close(self._full.pop(0))
        if self._unsynced and (handle := self._handle) is not None:
            self._unsynced = False
            os.fsync(handle)
        if self._to_thin:
            self._to_thin = False
            self._thin()

    def close(self) -> None:
        for handle in [*self._full, *([self._handle] if self._handle is not None else [])]:
            os.close(handle)
        self._full, self._handle = [], None

    def _thin(self) -> None:
        newer = 0
        for name in reversed(list(self._chunks)):
            kept = list(self._chunks[name])
            rollouts: dict[tuple[str, str, int, int], list[Kept]] = {}
            for each in kept:
                rollouts.setdefault(each.rollout, []).append(each)
            if newer >= WHOLE:
                groups = [kept] if newer >= SINGLE and kept else list(rollouts.values())
                left = [group[at] for group in groups for at in sorted(telling(group))]
                if len(left) < len(kept):
                    self._rewrite(name, left)
            newer += len(rollouts)

    def _rewrite(self, name: str, left: list[Kept]) -> None:
        path = self._folder / name
        try:
            with self._files:
                content = path.read_bytes()
                lines = [content[each.offset : each.offset + each.length] for each in left]
                write_atomically(path, b"".join(line + b"\n" for line in lines), mode=PRIVATE_FILE)
                self._chunks[name] = self._read(path)
        except OSError as error:
            log.warning("%s cannot be thinned: %s", path, error.strerror)

    # Queries

    def find(self, query: SampleQuery, path: Sequence[LineageSegment], others: Sequence[Sampled] = ()) -> SampleReply:
        """What matches, in the order asked for; `others` are samples that lie elsewhere, oldest first.

        `path` is the line in force. Raises re.error for a pattern that is none.
        """
        pattern = re.compile(query.pattern, re.IGNORECASE) if query.pattern else None
        with self._files:
            every: list[Kept] = [
                Kept("", at, 0, "journal", at, o.stage, o.step, o.lineage, o.reward, o.kl, o.tokens) for at, o in enumerate(others)
            ]
            every += [kept for name in list(self._chunks) for kept in list(self._chunks[name])]
            stages = tuple(dict.fromkeys(kept.stage for kept in every))
            wanted = [kept for kept in reversed(every) if _asked_for(kept, query)]
            wanted.sort(key=lambda kept: (-kept.lineage, -kept.step))  # lineages are numbered as they begin
            if query.order != "step":
                wanted.sort(key=RANKS[query.order])
            texts = self._texts(wanted if pattern else wanted[query.offset :], others)
            found: list[SampleView] = []
            total, size = 0, 0
            for kept, prompt, text in texts:
                if pattern is not None and not (pattern.search(prompt) or pattern.search(text)):
                    continue
                total += 1
                first = query.offset if pattern is not None else 0
                if total > first and len(found) < min(query.limit, MOST) and size < MOST_BYTES:
                    found.append(_view(kept, prompt, text, query.cut, path))
                    size += len(found[-1].prompt) + len(found[-1].text)
                elif pattern is None:
                    break
        return SampleReply(
            id=query.id, samples=tuple(found), total=total if pattern is not None else len(wanted), stages=stages, taken=self.taken
        )

    def _texts(self, wanted: Sequence[Kept], others: Sequence[Sampled]) -> Iterator[tuple[Kept, str, str]]:
        """Each with its prompt and text, read when it is its turn; those whose file is gone are left out."""
        contents: dict[str, bytes] = {}
        for kept in wanted:
            if not kept.chunk:
                yield kept, others[kept.offset].prompt, others[kept.offset].text
                continue
            if len(contents.get(kept.chunk, b"")) < kept.offset + kept.length:
                contents[kept.chunk] = self._content(kept.chunk)
            with contextlib.suppress(*UNDECODABLE):
                written = _decoder.decode(contents[kept.chunk][kept.offset : kept.offset + kept.length])
                yield kept, written.prompt, written.text

    def _content(self, name: str) -> bytes:
        try:
            return (self._folder / name).read_bytes()
        except OSError:
            return b""


def _kept(chunk: str, offset: int, length: int, line: Written) -> Kept:
    return Kept(
        chunk, offset, length, line.source, line.number, line.stage, line.step, line.lineage, line.reward, line.kl, line.tokens
    )


def _asked_for(kept: Kept, query: SampleQuery) -> bool:
    return (
        (not query.sample or _name(kept) == query.sample)
        and (not query.stage or kept.stage == query.stage)
        and (query.lineage is None or kept.lineage == query.lineage)
        and query.start <= kept.step
        and (query.stop is None or kept.step < query.stop)
    )


def _name(kept: Kept) -> str:
    return f"{kept.source}/{kept.number}"


def _view(kept: Kept, prompt: str, text: str, cut: int, path: Sequence[LineageSegment]) -> SampleView:
    return SampleView(
        name=_name(kept),
        stage=kept.stage,
        step=kept.step,
        lineage=kept.lineage,
        on_line=any(line == kept.lineage and (last is None or kept.step < last + (not kept.chunk)) for line, _, last in path),
        reward=kept.reward,
        kl=kept.kl,
        tokens=kept.tokens,
        prompt=prompt[:cut] if cut else prompt,
        text=text[:cut] if cut else text,
    )


_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Written)
