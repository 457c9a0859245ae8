"""Where a build keeps what is between its steps: OUT/work, a directory a step, a file a task.

A task is done when its file is there under its final name; so any process that knows the build can tell what is left, and
a killed build goes on. Documents are numbered through the chunks, which follow sources, then units, then their own order.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from shards.build import checksummed_files
from shards.build.chunks import DocumentChunk
from shards.build.filter_stats import Funnel, together
from shards.common.errors import ShardError
from shards.common.files import write_atomically
from shards.readers.sources import Unit, changed, fingerprint, units
from shards.spec import Build, Clean, Source

DIRECTORY = "work"
PLAN = "plan.json"
MADE = ("report.json", "tokenizer.model", "tokenizer.template")
GATHERED = 4  # part of a chunk, in stored bytes, up to which units are read as one
LARGEST_GROUP = 4096  # units
DOCUMENT_BITS = 24  # of a document's id; the rest is its chunk's number

Ids = npt.NDArray[np.uint64]


class Name(NamedTuple):
    """A chunk: the `part`th of the `unit`th group of units of a source, most of which have one."""

    source: int
    unit: int
    part: int

    def __str__(self) -> str:
        return f"{self.source:03d}-{self.unit:06d}-{self.part:05d}"


def gathered(found: Sequence[Unit], size: int) -> list[list[Unit]]:
    """Neighbours together up to so many bytes as stored; a unit that is larger, or of unknown size, by itself."""
    groups: list[list[Unit]] = []
    left = 0
    for unit in found:
        if groups and 0 < unit.size <= left and len(groups[-1]) < LARGEST_GROUP:
            groups[-1].append(unit)
            left -= unit.size
        else:
            groups.append([unit])
            left = size - unit.size if unit.size else 0
    return groups


class ReadUnit(msgspec.Struct, frozen=True):
    """What the reading of one group of units gave."""

    chunks: list[tuple[int, int]]  # documents and bytes of text of each
    rejected: dict[str, int]  # records left out, by reason
    broken: list[str] = []  # its files of which the rest was lost
    notes: dict[str, int] = {}  # of the documents: see shards.format.manifest


class BuildPlan(msgspec.Struct, frozen=True):
    """What a working directory was begun for."""

    key: str
    inputs: list[str]  # the fingerprint of each source's files


@dataclass(frozen=True, eq=False)
class Work:
    """The working directory of one build, and what the build says."""

    build: Build
    key: str

    @property
    def root(self) -> Path:
        return Path(self.build.out, DIRECTORY)

    @property
    def sources(self) -> tuple[Source, ...]:
        return self.build.data.source

    @property
    def has_steps(self) -> bool:
        """Whether anything is done to documents before they are encoded; else there is no working directory."""
        return self.build.data.clean is not None

    @property
    def clean(self) -> Clean:
        assert self.build.data.clean is not None
        return self.build.data.clean

    @cached_property
    def inputs(self) -> list[list[list[Unit]]]:
        """The units of each source, small ones together: a task for each of a million files would take longer than its work."""
        return [gathered(units(source), self.clean.chunk_bytes // GATHERED) for source in self.sources]

    def path(self, step: str, name: object, end: str) -> Path:
        """A task's file."""
        return self.root / step / f"{name}{end}"

    def begin(self, steps: list[str], beside: Iterable[Source] = ()) -> None:
        """Go on with what is there if it was begun for the same build and files; else begin anew, with all of OUT.

        beside: text that is not encoded but decides what is.
        """
        plan = self._plan(beside)
        path = self.root / PLAN
        try:
            found = msgspec.json.decode(path.read_bytes(), type=BuildPlan)
        except (OSError, msgspec.MsgspecError):
            found = None
        if found != plan:
            self.remove()
            self._remove_made()
        for step in steps:
            (self.root / step).mkdir(parents=True, exist_ok=True)
        if found != plan:
            write_atomically(path, msgspec.json.encode(plan))

    def _plan(self, beside: Iterable[Source]) -> BuildPlan:
        return BuildPlan(self.key, [fingerprint(source) for source in (*self.sources, *beside)])

    def refuse_changed(self, beside: Iterable[Source] = ()) -> None:
        """Raises ShardError where files are not those that the build was begun for. Arguments as of `begin`."""
        found = [*self.sources, *beside]
        path = self.root / PLAN
        try:
            before = msgspec.json.decode(path.read_bytes(), type=BuildPlan).inputs
        except (OSError, msgspec.MsgspecError) as error:
            raise ShardError(f"{path}: {error} (give the same command again: the build begins anew)") from None
        for source, one, other in zip(found, before, self._plan(beside).inputs, strict=True):
            if one != other:
                raise changed(source)

    def _remove_made(self) -> None:
        """Whatever of OUT was made of other text: a tokenizer or a source's shards of before would not fit the rest."""
        out = Path(self.build.out)
        for path in sorted(out.iterdir()):
            if path.name == "models" or (path / "train").is_dir() or (path / "held_out").is_dir():
                shutil.rmtree(path)
            elif path.name in MADE:
                path.unlink()

    def remove(self) -> None:
        """All of it; ends with a directory that is gone, or was never there."""
        if self.root.exists():
            (self.root / PLAN).unlink(missing_ok=True)  # first: without it, what is left is never gone on with
            shutil.rmtree(self.root)

    def unit(self, source: int, unit: int) -> ReadUnit:
        path = self.path("read", f"{source:03d}-{unit:06d}", ".json")
        return msgspec.json.decode(checksummed_files.load_bytes(path), type=ReadUnit)

    @cached_property
    def units(self) -> list[tuple[int, int, ReadUnit]]:
        """What was read, in order: source, unit, result. All of it must be there."""
        names = [path.stem.split("-") for path in (self.root / "read").glob("*.json")]
        places = sorted((int(source), int(unit)) for source, unit in names)
        return [(source, unit, self.unit(source, unit)) for source, unit in places]

    @cached_property
    def chunks(self) -> list[Name]:
        """All chunks that were read, in order; a chunk's place here is its number. Those that were made come later."""
        return [Name(source, unit, part) for source, unit, read in self._read for part in range(len(read.chunks))]

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """Documents and bytes of text of each of them."""
        return [size for _, _, read in self._read for size in read.chunks]

    @cached_property
    def _read(self) -> list[tuple[int, int, ReadUnit]]:
        return [unit for unit in self.units if self.sources[unit[0]].origin != "made"]

    @cached_property
    def all_sizes(self) -> dict[Name, int]:
        """Bytes of text of every chunk, in order, made ones included."""
        return {Name(source, unit, part): size for source, unit, read in self.units for part, (_, size) in enumerate(read.chunks)}

    @property
    def documents(self) -> int:
        return sum(documents for documents, _ in self.sizes)

    def chunk(self, number: int, step: str = "read") -> DocumentChunk:
        return DocumentChunk(self.path(step, self.chunks[number], ".docs"))

    def names(self, source: int) -> Iterator[Name | Path]:
        """For each unit of a source the file with what was left out of it, then its chunks."""
        for of, unit, read in self.units:
            if of == source:
                yield self.path("read", f"{source:03d}-{unit:06d}", ".rejected.jsonl")
                yield from (Name(source, unit, part) for part in range(len(read.chunks)))

    def funnel(self, source: int) -> Funnel:
        """What became of a source's documents; known once they are clean."""
        paths = [self.path("clean", name, ".json") for name in self.names(source) if isinstance(name, Name)]
        return together(msgspec.json.decode(checksummed_files.load_bytes(path), type=Funnel) for path in paths)

    def of_source(self, source: int) -> list[Name]:
        """A source's chunks."""
        return [name for name in self.all_sizes if name.source == source]
