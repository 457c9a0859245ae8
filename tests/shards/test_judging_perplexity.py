"""The n-gram model is the one of the papers' formulas, kenlm scores it as they say, and likely text reads likelier."""

from __future__ import annotations

import math
import random
import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.common.errors import ShardError, SpecError
from shards.filters.kneser_ney import discounts
from shards.filters.perplexity import Scorer, judge, sentences, train
from shards.filters.settings import Perplexity

pytest.importorskip("kenlm", reason="kenlm is not installed (make setup)")

Gram = tuple[str, ...]


class Direct:
    """The same model by dictionaries and recursion, straight from the formulas."""

    def __init__(self, texts: list[str], order: int, vocabulary: int, min_count: int) -> None:
        lines = [line.split(" ") for text in texts for line in sentences(text)]
        frequent = Counter(word for line in lines for word in line)
        known = set(sorted(frequent, key=lambda word: (-frequent[word], word))[:vocabulary])
        lines = [["<s>", *(word if word in known else "<unk>" for word in line), "</s>"] for line in lines]
        self.order, self.known = order, known
        self.events = [*known, "<unk>", "</s>"]
        times: list[Counter[Gram]] = [Counter() for _ in range(order + 1)]
        for line in lines:
            for n in range(1, order + 1):
                times[n].update(tuple(line[at : at + n]) for at in range(len(line) - n + 1))
        self.adjusted: list[dict[Gram, int]] = [{}]
        for n in range(1, order + 1):
            if n == order:
                self.adjusted.append(dict(times[n]))
                continue
            before = Counter(gram[1:] for gram in times[n + 1])
            self.adjusted.append({gram: times[n][gram] if gram[0] == "<s>" else before[gram] for gram in times[n]})
        self.adjusted[1].pop(("<s>",), None)
        self.kept = [{gram for gram in times[n] if n <= 2 or times[n][gram] >= min_count} for n in range(order + 1)]
        self.discount = [np.zeros(4)] + [discounts(np.array(list(self.adjusted[n].values()) or [0])) for n in range(1, order + 1)]
        self.follow: list[dict[Gram, list[Gram]]] = [defaultdict(list) for _ in range(order + 1)]
        for n in range(1, order + 1):
            for gram in self.adjusted[n]:
                self.follow[n][gram[:-1]].append(gram)

    def probability(self, context: Gram, word: str) -> float:
        n = len(context) + 1
        below = 1 / len(self.events) if n == 1 else self.probability(context[1:], word)
        grams = self.follow[n].get(context, [])
        total = sum(self.adjusted[n][gram] for gram in grams)
        if not total:
            return below
        cut = self.discount[n]
        left = sum(cut[min(self.adjusted[n][gram], 3)] if gram in self.kept[n] else self.adjusted[n][gram] for gram in grams)
        gram = (*context, word)
        count = self.adjusted[n].get(gram, 0) if gram in self.kept[n] else 0
        return float((count - cut[min(count, 3)]) / total + left / total * below)

    def log10(self, sentence: str) -> float:
        words = ["<s>", *(word if word in self.known else "<unk>" for word in sentence.split(" ")), "</s>"]
        places = range(1, len(words))
        return sum(math.log10(self.probability(tuple(words[max(0, at - self.order + 1) : at]), words[at])) for at in places)


def topics() -> list[str]:
    from pydoc_data.topics import topics as texts

    return [texts[name] for name in sorted(texts)]


@pytest.fixture(scope="module")
def reference() -> list[str]:
    return [text[:3000] for text in topics()[:12]]


CASES = [(2, 10_000, 1), (3, 10_000, 1), (5, 10_000, 2), (4, 60, 1), (3, 60, 3)]


@pytest.mark.parametrize(("order", "vocabulary", "min_count"), CASES)
def test_kenlm_scores_what_the_formulas_say(
    order: int, vocabulary: int, min_count: int, reference: list[str], tmp_path: Path
) -> None:
    settings = Perplexity(order=order, vocabulary=vocabulary, min_count=min_count)
    trained = train(reference, settings, tmp_path / "model.arpa")
    assert len(trained.ngrams) == order
    direct, scorer = Direct(reference, order, vocabulary, min_count), Scorer(tmp_path / "model.arpa")
    draw = random.Random(1)
    lines = [line for text in topics()[:20] for line in sentences(text)]
    for line in draw.sample(lines, 25):
        words = line.split(" ")
        for sentence in (line, " ".join(draw.sample(words, len(words))), "quite unheard-of xyzzy " + line):
            expected = direct.log10(" ".join(sentences(sentence)))
            length = len(next(sentences(sentence)).split(" ")) + 1
            assert math.log10(scorer.perplexity(sentence)) == pytest.approx(-expected / length, rel=1e-4)


