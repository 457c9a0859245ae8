"""What each rule refuses and lets pass, how text is split, and that long documents take no more than their share of time."""

from __future__ import annotations

import re
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.common.errors import SpecError
from shards.filters.heuristics import marks
from shards.filters.heuristics import text as splitting
from shards.filters.heuristics.families import C4, FineWeb, GopherQuality, GopherRepetition, Rules, Text, UniqueWords
from shards.filters.heuristics.marks import SYMBOLS

PROSE = (
    "The keeper of the light climbed the stairs each evening and lit the lamp that ships have steered by since his "
    "grandfather's days. He wrote down the hour, the wind and what passed to the north, with a short word on the weather.\n"
    "Nobody read these books, but to him they were the only proof that the nights had happened at all.\n"
    "In spring a letter came: the lamp would be lit by a clock from now on. He could stay, it said, if he liked the view.\n"
    "So he stayed, and of the first night without him on the stairs he wrote only that it had been clear.\n"
)
ALL = Rules(
    gopher_repetition=GopherRepetition(),
    gopher_quality=GopherQuality(),
    unique_words=UniqueWords(),
    c4=C4(),
    fineweb=FineWeb(),
)


def test_plain_prose_passes_every_family() -> None:
    kept, reason = ALL.apply(PROSE)
    assert reason == ""
    assert kept == PROSE.strip()


def test_without_families_every_text_is_kept_as_it_is() -> None:
    assert Rules().apply("x\n{}\ud800") == ("x\n{}\ud800", "")


def words(count: int) -> str:
    return " ".join(f"the{'abcdefgh'[i % 8]}{'ijklmnop'[i // 8 % 8]}{'qrstuvwx'[i // 64 % 8]} of to" for i in range(count // 3))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("the be to", "too few words"),
        (words(400_000).replace("\n", " "), "too many words"),
        ("a I a be to " * 20, "words too short"),
        ("incomprehensibilities the of to " * 5 + "incomprehensibilities " * 60, "words too long"),
        ("the cat and #tag to #other " * 15, "too many hash signs"),
        ("the cat… and dogs… to sea " * 15, "too many ellipses"),
        ("- the cat and dogs\n" * 20, "too many bullet lines"),
        ("the cat and all the many dogs and more of them to see...\n" * 20, "too many lines end in an ellipsis"),
        ("the 100 and 2000 to 300 200 " * 15, "too few words with letters"),
        ("cat dog " * 40, "too few stop words"),
    ],
    ids=lambda value: value[:20],
)
def test_gopher_quality_names_what_is_wrong(text: str, reason: str) -> None:
    assert Rules(gopher_quality=GopherQuality()).apply(text) == (text, f"gopher_quality: {reason}")


def test_a_text_of_symbols_only_is_refused_though_no_number_of_words_is_asked_for() -> None:
    assert Rules(gopher_quality=GopherQuality(min_words=0)).apply("*** !!!")[1] == "gopher_quality: only symbols"


def test_a_threshold_of_zero_turns_its_rule_off() -> None:
    off = GopherQuality(
        min_words=0, max_words=0, min_mean_word_length=0, max_mean_word_length=0, max_symbols=0, max_bullet_lines=0,
        max_ellipsis_lines=0, min_alphabetic_words=0, min_stop_words=0
    )  # fmt: skip
    assert Rules(gopher_quality=off).apply("- # # # ... 1")[1] == ""
    nothing = GopherRepetition(**dict.fromkeys(GopherRepetition.__struct_fields__, 0.0))
    assert Rules(gopher_repetition=nothing).apply("a a a a\n" * 99)[1] == ""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        ("one two three.\n\n" * 9, "duplicate paragraphs"),
        (f"{PROSE}\n\n" * 2 + "a\n\nb\n\nc", "characters in duplicate paragraphs"),
        ("Something or other is here.\n" * 9, "duplicate lines"),
        ("no no " * 4 + " ".join(f"word{i}" for i in range(3)), "top 2-gram"),
    ],
    ids=lambda value: value[:20],
)
def test_gopher_repetition_names_what_is_wrong(text: str, reason: str) -> None:
    found = Rules(gopher_repetition=GopherRepetition(duplicate_paragraphs=0.2)).apply(text)[1]
    assert found == f"gopher_repetition: {reason}"


