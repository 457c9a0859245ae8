"""The rules give the verdicts of datatrove's own filters, when those are handed the same words and sentences."""

from __future__ import annotations

import gzip
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from shards.filters.heuristics import c4
from shards.filters.heuristics.families import C4, FineWeb, GopherQuality, GopherRepetition, Rules, Text
from shards.filters.heuristics.text import unified

datatrove = pytest.importorskip("datatrove", reason="datatrove is not installed (make setup)")

FAMILIES = {
    "gopher_quality": Rules(gopher_quality=GopherQuality()),
    "gopher_repetition": Rules(gopher_repetition=GopherRepetition()),
    "c4": Rules(c4=C4()),
    "fineweb": Rules(fineweb=FineWeb()),
}
REPETITION = GopherRepetition(
    duplicate_lines=0.8,
    duplicate_paragraphs=0.8,
    duplicate_line_characters=0.8,
    top_2_gram=0.9,
    top_3_gram=0.7,
    top_4_gram=0.6,
    duplicate_5_grams=0.4,
    duplicate_6_grams=0.3,
)
LOOSE = {
    # Thresholds that small random texts can pass, so that the later rules of a family are reached.
    "gopher_quality": (
        Rules(gopher_quality=GopherQuality(min_words=3, min_mean_word_length=1, min_stop_words=1, min_alphabetic_words=0.5)),
        {"min_doc_words": 3, "min_avg_word_length": 1, "min_stop_words": 1, "max_non_alpha_words_ratio": 0.5},
    ),
    "gopher_repetition": (
        Rules(gopher_repetition=REPETITION),
        {
            "dup_line_frac": 0.8,
            "dup_para_frac": 0.8,
            "dup_line_char_frac": 0.8,
            "top_n_grams": ((2, 0.9), (3, 0.7), (4, 0.6)),
            "dup_n_grams": ((5, 0.4), (6, 0.3), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10)),
        },
    ),
    "c4": (Rules(c4=C4(min_sentences=1, min_line_words=2)), {"min_num_sentences": 1, "min_words_per_line": 2}),
    "fineweb": (
        Rules(fineweb=FineWeb(max_short_lines=0.9, short_line=5, max_duplicate_line_characters=0.4)),
        {"short_line_thr": 0.9, "short_line_length": 5, "char_duplicates_ratio": 0.4},
    ),
}
REASONS = {
    "": "",
    "gopher_quality: too few words": "gopher_short_doc",
    "gopher_quality: too many words": "gopher_long_doc",
    "gopher_quality: words too short": "gopher_below_avg_threshold",
    "gopher_quality: words too long": "gopher_above_avg_threshold",
    "gopher_quality: too many hash signs": "gopher_too_many_hashes",
    "gopher_quality: too many ellipses": "gopher_too_many_ellipsis",
    "gopher_quality: too many bullet lines": "gopher_too_many_bullets",
    "gopher_quality: too many lines end in an ellipsis": "gopher_too_many_end_ellipsis",
    "gopher_quality: too few words with letters": "gopher_below_alpha_threshold",
    "gopher_quality: too few stop words": "gopher_enough_stop_words",
    "gopher_repetition: empty": "empty",
    "gopher_repetition: duplicate paragraphs": "dup_para_frac",
    "gopher_repetition: characters in duplicate paragraphs": "dup_para_char_frac",
    "gopher_repetition: duplicate lines": "dup_line_frac",
    "gopher_repetition: characters in duplicate lines": "dup_line_char_frac",
    **{f"gopher_repetition: top {n}-gram": f"top_{n}_gram" for n in (2, 3, 4)},
    **{f"gopher_repetition: duplicate {n}-grams": f"duplicated_{n}_n_grams" for n in range(5, 11)},
    "c4: too few sentences": "too_few_sentences",
    "c4: curly bracket": "curly_bracket",
    "c4: lorem ipsum": "lorem_ipsum",
    "fineweb: empty": "empty",
    "fineweb: too few lines end a sentence": "line_punct_ratio",
    "fineweb: too many short lines": "short_line_ratio",
    "fineweb: characters in duplicate lines": "char_dup_ratio",
    "fineweb: too many line breaks": "list_ratio",
}

Theirs = Callable[[str, str, bool], tuple[str, str]]


