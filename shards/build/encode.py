"""Step `encode`: a chunk's clean documents as tokens, ready for whoever writes the shards."""

from __future__ import annotations

import bisect
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from shards.build.checksummed_files import lines, load_arrays, load_bytes, save_bytes
from shards.build.chunks import DocumentChunk, StoredDocument
from shards.build.workspace import Name, Work
from shards.common.arrays import Array
from shards.readers.sources import KEPT_ASIDE, Rejected
from shards.tokenization.encode import Encoded, encode, notes, refusal
from shards.tokenization.records import Document
from shards.tokenization.templates import kept
from shards.tokenization.tokenizer import FILE_NAME, Tokenizer

BATCH = 1 << 20  # characters encoded at once
LONGEST_LABEL = 80  # characters; with a source's name before it, it is still a directory's
MADE = {"held out": 0, "trained on": 2**64 - 1}
"""The hash of what is made, by its key: what is made of held-out documents is held out, and nothing else."""


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """One encoded document. `hash`: of its key, by which it is held out or not."""

    hash: int
    label: str
    tokens: Array
    mask: npt.NDArray[np.uint8] | None
    text_bytes: int

    def hashed(self, seed: int) -> int:
        """Of its key, with the build's seed, which was known when it was encoded."""
        return self.hash


class _Sidecar(msgspec.Struct):
    labels: list[str]
    refused: list[Rejected]
    notes: dict[str, int] = {}


@lru_cache(maxsize=1)
def _tokenizer(path: Path, changed: int) -> Tokenizer:
    return Tokenizer(path.read_bytes(), str(path), kept(path))


class Encoding:
    """One task a chunk: NAME.npz with all documents' tokens, one after the other, and what they were refused for."""

    name = "encode"
    about = "encoding"

    def tasks(self, work: Work) -> list[Name]:
        return list(work.all_sizes)

    def weight(self, work: Work, task: Name) -> int:
        return work.all_sizes[Name(*task)]

    def output(self, work: Work, task: Name) -> Path:
        return work.path(self.name, Name(*task), ".npz")

    def do(self, work: Work, task: Name) -> None:
        name = Name(*task)
        source = work.sources[name.source]
        model = Path(work.build.out, FILE_NAME)
        tokenizer = _tokenizer(model, model.stat().st_mtime_ns)
        labels: list[str] = []
        hashes: list[int] = []
        refused: list[Rejected] = []
        noted: Counter[str] = Counter()
        encoded: list[Encoded] = []
        batch: list[Document] = []
        size = 0

        def flush() -> None:
            nonlocal batch, size
            if batch:
                encoded.append(encode(tokenizer, source.kind, batch))
                if source.split_by == "length":
                    labels.extend(of_length(length, source.lengths) for length in encoded[-1].lengths)
            batch, size = [], 0

        for found in DocumentChunk(work.path("clean", name, ".docs")):
            document = found.document()
            if reason := refusal(tokenizer, source.kind, document):
                refused.append(Rejected(document.where or source.name, reason, "\n".join(document.parts)[:KEPT_ASIDE]))
                continue
            noted.update(notes(tokenizer, source.kind, document))
            hashes.append(MADE[document.key] if source.origin == "made" else document.hashed(work.build.seed))
            if source.split_by != "length":
                labels.append(_directory(found.label) if source.split_by else "")
            batch.append(document)
            size += sum(map(len, document.parts))
            if size >= BATCH:
                flush()
        flush()
        sidecar = msgspec.json.encode(_Sidecar(labels, refused, dict(noted)))
        save_bytes(work.path(self.name, name, ".json"), sidecar)
        _save(self.output(work, task), encoded, hashes, source.kind != "text")