def test_a_sentence_said_twice_is_found_by_its_repeated_n_grams() -> None:
    said = "he went down to the sea in a ship with nine men"
    others = " ".join(map(chr, range(0x4E00, 0x4E30)))
    text = f"First {said}, which was well. Then, as nobody had seen it, {said} again: {others}"
    rules = Rules(gopher_repetition=GopherRepetition(duplicate_5_grams=0.5, duplicate_6_grams=0.5))
    assert rules.apply(text)[1] == "gopher_repetition: duplicate 10-grams"


def test_few_unique_words_are_told_in_windows_however_long_the_text() -> None:
    rules = Rules(unique_words=UniqueWords(min_share=0.3, window=100))
    varied = " ".join(f"w{i % 60}" for i in range(100_000))  # 60 of 100 in each window, 60 of 100,000 in all
    assert rules.apply(varied)[1] == ""
    assert rules.apply("yes no maybe " * 50)[1] == "unique_words: too few unique words"


def test_c4_drops_lines_and_keeps_the_others() -> None:
    text = (
        "Home | About | Contact\n"
        "The first sentence stands here.[1]  And the second one! A third?\n"
        "Please enable JavaScript to go on.\n"
        "We use cookies, as all do.\n"
        "Too short.\n"
        "And so it goes on...\n"
        f"A line with {'x' * 1001} in it.\n"
        "He said: \"This is the fourth.\" And this 'the fifth.'\n"
        "Read our Privacy Policy with care, please.\n"
    )
    kept, reason = Rules(c4=C4()).apply(text)
    assert reason == ""
    assert kept == (
        "The first sentence stands here.  And the second one! A third?\nHe said: \"This is the fourth.\" And this 'the fifth.'"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("One is here. Two are here.", "too few sentences"),
        (PROSE + "Here is some lorem ipsum as ever.", "lorem ipsum"),
        (PROSE + "It ends in a brace { as code does.", "curly bracket"),
    ],
)
def test_c4_refuses_a_page_and_gives_it_back_whole(text: str, reason: str) -> None:
    assert Rules(c4=C4()).apply(text) == (text, f"c4: {reason}")


def test_c4_with_sentences_off_still_refuses_a_text_without_lines_left() -> None:
    assert Rules(c4=C4(min_sentences=0)).apply("menu\nhome")[1] == "c4: no lines left"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" \n\t\n", "empty"),
        ("no end of a sentence anywhere in this line\n" * 2, "too few lines end a sentence"),
        ("Short.\nLines.\nHere.\n", "too many short lines"),
        ("This line comes twice, and is long enough.\n" * 2, "characters in duplicate lines"),
        ("Words without a break are long enough here.\n" + "\n" * 30, "too many line breaks"),
    ],
)
def test_fineweb_names_what_is_wrong(text: str, reason: str) -> None:
    assert Rules(fineweb=FineWeb()).apply(text)[1] == f"fineweb: {reason}"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (GopherQuality(max_bullet_lines=1.5), "gopher_quality: max_bullet_lines is 1.5"),
        (GopherQuality(min_words=9, max_words=3), "no text would be kept"),
        (GopherQuality(min_stop_words=9), "stop_words has 8"),
        (GopherQuality(max_symbols=float("nan")), "max_symbols is nan"),
        (GopherRepetition(top_2_gram=-0.1), "top_2_gram is -0.1"),
        (C4(min_sentences=-1), "or 0 to turn the rule off"),
        (FineWeb(short_line=0), "short_line is 0"),
        (UniqueWords(window=0), "window is 0"),
    ],
)
def test_impossible_thresholds_are_refused_by_name(settings: object, message: str) -> None:
    family = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", type(settings).__name__).lower()
    rules = Rules(**{"fineweb" if family == "fine_web" else family: settings})
    with pytest.raises(SpecError, match=re.escape(message)):
        rules.check("recipe.toml: data.clean")


def naive(text: str) -> list[str]:
    """The same words by the definition, one stretch without white space after the other."""

    def is_part(char: str) -> bool:
        return char.isalnum() or char == "_" or unicodedata.category(char)[0] == "M"

    found: list[str] = []
    for stretch in text.split():
        parts = [place for place, char in enumerate(stretch) if is_part(char)]
        first, last = (parts[0], parts[-1] + 1) if parts else (len(stretch), len(stretch))
        symbols_before, symbols_after = (re.findall(r"\.+|-+|(?s:.)", side) for side in (stretch[:first], stretch[last:]))
        found += [*symbols_before, *([stretch[first:last]] if parts else []), *symbols_after]
    return found


@given(text=st.text(max_size=200) | st.text(alphabet="ab.- \n'\u0301é👍", max_size=200))
def test_words_are_what_the_definition_says(text: str) -> None:
    assert Text(text).tokens == naive(text)


