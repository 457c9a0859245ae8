"""Damage of any of a source's files, the manifest too, never passes for data."""

from __future__ import annotations

import itertools
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from shards.common.arrays import Array
from shards.common.errors import ShardError
from shards.format import manifest
from shards.format.corpus import Corpus
from shards.sampling.batches import BatchFeed

FLIPS = 2000
CUTS = 200
Read = tuple[bytes, bytes, bytes]


def everything(root: Path, source: str) -> Read:
    """All tokens, ends and masks, read past no check."""
    corpus = Corpus(root, source, "train")
    parts: list[Array] = [corpus.read(0, corpus.tokens), corpus.ends(0, corpus.documents), corpus.read(0, corpus.tokens, "mask")]
    tokens, ends, mask = (part.tobytes() for part in parts)
    return tokens, ends, mask


def passes_for_data(root: Path, source: str, whole: Read) -> bool:
    """Whether something else than the whole can be read, or a change goes unnoticed by reading and by verify alike."""
    try:
        if everything(root, source) != whole:
            return True
    except ShardError:
        return False
    return not list(manifest.verify(root / source / "train"))


@pytest.fixture
def chat(built: Path, tmp_path: Path) -> Path:
    """The sft source, whose shards have all three columns, with the tokenizer."""
    shutil.copytree(built / "chat" / "train", tmp_path / "chat" / "train", ignore=shutil.ignore_patterns("pack-*"))
    shutil.copy(built / "tokenizer.model", tmp_path)
    return tmp_path


def files(root: Path) -> list[Path]:
    return sorted(path for path in (root / "chat" / "train").iterdir() if path.is_file())


def test_the_files_are_a_manifest_and_three_columns(chat: Path) -> None:
    assert {path.name.split("-")[0] for path in files(chat)} == {"manifest.json", "tokens", "ends", "mask"}


@pytest.mark.parametrize("seed", range(4))
def test_two_thousand_single_bit_flips_never_pass_for_data(chat: Path, seed: int) -> None:
    whole, rng = everything(chat, "chat"), random.Random(seed)
    raws = {path: path.read_bytes() for path in files(chat)}
    for _ in range(FLIPS // 4):
        path = rng.choice(list(raws))
        bit = rng.randrange(8 * len(raws[path]))
        damaged = bytearray(raws[path])
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        if passes_for_data(chat, "chat", whole):
            # A manifest's blanks say nothing, so that one may turn into another: what it says must be the very same.
            assert path.name == manifest.FILE_NAME, (path.name, bit)
            assert everything(chat, "chat") == whole and manifest.load(path.parent).digest == manifest_digest(raws[path])
        path.write_bytes(raws[path])


def manifest_digest(raw: bytes) -> str:
    import msgspec

    digest: str = msgspec.json.decode(raw)["digest"]
    return digest


def test_files_cut_short_grown_or_missing_never_pass_for_data(chat: Path) -> None:
    whole, rng = everything(chat, "chat"), random.Random(9)
    for path in files(chat):
        raw = path.read_bytes()
        for length in [0, 1, len(raw) // 2, len(raw) - 2, *rng.sample(range(len(raw) - 1), CUTS // 4)]:
            path.write_bytes(raw[:length])
            assert not passes_for_data(chat, "chat", whole), (path.name, length)
        if path.name != manifest.FILE_NAME:
            path.write_bytes(raw + b"\0")
            assert not passes_for_data(chat, "chat", whole)
        path.unlink()
        assert not passes_for_data(chat, "chat", whole)
        path.write_bytes(raw)
    assert everything(chat, "chat") == whole


def test_files_and_manifests_in_each_others_places_are_refused(copied: Path) -> None:
    places = [copied / source / split for source in ("chat", "pairs", "code") for split in ("train", "held_out")]
    whole = everything(copied, "chat")
    for name in ("tokens-00000.zst", "ends-00000.zst", "mask-00000.zst", manifest.FILE_NAME):
        for a, b in itertools.combinations([place / name for place in places if (place / name).exists()], 2):
            if places[0] not in (a.parent, b.parent):
                continue
            x, y = a.read_bytes(), b.read_bytes()
            a.write_bytes(y), b.write_bytes(x)
            assert not passes_for_data(copied, "chat", whole), (a, b)
            a.write_bytes(x), b.write_bytes(y)
    directory = copied / "chat" / "train"
    for a, b in itertools.permutations(("tokens-00000.zst", "ends-00000.zst", "mask-00000.zst"), 2):
        x = (directory / a).read_bytes()
        (directory / a).write_bytes((directory / b).read_bytes())
        assert not passes_for_data(copied, "chat", whole), (a, b)
        (directory / a).write_bytes(x)
    assert everything(copied, "chat") == whole


def test_what_is_held_out_is_not_trained_on_though_the_whole_directories_changed_places(copied: Path) -> None:
    source = copied / "code"
    (source / "train").rename(source / "x")
    (source / "held_out").rename(source / "train")
    (source / "x").rename(source / "held_out")
    with pytest.raises(ShardError, match=r"code/train: its manifest is that of code/held_out \("):
        BatchFeed(copied, "train", "text", 64, {"code": 1}, 0)


def test_a_disk_that_errs_raises_with_the_place_and_reads_on_when_it_is_well_again(
    chat: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno
    import os

    corpus, pread = Corpus(chat, "chat", "train"), os.pread
    whole = corpus.read(0, corpus.tokens)
    corpus = Corpus(chat, "chat", "train")

    def failing(handle: int, count: int, offset: int) -> bytes:
        if offset < 4000 and offset + count > 1000:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(handle, count, offset)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", failing)
        with pytest.raises(ShardError, match=r"tokens-00000\.zst: cannot be read at byte \d+: Input/output error"):
            corpus.read(0, corpus.tokens)
    assert np.array_equal(corpus.read(0, corpus.tokens), whole)


def test_a_damaged_file_that_is_replaced_is_read_by_the_same_corpus(chat: Path) -> None:
    """A reader that has the damaged file open would go on refusing it."""
    path = chat / "chat/train/tokens-00000.zst"
    raw = path.read_bytes()
    damaged = bytearray(raw)
    damaged[60] ^= 1
    path.write_bytes(damaged)
    corpus = Corpus(chat, "chat", "train")
    with pytest.raises(ShardError, match="frame 0"):
        corpus.read(0, 10)
    (chat / "new").write_bytes(raw)
    (chat / "new").replace(path)
    assert len(corpus.read(0, 10)) == 10