def _save(path: Path, encoded: list[Encoded], hashes: list[int], masked: bool) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {
        "tokens": np.concatenate([each.tokens for each in encoded]) if encoded else np.empty(0, np.uint16),
        "lengths": np.array([length for each in encoded for length in each.lengths], np.uint64),
        "text_bytes": np.array([size for each in encoded for size in each.text_bytes], np.uint64),
        "hashes": np.array(hashes, np.uint64),
    }
    if masked:
        found = [each.mask for each in encoded if each.mask is not None]
        arrays["mask"] = np.concatenate(found) if found else np.empty(0, np.uint8)
    whole = io.BytesIO()
    np.savez(whole, allow_pickle=False, **arrays)
    save_bytes(path, whole.getbuffer())


def _directory(label: str) -> str:
    """A label as a part of a directory's name."""
    name = re.sub(r"[^a-z0-9_+#-]+", "-", label.lower()).strip("-") or "none"
    return name if len(name) <= LONGEST_LABEL else f"{name[: LONGEST_LABEL - 17]}-{xxhash.xxh3_64_hexdigest(name.encode())}"


def of_length(tokens: int, lengths: Sequence[int]) -> str:
    """The label of a document's length: "to8192", "to32768", "over131072"."""
    place = bisect.bisect_left(lengths, tokens)
    return f"to{lengths[place]}" if place < len(lengths) else f"over{lengths[-1]}"


def labels(work: Work, source: int) -> list[str]:
    """The labels by which a source is split, known once it is encoded; of one that is not split, an empty one.

    An empty one too where no document is left: what was left out must have a place.
    """
    if not work.sources[source].split_by:
        return [""]
    sidecars = (_sidecar(work, name) for name in work.names(source) if isinstance(name, Name))
    found = {label for sidecar in sidecars for label in sidecar.labels}
    by_length = work.sources[source].split_by == "length"
    return sorted(found, key=lambda label: (len(label), label) if by_length else (0, label)) or [""]


def notes_of(work: Work, source: int) -> Counter[str]:
    """What is to be counted of a source's documents, known once it is encoded."""
    found: Counter[str] = Counter()
    for of, _, read in work.units:
        if of == source:
            found.update(read.notes)
    for name in work.of_source(source):
        found.update(_sidecar(work, name).notes)
    return found


def _sidecar(work: Work, name: Name) -> _Sidecar:
    return msgspec.json.decode(load_bytes(work.path("encode", name, ".json")), type=_Sidecar)


def encoded_documents(work: Work, source: int, label: str, first: bool) -> Iterator[EncodedDocument | Rejected]:
    """A source's documents of one label, encoded, in order.

    What was left out, when it was read or encoded, comes with the first label.
    """
    for name in work.names(source):
        if isinstance(name, Path):
            if first:
                yield from (msgspec.json.decode(line, type=Rejected) for line in lines(name))
            continue
        sidecar = _sidecar(work, name)
        if first:
            yield from sidecar.refused
        arrays = load_arrays(work.path("encode", name, ".npz"))
        tokens, mask = arrays["tokens"], arrays.get("mask")
        ends = np.cumsum(arrays["lengths"], dtype=np.int64).tolist()
        sizes, hashes = arrays["text_bytes"].tolist(), arrays["hashes"].tolist()
        start = 0
        for stop, size, hashed, of in zip(ends, sizes, hashes, sidecar.labels, strict=True):
            if of == label:
                yield EncodedDocument(hashed, of, tokens[start:stop], None if mask is None else mask[start:stop], size)
            start = stop


def concatenated(batch: list[EncodedDocument]) -> Encoded:
    """Documents one after the other."""
    masks = [each.mask for each in batch if each.mask is not None]
    return Encoded(
        tokens=np.concatenate([each.tokens for each in batch]) if batch else np.empty(0, np.uint16),
        mask=np.concatenate(masks) if masks else None,
        lengths=[len(each.tokens) for each in batch],
        text_bytes=[each.text_bytes for each in batch],
    )


def clean_documents(work: Work, source: int) -> Iterator[StoredDocument]:
    """A source's clean documents, in order."""
    for name in work.of_source(source):
        yield from DocumentChunk(work.path("clean", name, ".docs"))