@given(text=st.text(alphabet="ab.-, é\n", max_size=400), size=st.integers(1, 30))
def test_words_are_the_same_however_the_text_is_cut_into_blocks(text: str, size: int) -> None:
    whole = Text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "BLOCK", size)
        cut = Text(text)
        assert cut.tokens == whole.tokens
        for n in (1, 2, 5):
            assert cut.words.gram(n).tolist() == whole.words.gram(n).tolist()
            assert cut.words.spaced_gram(n).tolist() == whole.words.spaced_gram(n).tolist()


@given(left=st.lists(st.sampled_from(["a", "b", "ab", "\0", "é", "."]), max_size=8), gap=st.sampled_from([" ", "  "]))
def test_hashes_tell_words_apart_and_say_nothing_of_the_gaps(left: list[str], gap: str) -> None:
    one, other = Text(" ".join(left)).words, Text(gap.join(left) + gap).words
    assert one.spaced_gram(2).tolist() == other.spaced_gram(2).tolist()
    hashes = dict(zip(Text(" ".join(left)).tokens, one.gram(1).tolist(), strict=True))
    assert len(set(hashes.values())) == len(hashes)


def test_a_long_repetitive_document_takes_no_more_than_its_share_of_time() -> None:
    rules = Rules(gopher_repetition=GopherRepetition(**dict.fromkeys(GopherRepetition.__struct_fields__, 1.0)))

    def seconds(text: str) -> float:
        began = time.process_time()
        rules.apply(text)
        return time.process_time() - began

    seconds("é warm")
    line = "tomato toast to the moon and back to be of that with have "
    short = min(seconds(line * 2_000) for _ in range(3))
    long = seconds(line * 20_000)
    assert long < 40 * short + 0.2  # ten times the text; a quadratic rule would take a hundred times


def test_symbols_are_a_superset_of_the_ends_of_sentences() -> None:
    assert {".", "?", "!", "。", "؟", "।"} <= SYMBOLS


def test_a_line_of_fifty_megabytes_is_judged_in_bounded_memory() -> None:
    code = (
        "from shards.filters.heuristics.families import *\n"
        "text = 'x' * 20_000_000 + ' and the rest of it ' * 1_500_000\n"
        "rules = Rules(gopher_repetition=GopherRepetition(), gopher_quality=GopherQuality(), c4=C4(), fineweb=FineWeb())\n"
        "status = lambda: next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "peak = lambda: int(status().split()[1]) // 1024\n"  # not by getrusage, which counts the starting process's
        "before = peak()\n"
        "print(rules.apply(text)[1], peak() - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reason, _, megabytes = done.stdout.strip().rpartition(" ")
    assert reason == "gopher_repetition: top 2-gram"
    assert int(megabytes) < 1200


def test_the_tables_of_characters_hold_for_every_code_point() -> None:
    """Where nothing is assigned they are filled in at once; a Unicode that assigns something there would show here."""
    whole = np.fromiter(map(marks._kind, range(0x110000)), np.uint8, 0x110000)
    assert np.array_equal(marks.kinds(), whole)
    assert np.array_equal(marks.kinds(marks.BASIC), whole[: marks.BASIC])


LINES = PROSE.strip()
VERDICTS = {
    "prose": LINES,
    "lines again": LINES + "\n" + "\n".join(["The keeper of the light climbed the stairs each evening."] * 9),
    "short lines": "\n".join(f"The {n} keepers of it." for n in range(40)),
    "line breaks": "\n\n\n".join(LINES.split(". ")) + "\n" * 90,
    "paragraphs": "\n\n".join([PROSE.strip()] * 3 + [LINES]),
}


@pytest.mark.parametrize("name", VERDICTS)
@pytest.mark.parametrize("end", ["\r\n", "\r", "\u2028", "\u2029"], ids=["windows", "mac", "line", "paragraph"])
def test_every_family_gives_the_same_verdict_whatever_ends_a_line(name: str, end: str) -> None:
    text = VERDICTS[name]
    other = text.replace("\n", end)
    reasons = []
    for family in Rules.__struct_fields__:
        rules = Rules(**{family: getattr(ALL, family)})
        (kept, reason), (kept_too, reason_too) = rules.apply(text), rules.apply(other)
        assert reason_too == reason, family
        assert kept_too == (other if kept == text else kept), "and what a rule does not change stays as it was"
        reasons.append(reason)
    assert any(reasons) == (name != "prose")
