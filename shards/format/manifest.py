"""`manifest.json`: what the shards of one source and split hold, by hashes, and where their text came from.

A source's shards lie in ROOT/SOURCE/SPLIT, the splits being `train` and `held_out`. The manifest's own `digest` is over
all the rest of it, so one short string in a checkpoint stands for every byte of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import xxhash

from shards.common.decoding import Count, DecodeError, json_as, shown
from shards.common.errors import ShardError
from shards.common.files import write_atomically
from shards.format.seekable_zstd import DTYPES, ColumnFile, ColumnReader
from shards.spec import Kind

FORMAT = 1
MOST_FRAME_ITEMS = 1 << 24  # `frame_tokens` is at most this
FILE_NAME = "manifest.json"
SPLITS = ("train", "held_out")


class Shard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One shard: its columns, files of equal standing. Documents never cross shards."""

    tokens: Count
    documents: Count
    columns: dict[str, ColumnFile]  # "tokens"; "ends": a document's end, in tokens of this shard; "mask": see Manifest


class SplitManifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The manifest of one source and split: everything about its shards except their content."""

    format: int = FORMAT
    source: str
    split: str  # train or held_out
    kind: Kind
    origin: str  # where the text came from
    tokenizer: str  # xxh3_128 of the tokenizer's model file, and of its chat template if that is not the default one, hex
    vocab: Count  # ids of the tokenizer
    dtype: str  # of the tokens: uint16 up to 65,536 ids, else uint32
    frame_items: Count  # items in a zstd frame
    tokens: Count
    documents: Count
    text_bytes: Count  # bytes of UTF-8 that the tokens stand for
    rejected: dict[str, Count]  # records that were left out, by reason; of the whole source, the same in both splits
    shards: tuple[Shard, ...]
    notes: dict[str, Count] = {}  # notes on records that were kept, with their number, such as fields that were not read
    # The mask column: for sft 1 where the assistant speaks, else 0; for preference 0 prompt, 1 chosen, 2 rejected;
    # for unpaired 0 prompt, and the response 1 where it is a good example, 2 where it is a bad one.
    digest: str = ""

    def computed_digest(self) -> str:
        """xxh3_128, hex, of this manifest's JSON with sorted keys, no spaces, an empty digest, and no empty `notes`."""
        plain = msgspec.to_builtins(msgspec.structs.replace(self, digest=""))
        if not self.notes:  # a later addition: without notes, digests are those of older manifests
            del plain["notes"]
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode(plain, order="sorted"))

    def save(self, directory: Path) -> SplitManifest:
        """Write it, digest filled in, to `directory`; returned as written."""
        full = msgspec.structs.replace(self, digest=self.computed_digest())
        plain = msgspec.to_builtins(full)
        if not self.notes:
            del plain["notes"]
        raw = msgspec.json.format(msgspec.json.encode(plain, order="sorted"), indent=1)
        write_atomically(directory / FILE_NAME, raw + b"\n")
        return full


def load(directory: Path) -> SplitManifest:
    """The manifest in `directory`, verified against its own digest; ShardError otherwise."""
    path = directory / FILE_NAME
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ShardError(f"{path}: {error.strerror} (build the shards, or correct the path)") from None
    try:
        version = json_as(raw, _Version).format
        if version != FORMAT:
            raise ShardError(f"{path}: format {version}, this release reads format {FORMAT} (build the shards again)")
        manifest = json_as(raw, SplitManifest)
    except DecodeError as error:
        raise ShardError(f"{path}: not a manifest: {error} (restore it, or build the shards again)") from None
    if manifest.computed_digest() != manifest.digest:
        raise ShardError(f"{path}: its content does not match its digest (restore it, or build the shards again)")
    problem = _contradiction(manifest)
    if problem:
        raise ShardError(f"{path}: {problem} (restore it, or build the shards again)")
    return manifest


class _Version(msgspec.Struct):
    format: int


