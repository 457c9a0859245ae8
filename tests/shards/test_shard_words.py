"""Encoding by words gives just the ids that encoding whole texts gives."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.readers import stdlib
from shards.tokenization import word_cache
from shards.tokenization.tokenizer import Tokenizer, train

TEXTS = [path.read_bytes().decode("utf-8", "replace") for _, path in stdlib.files()][:300:3]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train(TEXTS, vocab=3000))


def whole(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[int], list[int]]:
    """Text by text, by SentencePiece's own reading of all of it."""
    found = [[tokenizer.bos, *tokenizer.encode(text), tokenizer.eos] for text in texts]
    return [number for each in found for number in each], [len(each) for each in found]


def test_the_librarys_texts_have_the_same_ids(tokenizer: Tokenizer) -> None:
    assert tokenizer._words is not None
    ids, lengths = tokenizer.encode_texts(TEXTS)
    assert (ids.tolist(), lengths) == whole(tokenizer, TEXTS)


pieces = st.sampled_from(
    [" ", "  ", "\n", "\t", "\r\n", "def ", "self.", "é", "世界", "🎉", "\x00", "\u2581", "\u00a0", "the", "<|user|>"]
)


@given(st.lists(st.lists(st.one_of(pieces, st.text(max_size=8)), max_size=12).map("".join), max_size=4))
def test_strange_texts_have_the_same_ids(tokenizer: Tokenizer, texts: list[str]) -> None:
    ids, lengths = tokenizer.encode_texts(texts)
    assert (ids.tolist(), lengths) == whole(tokenizer, texts)


def test_texts_that_are_cut_have_the_same_ids(tokenizer: Tokenizer) -> None:
    texts = ["x" * 200_000, "word " * 40_000, "a line\n" * 30_000, " " * 100_000]
    ids, lengths = tokenizer.encode_texts(texts)
    assert (ids.tolist(), lengths) == whole(tokenizer, texts)


def test_forgetting_changes_nothing(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_cache, "KEPT", 100)
    fresh = Tokenizer(tokenizer.model)
    for text in TEXTS[:10]:
        ids, _ = fresh.encode_texts([text])
        assert np.array_equal(ids, tokenizer.encode_texts([text])[0])
    assert fresh._words is not None and len(fresh._words._slots) < 5000


def test_models_whose_words_cannot_be_told_apart_are_read_whole(tokenizer: Tokenizer) -> None:
    unigram = Tokenizer(train(TEXTS[:40], vocab=800, kind="unigram"))
    assert unigram._words is None
    ids, lengths = unigram.encode_texts(TEXTS[:5])
    assert (ids.tolist(), lengths) == whole(unigram, TEXTS[:5])
