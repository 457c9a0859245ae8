"""The tokens and documents of one source and split, across its shards, by number."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shards.common.arrays import Array
from shards.common.errors import ShardError
from shards.format.manifest import FILE_NAME, SplitManifest, load
from shards.format.seekable_zstd import Cache, ColumnReader
from shards.tokenization.tokenizer import FILE_NAME as TOKENIZER_FILE
from shards.tokenization.tokenizer import Tokenizer

OPEN_FILES = 96


class Corpus:
    """Reads one manifest's shards as one long stream. Files open when first read. Thread-safe.

    Tokens and documents are numbered from 0 through all shards, in storage order.
    """

    def __init__(self, root: Path, source: str, split: str, *, cache: Cache | None = None) -> None:
        self.directory = root / source / split
        self.manifest: SplitManifest = load(self.directory)
        if (self.manifest.source, self.manifest.split) != (source, split):
            other = f"{self.manifest.source}/{self.manifest.split}"
            raise ShardError(f"{self.directory}: its manifest is that of {other} (put both back in their places)")
        self._cache = cache if cache is not None else Cache()
        shards = self.manifest.shards
        self._token_starts = np.cumsum([0, *(shard.tokens for shard in shards)], dtype=np.int64)
        self._document_starts = np.cumsum([0, *(shard.documents for shard in shards)], dtype=np.int64)
        self._readers: OrderedDict[tuple[int, str], ColumnReader] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def tokens(self) -> int:
        return int(self._token_starts[-1])

    @property
    def documents(self) -> int:
        return int(self._document_starts[-1])

    def _reader(self, shard: int, column: str) -> ColumnReader:
        with self._lock:
            reader = self._readers.get((shard, column))
            if reader is None:
                known = self.manifest.shards[shard].columns[column]
                path = self.directory / known.file
                frame_items = self.manifest.frame_items
                reader = ColumnReader(path, known.dtype, frame_items, known=known, cache=self._cache)
                self._readers[shard, column] = reader
                if len(self._readers) > OPEN_FILES:
                    self._readers.popitem(last=False)  # closes with its last user, who may be another thread
            self._readers.move_to_end((shard, column))
            return reader

    @contextmanager
    def _reading(self, shard: int, column: str) -> Iterator[ColumnReader]:
        """A reader; let go of where it raises, so that a file put back in its place is what the next try reads."""
        reader = self._reader(shard, column)
        try:
            yield reader
        except ShardError:
            with self._lock:
                if self._readers.get((shard, column)) is reader:
                    del self._readers[shard, column]
            raise

    def read(self, start: int, stop: int, column: str = "tokens") -> Array:
        """Items [start, stop) of "tokens" or of "mask". IndexError outside [0, tokens]."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"{self.directory}: tokens {start} to {stop} of {self.tokens}")
        parts = []
        shard = int(np.searchsorted(self._token_starts, start, side="right")) - 1
        while start < stop:
            base, end = int(self._token_starts[shard]), int(self._token_starts[shard + 1])
            with self._reading(shard, column) as reader:
                parts.append(reader.read(start - base, min(stop, end) - base))
            start = min(stop, end)
            shard += 1
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, self.manifest.dtype), *parts])

    def ends(self, first: int, last: int) -> npt.NDArray[np.int64]:
        """Where documents [first, last) end, in tokens of the whole stream."""
        parts = [np.empty(0, np.int64)]
        shard = int(np.searchsorted(self._document_starts, first, side="right")) - 1
        while first < last:
            base, end = int(self._document_starts[shard]), int(self._document_starts[shard + 1])
            with self._reading(shard, "ends") as reader:
                local = reader.read(first - base, min(last, end) - base)
            parts.append(local.astype(np.int64) + self._token_starts[shard])
            first = min(last, end)
            shard += 1
        return np.concatenate(parts)

    def span(self, document: int) -> tuple[int, int]:
        """The tokens [start, stop) of one document."""
        if not 0 <= document < self.documents:
            raise IndexError(f"{self.directory}: document {document} of {self.documents}")
        ends = self.ends(max(document - 1, 0), document + 1)
        return (int(ends[0]) if document else 0), int(ends[-1])

    def document_at(self, token: int) -> int:
        """The number of the document that holds a token."""
        shard = int(np.searchsorted(self._token_starts, token, side="right")) - 1
        with self._reading(shard, "ends") as reader:
            local = reader.count_up_to(token - int(self._token_starts[shard]))
        return int(self._document_starts[shard]) + local

    def lengths(self) -> npt.NDArray[np.int64]:
        """The tokens of every document."""
        return np.diff(self.ends(0, self.documents), prepend=0)


def sources(root: Path, split: str = "train") -> list[str]:
    """The names of the sources that have shards under `root`."""
    return sorted(path.parent.parent.name for path in root.glob(f"*/{split}/{FILE_NAME}"))


def open_source(root: Path, name: str, split: str, tokenizer: Tokenizer, cache: Cache) -> Corpus:
    """A source, as the tokenizer beside it made it. ShardError where it is missing, or made with another."""
    known = sources(root, split)
    if name not in known:
        raise ShardError(f'{root}: there is no source "{name}" (there are: {", ".join(known) or "none; build them"})')
    corpus = Corpus(root, name, split, cache=cache)
    if corpus.manifest.tokenizer != tokenizer.hash:
        raise ShardError(
            f"{corpus.directory}: made with tokenizer {corpus.manifest.tokenizer[:12]}, but {root / TOKENIZER_FILE} is"
            f" {tokenizer.hash[:12]} (restore that tokenizer, or build the shards again)"
        )
    return corpus