def _contradiction(manifest: SplitManifest) -> str | None:
    """A contradiction in a manifest, or an impossible value: a matching digest does not exclude them."""
    if manifest.split not in SPLITS or not 1 <= manifest.frame_items <= MOST_FRAME_ITEMS:
        return f"split {shown(manifest.split)} in frames of {manifest.frame_items} items is not valid"
    for number, shard in enumerate(manifest.shards):
        problem = _shard_problem(shard, manifest)
        if problem:
            return f"shard {number}: {problem}"
    for what in ("tokens", "documents"):
        if sum(getattr(shard, what) for shard in manifest.shards) != getattr(manifest, what):
            return f"its {what} are not the sums over its shards"
    return None


def _shard_problem(shard: Shard, manifest: SplitManifest) -> str | None:
    items = {"tokens": shard.tokens, "ends": shard.documents, "mask": shard.tokens}
    needed = {"tokens", "ends"} if manifest.kind == "text" else set(items)
    if not needed <= shard.columns.keys() <= items.keys():
        return f"its columns are {shown(sorted(shard.columns))}, those of {manifest.kind} are {', '.join(sorted(needed))}"
    for name, column in shard.columns.items():
        if "/" in column.file or column.file.startswith(".") or not column.file.isprintable() or not 0 < len(column.file) < 256:
            return f"names a file outside its directory: {shown(column.file)}"
        if column.dtype not in (DTYPES if name != "tokens" else (manifest.dtype,)) or column.dtype not in DTYPES:
            return f"column {name} is of type {shown(column.dtype)}"
        if column.items != items[name]:
            return f"column {name} has {column.items} items, not {items[name]}"
    return None


def verify(directory: Path, *, full: bool = True, tell: Callable[[int], None] = lambda count: None) -> Iterator[str]:
    """Yield a message for each fault of the shards of one manifest; nothing if they are intact.

    Not full: checks that files exist with the right size and seek table. Full: checks every byte by hash, every frame, and
    that each shard's columns agree with each other. tell: called with the number of bytes after each read.
    """
    try:
        manifest = load(directory)
    except ShardError as error:
        yield str(error)
        return
    for shard in manifest.shards:
        readers: dict[str, ColumnReader] = {}
        try:
            for name, column in shard.columns.items():
                path = directory / column.file
                try:
                    readers[name] = ColumnReader(path, column.dtype, manifest.frame_items, known=column)
                except ShardError as error:
                    yield str(error)
            if full:
                bad = False
                for name, reader in readers.items():
                    for message in _verify_file(reader, shard.columns[name], tell):
                        bad = True
                        yield message
                if not bad and len(readers) == len(shard.columns):
                    yield from _verify_shard(readers, shard, manifest)
        finally:
            for reader in readers.values():
                reader.close()


def _verify_file(reader: ColumnReader, column: ColumnFile, tell: Callable[[int], None]) -> Iterator[str]:
    found = False
    for message in reader.damaged(tell):
        found = True
        yield message
    if not found and reader.hash() != column.hash:
        yield f"{reader.path}: its hash is not the manifest's (restore the file, or build it again)"


def _verify_shard(readers: dict[str, ColumnReader], shard: Shard, manifest: SplitManifest) -> Iterator[str]:
    tokens, ends = readers["tokens"], readers["ends"]
    where = str(tokens.path)
    if tokens.items != shard.tokens or ends.items != shard.documents:
        yield f"{where}: {tokens.items} tokens, {ends.items} documents, but the manifest says otherwise"
    if "mask" in readers and readers["mask"].items != tokens.items:
        yield f"{readers['mask'].path}: {readers['mask'].items} items for {tokens.items} tokens"
    before = 0
    for number in range(ends.frames):
        frame = ends.decode_frame(number).astype(np.int64)
        if np.any(np.diff(frame, prepend=before) <= 0):
            yield f"{ends.path}: frame {number}: document ends are not ascending"
        before = int(frame[-1])
    if before != tokens.items:
        yield f"{ends.path}: the last document ends at {before}, the tokens at {tokens.items}"
    for number in range(tokens.frames):
        if int(tokens.decode_frame(number).max()) >= manifest.vocab:
            yield f"{where}: frame {number}: a token beyond the vocabulary of {manifest.vocab}"