@pytest.fixture(scope="module")
def theirs() -> Iterator[Theirs]:
    """datatrove's verdict: the text that it keeps, and its reason or ""."""
    from datatrove.data import Document
    from datatrove.pipeline.filters import c4_filters, fineweb_quality_filter, gopher_quality_filter, gopher_repetition_filter

    classes = {
        "gopher_quality": gopher_quality_filter.GopherQualityFilter,
        "gopher_repetition": gopher_repetition_filter.GopherRepetitionFilter,
        "c4": c4_filters.C4QualityFilter,
        "fineweb": fineweb_quality_filter.FineWebQualityFilter,
    }
    filters = {(name, False): make() for name, make in classes.items()}
    filters |= {(name, True): make(**LOOSE[name][1]) for name, make in classes.items()}

    def verdict(name: str, text: str, loose: bool) -> tuple[str, str]:
        document = Document(text=text, id="0")
        answer = filters[name, loose].filter(document)
        return (document.text, "") if answer is True else (text, answer[1])

    with pytest.MonkeyPatch.context() as patch:
        for module in (gopher_quality_filter, gopher_repetition_filter, fineweb_quality_filter):
            patch.setattr(module, "split_into_words", lambda text, language: Text(text).tokens)
        patch.setattr(c4_filters, "split_into_sentences", lambda line, language: [line] * c4.count_sentences(line))
        yield verdict


def real_texts() -> list[str]:
    """Prose, code, manual pages, licences and package descriptions of whatever machine this is."""
    packages = Path(sysconfig.get_paths()["purelib"])
    paths = [
        *sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::9],
        *sorted(packages.glob("*.dist-info/METADATA"))[::2],
        *sorted(packages.glob("*.dist-info/licenses/*"))[::3],
    ]
    texts = [path.read_text(errors="replace") for path in paths if path.is_file() and path.stat().st_size < 100_000]
    manuals = [path for path in sorted(Path("/usr/share/man").glob("*/*.gz"))[::400] if path.stat().st_size < 20_000]
    texts += [gzip.decompress(path.read_bytes()).decode(errors="replace") for path in manuals]
    from pydoc_data.topics import topics

    return texts + list(topics.values())[::2]


@pytest.mark.parametrize("family", FAMILIES)
def test_verdicts_on_real_text_are_datatroves(family: str, theirs: Theirs) -> None:
    seen: set[str] = set()
    texts = real_texts()
    assert len(texts) > 60
    for text in texts:
        kept, reason = FAMILIES[family].apply(text)
        assert (unified(kept), REASONS[reason]) == theirs(family, unified(text), False)
        seen.add(reason)
    assert len(seen) >= 3  # else the texts show nothing


PIECES = st.sampled_from(
    [
        *["a", "aa", "ab", "b", "the", "to", "of", "word", "longer-word", ".", "...", "…", "#", "- x", "• y", "{", "[1]", "İ"],
        *["java[2]script", "Lorem ipsum", "use cookies", "\n", "\n\n", "\n\n\n", " ", "  ", "\r\n", "\t", "\x85", "\u2028"],
        *["\x1c", "\0", "3.14", "e.g.", "ünïcode", "हिन्दी", "العربية؟", "中文。", "日本語", "ไทย", "\U0001f469\u200d\U0001f467"],
        *["a\u0301", "\ud800", "１", "_", "!?", 'end."', "Yes!", "don't"],
    ]
)
STRANGE = st.lists(PIECES, max_size=120).flatmap(lambda some: st.sampled_from(["".join(some), " ".join(some)]))


@pytest.mark.parametrize("loose", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
@given(text=STRANGE | st.text(max_size=300))
@example(text="")
@example(text="\n")
@example(text="\u2028")
@example(text=" a  aa a aa  a a a aa a aa a aa a")
@example(text="\n\nx\n\n\n\nx\n\nx\n")
def test_verdicts_on_strange_text_are_datatroves(family: str, loose: bool, text: str, theirs: Theirs) -> None:
    """Of the text with line feeds for all line ends, which is what our rules look at."""
    rules = LOOSE[family][0] if loose else FAMILIES[family]
    kept, reason = rules.apply(text)
    assert (unified(kept), REASONS[reason]) == theirs(family, unified(text), loose)


@given(words=st.lists(st.sampled_from(["a", "aa", "aaa", "b", "ab", "ba", "."]), min_size=5, max_size=200))
def test_repetition_of_run_together_words_is_datatroves(words: list[str], theirs: Theirs) -> None:
    # datatrove compares n words run together, so "a aa" repeats "aa a": the count must follow it there too.
    from datatrove.pipeline.filters.gopher_repetition_filter import find_all_duplicate, find_top_duplicate, get_n_grams

    from shards.filters.heuristics.gopher import repeated_gram_characters, top_gram_characters

    text = Text(" ".join(words))
    for n in range(2, 11):
        assert repeated_gram_characters(text.words, n) == find_all_duplicate(text.tokens, n)
        grams = get_n_grams(text.tokens, n)
        assert top_gram_characters(text.words, n) == (find_top_duplicate(grams) if grams else 0)