@pytest.mark.parametrize(("order", "vocabulary", "min_count"), CASES)
def test_probabilities_after_any_words_sum_to_one(
    order: int, vocabulary: int, min_count: int, reference: list[str], tmp_path: Path
) -> None:
    import kenlm

    train(reference, Perplexity(order=order, vocabulary=vocabulary, min_count=min_count), tmp_path / "model.arpa")
    model = kenlm.Model(str(tmp_path / "model.arpa"))
    unigrams = re.search(r"\\1-grams:\n(.*?)\n\n", (tmp_path / "model.arpa").read_text(), re.S)
    assert unigrams is not None
    words = [line.split("\t")[1] for line in unigrams.group(1).split("\n")]
    draw = random.Random(2)
    lines = [line.split(" ") for text in reference for line in sentences(text)]
    for _ in range(12):
        line = draw.choice(lines)
        history = line[: draw.randint(0, min(len(line), order + 1))] + draw.choice([[], ["xyzzy"]])
        state, after = kenlm.State(), kenlm.State()
        model.BeginSentenceWrite(state)
        for word in history:
            model.BaseScore(state, word, after)
            state, after = after, state
        total = sum(10 ** model.BaseScore(state, word, after) for word in words if word != "<s>")
        assert total == pytest.approx(1, abs=1e-3)


def test_text_like_the_reference_reads_likelier_than_the_same_words_shuffled(tmp_path: Path) -> None:
    texts = topics()
    train(texts[::2], Perplexity(), tmp_path / "model.arpa")
    scorer, draw = Scorer(tmp_path / "model.arpa"), random.Random(3)
    others = [text for text in texts[1::2] if len(text) > 500][:20]
    for text in others:
        words = text.split()
        assert scorer.perplexity(text) < scorer.perplexity(" ".join(draw.sample(words, len(words))))


def test_the_same_reference_gives_the_same_bytes(reference: list[str], tmp_path: Path) -> None:
    first = train(reference, Perplexity(), tmp_path / "one")
    assert first == train(iter(reference), Perplexity(), tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_no_more_words_are_read_than_asked_for(reference: list[str], tmp_path: Path) -> None:
    trained = train(reference, Perplexity(max_words=500), tmp_path / "model")
    assert not trained.whole
    assert 500 <= trained.words < 2000


def test_pruning_leaves_out_rare_long_n_grams_only(reference: list[str], tmp_path: Path) -> None:
    whole = train(reference, Perplexity(order=4, min_count=1), tmp_path / "whole").ngrams
    pruned = train(reference, Perplexity(order=4, min_count=2), tmp_path / "pruned").ngrams
    assert pruned[:2] == whole[:2]
    assert pruned[2] < whole[2] / 2 and pruned[3] < whole[3] / 2


def test_a_reference_of_one_short_line_still_makes_a_model(tmp_path: Path) -> None:
    trained = train(["yes"], Perplexity(), tmp_path / "model")
    assert trained.ngrams[0] == 4
    assert Scorer(tmp_path / "model").perplexity("yes") < Scorer(tmp_path / "model").perplexity("no")


def test_a_text_without_words_is_infinitely_unlikely_and_breaks_nothing(reference: list[str], tmp_path: Path) -> None:
    train(reference, Perplexity(), tmp_path / "model")
    assert Scorer(tmp_path / "model").perplexity(" \n\t ") == math.inf


def test_words_are_lower_case_with_digits_zeroed_and_symbols_and_han_alone() -> None:
    text = "It's 3.50 in 2024,\n\n中文 İstanbul\tfoo_bar हिन्दी\ud800"
    assert list(sentences(text)) == ["it ' s 0 . 00 in 0000 ,", "中 文 i̇stanbul foo _ bar हिन्दी�"]


@given(text=st.text(max_size=200))
def test_sentences_never_hold_what_kenlm_takes_for_a_break(text: str) -> None:
    for sentence in sentences(text):
        assert sentence == " ".join(sentence.split())
        assert not set(sentence) & set("\n\r\t")


def test_an_empty_reference_and_a_file_that_is_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match='the reference "books" has no words'):
        train(["", " \n"], Perplexity(reference="books"), tmp_path / "model")
    (tmp_path / "broken").write_text("no model")
    with pytest.raises(ShardError, match=r"broken: kenlm cannot read the model.*train it again"):
        Scorer(tmp_path / "broken")


def test_bounds_refuse_what_lies_outside() -> None:
    settings = Perplexity(max_perplexity=500, min_perplexity=10)
    assert [judge(value, settings) for value in (600, 5, 100, math.inf)] == [
        "perplexity: too high",
        "perplexity: too low",
        "",
        "perplexity: too high",
    ]
    assert judge(math.inf, Perplexity()) == ""
    for wrong in (Perplexity(order=7), Perplexity(min_count=0), Perplexity(min_perplexity=9, max_perplexity=5)):
        with pytest.raises(SpecError, match=r"data\.perplexity"):
            wrong.check("data.perplexity")
