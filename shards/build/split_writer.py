"""Writes the shards of one source and split, one after the other, and keeps how far it got."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from shards.common.arrays import Array
from shards.common.files import TEMPORARY, write_atomically
from shards.format.manifest import Shard
from shards.format.seekable_zstd import ColumnWriter
from shards.readers.splits import quotas
from shards.spec import Data, Source
from shards.tokenization.tokenizer import Tokenizer, token_dtype

PROGRESS = "progress.json"


class Done(msgspec.Struct):
    """What one split has in whole shards."""

    shards: list[Shard] = []
    next_document: int = 0  # number, within the source, of the first document that is not in them
    text_bytes: int = 0


class SourceProgress(msgspec.Struct):
    """A source's progress.json: where a killed build goes on. Gone when the source is whole."""

    inputs: str  # the fingerprint of the source's files
    train: Done = msgspec.field(default_factory=Done)
    held_out: Done = msgspec.field(default_factory=Done)

    @classmethod
    def load(cls, directory: Path, inputs: str) -> SourceProgress:
        """What is there, if it was made from the same files; else a new beginning."""
        try:
            found = msgspec.json.decode((directory / PROGRESS).read_bytes(), type=cls)
        except (OSError, msgspec.MsgspecError):
            return cls(inputs)
        return found if found.inputs == inputs else cls(inputs)

    def save(self, directory: Path) -> None:
        write_atomically(directory / PROGRESS, msgspec.json.encode(self))


class SplitWriter:
    """Shards of one split. A context: left early, it removes the shard it was writing."""

    def __init__(
        self, directory: Path, source: Source, data: Data, tokenizer: Tokenizer, progress: SourceProgress, *, held_out: bool
    ) -> None:
        self.directory = directory
        self.name = "held_out" if held_out else "train"
        self.dtype = token_dtype(tokenizer.vocab)
        self.full = held_out and data.held_out == 0
        self._data = data
        self._masked = source.kind != "text"
        self._limit = quotas(source.max_tokens, data.held_out)[held_out]
        self._progress = progress
        self._done: Done = getattr(progress, self.name)
        self.next_document = self._done.next_document
        self.text_bytes = self._done.text_bytes
        self._last = self.next_document - 1
        self._open: ExitStack | None = None
        self._tokens = self._documents = 0  # of the shard being written
        self.tokens = sum(shard.tokens for shard in self.shards)
        self.documents = sum(shard.documents for shard in self.shards)

    @property
    def shards(self) -> list[Shard]:
        return self._done.shards

    def add(self, number: int, tokens: Array, mask: npt.NDArray[np.uint8] | None, text_bytes: int) -> None:
        """One document, the source's `number`th; ignored once it is full, which the first that does not fit makes it."""
        if self._limit is not None and self.tokens + len(tokens) > self._limit and self.documents:
            self.full = True
        if self.full:
            return
        if self._open is None:
            self._begin()
        self._token_column.append(tokens)
        if mask is not None:
            self._mask_column.append(mask)
        self._tokens += len(tokens)
        self._documents += 1
        self.tokens += len(tokens)
        self.documents += 1
        self._ends.append(self._tokens)
        self.text_bytes += text_bytes
        self._last = number
        if self._tokens >= self._data.shard_tokens:
            self.finish()

    def _begin(self) -> None:
        stack = self._open = ExitStack()
        number = len(self.shards)
        frame, level = self._data.frame_tokens, self._data.level

        def column(name: str, dtype: str) -> ColumnWriter:
            path = self.directory / f"{name}-{number:05d}.zst"
            return stack.enter_context(ColumnWriter(path, dtype, frame, level))

        self._token_column = column("tokens", self.dtype)
        self._ends: list[int] = []
        self._ends_column = column("ends", "uint64")
        if self._masked:
            self._mask_column = column("mask", "uint8")

    def finish(self) -> None:
        """End the shard being written, if any, and note it down."""
        if self._open is None:
            return
        self._ends_column.append(np.array(self._ends, np.uint64))
        columns = {"tokens": self._token_column.close(), "ends": self._ends_column.close()}
        if self._masked:
            columns["mask"] = self._mask_column.close()
        self._done.shards.append(Shard(tokens=self._tokens, documents=self._documents, columns=columns))
        self._done.next_document = self._last + 1
        self._done.text_bytes = self.text_bytes
        self._progress.save(self.directory.parent)
        self._open = None
        self._tokens = self._documents = 0

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> Any:
        if self._open is not None:
            self._open.close()
        for leftover in self.directory.glob(f"*{TEMPORARY}"):  # opened just as a signal came
            leftover.unlink()
