"""Batches: what each row holds, that nothing is lost or read twice, and what a checkpoint's state refuses."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.common.errors import ShardError
from shards.format.corpus import Corpus
from shards.format.seekable_zstd import ColumnReader
from shards.sampling.batches import BatchFeed, ObjectiveKind, open_held_out
from shards.sampling.packing import best_fit, make, plan
from shards.sampling.prefetch import Prefetcher

TEXT = {"code": 2.0, "topics": 1.0}
RESTARTING = {(True, None), (True, True), (False, True)}
"""Settings, masked documents and restarting positions, with which positions begin anew."""


def plain_tokens(root: Path, source: str, split: str = "train") -> np.ndarray:
    """All tokens of a source, read without any of the code between the files and a batch."""
    manifest = json.loads((root / source / split / "manifest.json").read_text())
    parts = []
    for shard in manifest["shards"]:
        column = shard["columns"]["tokens"]
        reader = ColumnReader(root / source / split / column["file"], column["dtype"], manifest["frame_items"])
        parts.append(reader.read(0, reader.items))
    return np.concatenate(parts).astype(np.int64)


def same(a, b) -> bool:
    names = ("tokens", "targets", "mask", "segments", "positions")
    return a.samples == b.samples and all(np.array_equal(getattr(a, name), getattr(b, name)) for name in names)


def test_code_lies_in_several_shards(built: Path) -> None:
    """Else the tests below would not see windows that cross from one to the next."""
    assert len(Corpus(built, "code", "train").manifest.shards) > 2


def test_an_epoch_of_text_is_the_stream_cut_in_windows_each_once(built: Path) -> None:
    context = 200
    feed = BatchFeed(built, "train", "text", context, {"code": 1}, 7)
    stream = plain_tokens(built, "code")
    size = feed.samples_per_epoch("code")
    assert size == (len(stream) - 1) // context
    batch = feed.read(0, size)
    assert sorted(sample for _, _, sample in batch.samples) == list(range(size))
    assert [sample for _, _, sample in batch.samples] != list(range(size))
    for row, (name, epoch, sample) in enumerate(batch.samples):
        assert (name, epoch) == ("code", 0)
        window = stream[sample * context : sample * context + context + 1]
        assert np.array_equal(batch.tokens[row], window[:-1]) and np.array_equal(batch.targets[row], window[1:])


def test_segments_and_positions_begin_anew_at_each_document(built: Path) -> None:
    feed = BatchFeed(built, "train", "text", 300, {"topics": 1}, 0)
    bos, eos = feed.tokenizer.bos, feed.tokenizer.eos
    batch = feed.read(0, feed.samples_per_epoch("topics"))
    assert batch.segments.max() > 1
    for row in range(len(batch.tokens)):
        segment, position = 0, 0
        for place, token in enumerate(batch.tokens[row].tolist()):
            if token == bos and place:
                segment, position = segment + 1, 0
            assert (batch.segments[row, place], batch.positions[row, place]) == (segment, position)
            assert batch.mask[row, place] == (token != eos)
            position += 1


def test_without_document_masks_every_token_counts_and_documents_keep_their_numbers(built: Path) -> None:
    naive, masked = (
        BatchFeed(built, "train", "text", 300, {"topics": 1}, 0, masked_documents=m).read(0, 96) for m in (False, True)
    )
    assert (naive.mask == 1).all() and naive.segments.max() > 0
    assert (naive.positions == np.arange(300)).all()
    assert np.array_equal(naive.segments, masked.segments)
    assert naive.samples == masked.samples and np.array_equal(naive.tokens, masked.tokens)


@pytest.mark.parametrize("kind", ["text", "sft"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("restart", [None, False, True])
def test_masks_and_restarting_positions_go_together_in_every_way(
    built: Path, kind: ObjectiveKind, masked: bool, restart: bool | None
) -> None:
    source, context = {"text": "topics", "sft": "chat"}[kind], 300
    settings = {"masked_documents": masked, "restart_positions": restart}
    feed = BatchFeed(built, "train", kind, context, {source: 1}, 0, **settings)
    held = open_held_out(built, source, kind, context, **settings)
    usual = BatchFeed(built, "train", kind, context, {source: 1}, 0).read(0, 96)
    batch = feed.read(0, 96)
    assert np.array_equal(batch.tokens, usual.tokens) and np.array_equal(batch.targets, usual.targets)
    assert np.array_equal(batch.segments, usual.segments) and batch.segments.max() > 0
    assert np.array_equal(batch.mask, usual.mask) == (masked or kind == "sft")
    for found in (batch, held.read(0, len(held))):
        for row in range(len(found.tokens)):
            real = found.segments[row] >= 0
            begins = np.flatnonzero(np.diff(found.segments[row], prepend=-2))
            places = np.arange(context)
            wanted = (
                places - begins[np.searchsorted(begins, places, side="right") - 1] if (masked, restart) in RESTARTING else places
            )
            assert np.array_equal(found.positions[row, real], wanted[real])


def test_batches_have_the_promised_types(built: Path) -> None:
    batch = BatchFeed(built, "train", "text", 64, TEXT, 0).read(5, 9)
    assert batch.tokens.shape == batch.targets.shape == batch.mask.shape == batch.segments.shape == (4, 64)
    types = [getattr(batch, name).dtype for name in ("tokens", "targets", "mask", "segments", "positions")]
    assert types == [np.int64, np.int64, np.float32, np.int32, np.int32]
    assert len(batch.samples) == 4


@pytest.mark.parametrize("ranks", [1, 2, 3, 6, 12])
def test_ranks_together_read_what_one_would(built: Path, ranks: int) -> None:
    whole = BatchFeed(built, "train", "text", 128, TEXT, 0).read(24, 48)
    feeds = [BatchFeed(built, "train", "text", 128, TEXT, 0) for _ in range(ranks)]
    rows = []
    for start in (24, 36):
        each = 12 // ranks
        rows += [feed.read(start + rank * each, start + (rank + 1) * each).tokens for rank, feed in enumerate(feeds)]
    assert np.array_equal(np.concatenate(rows), whole.tokens)


def test_packed_rows_hold_every_conversation_once_and_learn_only_responses(built: Path) -> None:
    context = 150
    feed = BatchFeed(built, "train", "sft", context, {"chat": 1}, 0)
    corpus = Corpus(built, "chat", "train")
    made = plan(corpus, context)
    assert made.truncated > 0
    batch = feed.read(0, feed.samples_per_epoch("chat"))
    read = []
    for row in range(len(batch.tokens)):
        for segment in range(batch.segments[row].max() + 1):
            here = batch.segments[row] == segment
            tokens, mask = batch.tokens[row, here], batch.mask[row, here]
            assert np.array_equal(batch.positions[row, here], np.arange(here.sum()))
            read.append(tokens.tobytes())
            # Learned are the targets from the first after <|assistant|> on, to the end.
            begin = int(np.flatnonzero(tokens == feed.tokenizer.reserved["<|assistant|>"])[0])
            assert np.array_equal(mask, np.arange(here.sum()) >= begin)
        padding = batch.segments[row] < 0
        assert (batch.tokens[row, padding] == feed.tokenizer.pad).all() and (batch.mask[row, padding] == 0).all()
    spans = [corpus.span(document) for document in range(corpus.documents)]
    wanted = [corpus.read(a, min(b, a + context + 1))[:-1].astype(np.int64).tobytes() for a, b in spans]
    assert sorted(read) == sorted(wanted)


def test_packing_wastes_little(built: Path) -> None:
    feed = BatchFeed(built, "train", "sft", 256, {"chat": 1}, 0)
    batch = feed.read(0, feed.samples_per_epoch("chat"))
    assert (batch.segments >= 0).mean() > 0.9


@given(st.lists(st.integers(1, 100), max_size=300))
def test_packed_rows_never_overflow_and_lose_nothing(costs: list[int]) -> None:
    rows = best_fit(list(enumerate(costs)), 100)
    assert sorted(document for row in rows for document in row) == list(range(len(costs)))
    loads = [sum(costs[document] for document in row) for row in rows]
    assert all(load <= 100 for load in loads)
    assert sum(load <= 50 for load in loads) <= 1  # two half-empty rows would have been one


def test_long_conversations_are_dropped_where_asked_and_counted(built: Path) -> None:
    corpus = Corpus(built, "chat", "train")
    long = int((corpus.lengths() > 151).sum())
    cut, dropped = make(corpus, 150, "truncate"), make(corpus, 150, "drop")
    assert long > 0 and dropped.dropped == long and dropped.truncated == 0
    assert cut.truncated + cut.dropped == long
    assert len(dropped.documents) == corpus.documents - long


def test_a_plan_is_made_once_the_same_everywhere_and_not_needed_on_disk(built: Path, copied: Path) -> None:
    for path in copied.glob("chat/train/pack-*"):
        path.unlink()
    a = plan(Corpus(copied, "chat", "train"), 200)
    files = list(copied.glob("chat/train/pack-*"))
    assert len(files) == 1
    stamp = files[0].stat().st_mtime_ns
    b = plan(Corpus(copied, "chat", "train"), 200)
    assert files[0].stat().st_mtime_ns == stamp
    assert np.array_equal(a.documents, b.documents) and np.array_equal(a.row_ends, b.row_ends)
    raw = files[0].read_bytes()
    files[0].unlink()
    plan(Corpus(copied, "chat", "train"), 200)
    assert files[0].read_bytes() == raw


def test_a_damaged_plan_is_refused(copied: Path) -> None:
    plan(Corpus(copied, "chat", "train"), 200)
    path = next(copied.glob("chat/train/pack-200-*"))
    raw = bytearray(path.read_bytes())
    raw[40] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ShardError, match="pack-200"):
        plan(Corpus(copied, "chat", "train"), 200)


def test_pairs_are_chosen_rows_then_rejected_rows_with_one_prompt(built: Path) -> None:
    feed = BatchFeed(built, "train", "preference", 200, {"pairs": 1}, 0)
    batch = feed.read(10, 16)
    assert batch.tokens.shape == (12, 200) and len(batch.samples) == 6
    text = feed.tokenizer.decode
    for row in range(6):
        prompts, answers = [], []
        for place in (row, row + 6):
            learned = batch.mask[place] > 0
            first = int(np.argmax(learned))
            prompts.append(text(batch.tokens[place, : first + 1], reserved=True))
            answers.append(text(batch.targets[place, learned], reserved=True))
        assert prompts[0] == prompts[1] and prompts[0].startswith("<|user|>") and prompts[0].endswith("<|assistant|>")
        assert answers[0] != answers[1] and all(answer.endswith("[EOS]") for answer in answers)


def test_a_pair_too_long_loses_its_prompts_beginning_not_its_responses(built: Path) -> None:
    wide = BatchFeed(built, "train", "preference", 2000, {"pairs": 1}, 0).read(0, 100)
    context = int((wide.mask > 0).sum(axis=1).max()) + 3
    narrow = BatchFeed(built, "train", "preference", context, {"pairs": 1}, 0).read(0, 100)
    assert (narrow.segments[:, -1] >= 0).any()  # some did not fit
    for row in range(200):
        assert np.array_equal(wide.targets[row, wide.mask[row] > 0], narrow.targets[row, narrow.mask[row] > 0])
    tiny = BatchFeed(built, "train", "preference", 4, {"pairs": 1}, 0).read(0, 20)
    assert (tiny.mask.sum(axis=1) >= 1).all()


def test_prompts_end_where_the_assistant_begins(built: Path) -> None:
    feed = BatchFeed(built, "train", "prompt", 100, {"pairs": 1, "chat": 1}, 0)
    for prompt, row in zip(feed.prompts(0, 20), feed.read(0, 20).tokens, strict=True):
        assert prompt[-1] == feed.tokenizer.reserved["<|assistant|>"]
        assert np.array_equal(row[: len(prompt)], prompt)


def test_a_restored_feed_reads_on_as_if_never_stopped(built: Path) -> None:
    feed = BatchFeed(built, "train", "text", 128, TEXT, 0)
    feed.reweight(100, {"topics": 1})
    state = msgspec.msgpack.decode(msgspec.msgpack.encode(feed.state()))
    other = BatchFeed(built, "train", "text", 128, {"code": 1}, 0)
    other.restore(state)
    assert same(other.read(90, 120), feed.read(90, 120))


def test_a_mixture_may_name_a_source_that_was_not_read_before(built: Path) -> None:
    feed = BatchFeed(built, "train", "text", 128, {"code": 1}, 0)
    feed.reweight(10, {"topics": 1})
    assert {name for name, _, _ in feed.read(0, 20).samples[10:]} == {"topics"}
    assert set(feed.digests) == {"code", "topics"}


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("context", 256, "context"),
        ("tokenizer", "0" * 32, "tokenizer"),
        ("digests", {"code": "0" * 32}, r"code/train: manifest \w+, but the checkpoint was made from 000"),
        ("digests", {"gone": "0" * 32}, 'no source "gone"'),
        ("order", None, "no data order"),
        ("packing", 99, "packing"),
    ],
)
def test_a_state_of_other_data_is_refused(built: Path, key: str, value: object, message: str) -> None:
    feed = BatchFeed(built, "train", "text", 128, TEXT, 0)
    before = feed.read(0, 4)
    with pytest.raises(ShardError, match=message):
        feed.restore({**feed.state(), key: value})
    assert same(feed.read(0, 4), before)


def test_another_tokenizer_in_the_place_of_the_shards_own_is_refused(copied: Path) -> None:
    from shards.tokenization.tokenizer import train

    (copied / "tokenizer.model").write_bytes(train(["some other text entirely"] * 9, vocab=300))
    with pytest.raises(ShardError, match="made with tokenizer"):
        BatchFeed(copied, "train", "text", 128, TEXT, 0)


def test_swapped_shards_are_refused(copied: Path) -> None:
    a, b = (copied / f"code/train/tokens-0000{number}.zst" for number in (0, 1))
    shutil.move(a, copied / "x")
    shutil.move(b, a)
    shutil.move(copied / "x", b)
    feed = BatchFeed(copied, "train", "text", 128, {"code": 1}, 0)
    with pytest.raises(ShardError, match=r"tokens-0000\d\.zst.*manifest"):
        feed.read(0, 50)


def test_a_manifest_changed_by_hand_is_refused(copied: Path) -> None:
    path = copied / "code/train/manifest.json"
    path.write_text(path.read_text().replace('"documents": 5', '"documents": 6', 1))
    with pytest.raises(ShardError, match="does not match its digest"):
        BatchFeed(copied, "train", "text", 128, {"code": 1}, 0)


def test_a_source_of_another_kind_is_refused(built: Path) -> None:
    with pytest.raises(ShardError, match='kind "sft", but the stage needs "text"'):
        BatchFeed(built, "train", "text", 128, {"chat": 1}, 0)


def test_an_unknown_source_is_refused_and_the_known_ones_named(built: Path) -> None:
    with pytest.raises(ShardError, match="chat, code, pairs, topics"):
        BatchFeed(built, "train", "text", 128, {"novels": 1}, 0)


def test_held_out_text_is_read_to_its_last_token(built: Path) -> None:
    held = open_held_out(built, "code", "text", 100, masked_documents=False)
    stream = plain_tokens(built, "code", "held_out")
    batch = held.read(0, len(held))
    assert np.array_equal(batch.targets[batch.segments >= 0], stream[1:])
    assert batch.mask.sum() == len(stream) - 1 == held.token_count() - 1


def test_held_out_samples_are_the_same_at_every_evaluation_and_end(built: Path) -> None:
    held = open_held_out(built, "pairs", "preference", 100, limit=5)
    assert len(held) == 5
    assert [sample for _, _, sample in held.read(3, 99).samples] == [3, 4]
    assert same(held.read(0, 3), open_held_out(built, "pairs", "preference", 100).read(0, 3))


def test_nothing_held_out_is_a_length_of_nothing(tmp_path: Path, make_spec) -> None:
    from shards.build.build import build
    from shards.spec import Source, TokenizerSpec

    sources = (
        Source(name="text", kind="text", origin="stdlib-topics", max_documents=9),
        Source(name="chat", kind="sft", origin="stdlib-sft", max_documents=9),
    )
    root = build(make_spec(tmp_path / "o", source=sources, held_out=0, tokenizer=TokenizerSpec(vocab=350)), workers=0)
    for name, kind in (("text", "text"), ("chat", "sft"), ("chat", "prompt")):
        held = open_held_out(root, name, kind, 64)
        assert len(held) == 0 and held.read(0, 8).tokens.shape == (0, 64)


def test_decode_shows_a_past_sample_as_the_model_saw_it(built: Path) -> None:
    feed = BatchFeed(built, "train", "preference", 200, {"pairs": 1}, 0)
    chosen, rejected = feed.decode(3).split("[EOS]")[:2]
    assert chosen.startswith("<|user|>") and rejected.strip().startswith("<|user|>")
    text = BatchFeed(built, "train", "text", 50, {"code": 1}, 0)
    assert text.decode(9) == text.tokenizer.decode([*text.read(9, 10).tokens[0], text.read(9, 10).targets[0, -1]], reserved=True)


def prefetch_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("shards-prefetch")]


def test_a_prefetcher_gives_what_the_feed_would_through_a_change_of_mixture(built: Path) -> None:
    feed, plain = (BatchFeed(built, "train", "text", 128, TEXT, 0) for _ in range(2))
    with Prefetcher(feed, 8) as ahead:
        assert same(ahead.read(0, 8), plain.read(0, 8))
        assert same(ahead.read(8, 16), plain.read(8, 16))
        assert ahead._ahead is not None
        ahead._ahead[2].result()  # the next batch was read with the old mixture
        for each in (feed, plain):
            each.reweight(16, {"topics": 1})
        assert same(ahead.read(16, 24), plain.read(16, 24))
        assert same(ahead.read(0, 8), plain.read(0, 8))  # a rollback


def test_a_prefetchers_thread_ends_with_it(built: Path) -> None:
    ahead = Prefetcher(BatchFeed(built, "train", "text", 128, TEXT, 0), 8)
    ahead.read(0, 8)
    assert prefetch_threads()
    ahead.close()
    assert not prefetch_threads()


def test_a_prefetchers_error_reaches_the_reader(copied: Path) -> None:
    feed = BatchFeed(copied, "train", "text", 128, {"topics": 1}, 0)
    for path in copied.glob("topics/train/tokens-*"):
        path.write_bytes(b"")
    with Prefetcher(feed, 8) as ahead, pytest.raises(ShardError):
        ahead.read(0, 8)
