"""Evaluation texts are found in documents by n-grams of words, and an index survives its file."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.common.errors import ShardError, SpecError
from shards.filters.contamination import NgramIndex, words
from shards.filters.settings import Contamination

LONG = "A train leaves the station at nine, and another one, twice as fast, leaves it at ten. When do they meet on the way?"
SHORT = "Which is the largest planet of our solar system?"
TINY = "Is water wet?"
SETS = {"maths": [LONG, TINY], "facts": [SHORT]}
FILLER = " ".join(f"word{i}" for i in range(50))


@pytest.fixture(scope="module")
def index() -> NgramIndex:
    return NgramIndex.build(SETS, Contamination())


def test_an_evaluation_text_is_found_whatever_its_case_and_punctuation(index: NgramIndex) -> None:
    found = index.find(f"{FILLER} {LONG.upper().replace(',', ' --')} {FILLER}")
    assert found.items == {"maths": [0]}
    assert found.share == pytest.approx(len(words(LONG)) / (len(words(LONG)) + 100))
    assert index.judge(found) == "contamination: maths"


def test_thirteen_words_in_a_row_are_enough_and_twelve_are_not(index: NgramIndex) -> None:
    tokens = LONG.split()
    assert index.find(f"{FILLER} {' '.join(tokens[4:17])} {FILLER}").items == {"maths": [0]}
    assert index.find(f"{FILLER} {' '.join(tokens[4:16])} {FILLER}").items == {}


def test_a_text_of_eight_to_twelve_words_is_looked_for_whole(index: NgramIndex) -> None:
    assert index.find(f"{FILLER} {SHORT} {FILLER}").items == {"facts": [0]}
    assert index.find(f"{FILLER} {SHORT[6:]} {FILLER}").items == {}


def test_a_text_of_fewer_than_eight_words_is_left_alone(index: NgramIndex) -> None:
    assert index.find(f"{FILLER} {TINY} {FILLER}").items == {}


def test_a_passage_of_two_sets_names_both() -> None:
    index = NgramIndex.build({"b": [LONG], "a": [FILLER, LONG]}, Contamination())
    assert index.find(LONG).items == {"a": [1], "b": [0]}


def test_reporting_keeps_the_document_and_so_does_a_small_share() -> None:
    document = f"{FILLER} {LONG}"
    reporting = NgramIndex.build(SETS, Contamination(mode="report"))
    assert reporting.find(document).items == {"maths": [0]}
    assert reporting.judge(reporting.find(document)) == ""
    lenient = NgramIndex.build(SETS, Contamination(min_share=0.5))
    assert lenient.judge(lenient.find(document)) == ""
    assert lenient.judge(lenient.find(LONG)) == "contamination: maths"


def test_a_saved_index_finds_the_same_and_its_bytes_are_the_same(index: NgramIndex, tmp_path: Path) -> None:
    index.save(tmp_path / "one")
    NgramIndex.build(dict(reversed(SETS.items())), Contamination()).save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = NgramIndex.load(tmp_path / "one")
    for text in (LONG, SHORT, FILLER):
        assert loaded.find(text) == index.find(text)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw + b"x", lambda raw: raw[5:], lambda raw: b""])
def test_a_damaged_index_is_refused_by_name(index: NgramIndex, tmp_path: Path, damage: object) -> None:
    index.save(tmp_path / "index")
    (tmp_path / "index").write_bytes(damage((tmp_path / "index").read_bytes()))  # type: ignore[operator]
    with pytest.raises(ShardError, match=r"index.*build it again"):
        NgramIndex.load(tmp_path / "index")


def test_an_index_of_nothing_finds_nothing() -> None:
    assert NgramIndex.build({"none": []}, Contamination()).find(LONG).items == {}


@given(
    text=st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=60).map(" ".join),
    items=st.lists(st.lists(st.sampled_from(["a", "b", "c", "d"]), max_size=8).map(" ".join), max_size=6),
)
def test_findings_are_those_of_a_search_of_every_place(text: str, items: list[str]) -> None:
    settings = Contamination(ngram=5, least=3)
    found = NgramIndex.build({"set": items}, settings).find(text)
    tokens, covered, numbers = text.split(), set(), set()
    for number, item in enumerate(items):
        wanted = item.split()
        n = min(5, len(wanted))
        if n < 3:
            continue
        for begin in range(len(wanted) - n + 1):
            for place in range(len(tokens) - n + 1):
                if tokens[place : place + n] == wanted[begin : begin + n]:
                    covered |= set(range(place, place + n))
                    numbers.add(number)
    assert found.items == ({"set": sorted(numbers)} if numbers else {})
    assert found.share == pytest.approx(len(covered) / len(tokens) if tokens else 0)


def test_other_scripts_lose_their_punctuation_too() -> None:
    assert words("¿Qué — «hora» es? 你好，世界。 Don't") == ["qué", "hora", "es", *"你好世界", "dont"]


@pytest.mark.parametrize("settings", [Contamination(least=14), Contamination(least=1), Contamination(ngram=65)])
def test_lengths_that_cannot_work_are_refused(settings: Contamination) -> None:
    with pytest.raises(SpecError, match=re.escape("data.contamination: least is")):
        settings.check("data.contamination")


def test_it_reads_over_five_megabytes_a_second(index: NgramIndex) -> None:
    from pydoc_data.topics import topics

    text = "\n".join(topics.values()) * 4
    index.find(text)
    began = time.process_time()
    index.find(text)
    assert len(text) / 1e6 / (time.process_time() - began) > 5


CHINESE = "下列关于古代水利工程的说法中正确的是哪一项请从四个选项中选出最合适的答案并说明理由。"
JAPANESE = "次の文章を読んで、古い橋が川のどちら側から作られ始めたのかを、理由とともに四十字以内で説明しなさい。"
KANA = "インターネットのつながりがわるいときは、まずルーターのでんげんをきってから、もういちどいれてみましょう。"
THAI = "รถไฟขบวนหนึ่งออกจากสถานีเวลาเก้านาฬิกาและอีกขบวนหนึ่งออกเวลาสิบนาฬิกาด้วยความเร็วเป็นสองเท่าทั้งสองขบวนจะพบกันเมื่อใด"
AROUND = {
    CHINESE: ("第3页。考试题目：", "答案在下一页。老桥在河上，"),
    JAPANESE: ("第三ページ。問題：", "答えは次のページにあります。"),
    KANA: ("よくあるしつもん。", "それでもだめなら、おといあわせください。"),
    THAI: ("หน้าที่สาม ข้อสอบ ", " คำตอบอยู่ในหน้าถัดไป"),
}


@pytest.mark.parametrize("text", list(AROUND), ids=["chinese", "japanese", "kana", "thai"])
def test_an_evaluation_text_in_a_script_without_spaces_is_found_inside_a_clause(text: str) -> None:
    index = NgramIndex.build({"exam": [text], "facts": [SHORT]}, Contamination())
    before, after = AROUND[text]
    assert index.find(before + text + after).items == {"exam": [0]} and index.too_short == [0, 0]
    assert index.find(before + text[3:-3] + after).items == {"exam": [0]}, "a part of it is enough"
    assert index.find((before + after) * 20).items == {}
    assert index.find(f"{FILLER} {SHORT}").items == {"facts": [0]}


def test_a_name_of_thirteen_characters_is_no_match_where_thirteen_characters_are_three_words() -> None:
    index = NgramIndex.build({"exam": ["เมืองหลวงของประเทศไทยคือกรุงเทพมหานครและมีแม่น้ำเจ้าพระยาไหลผ่านกลางเมือง"]}, Contamination())
    assert index.too_short == [0]
    assert index.find("เขาเดินทางไปกรุงเทพมหานครเมื่อวานนี้เพื่อเยี่ยมเพื่อนเก่าของเขา").items == {}
    kana = NgramIndex.build({"exam": ["インターネットプロトコルスイートとはなにかをせつめいしなさい"]}, Contamination())
    assert kana.find("あのひとはインターネットプロトコルスイートをしらない").items == {}


def test_an_index_says_how_many_texts_are_too_short_to_be_looked_for(tmp_path: Path) -> None:
    index = NgramIndex.build({"maths": [LONG, TINY, "水是湿的吗？"], "tiny": [TINY]}, Contamination())
    index.save(tmp_path / "index")
    assert NgramIndex.load(tmp_path / "index").too_short == index.too_short == [2, 1]
