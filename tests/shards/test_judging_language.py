"""Languages are told by CLD2, whatever the text holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.common.errors import SpecError
from shards.filters.language import UNKNOWN, Detector, Guess, judge
from shards.filters.settings import Language

pytest.importorskip("pycld2", reason="pycld2 is not installed (make setup)")
DETECTOR = Detector()
TEXTS = {
    "en": "The ships came in with the evening tide, and nobody on the quay asked where they had been all those years.",
    "de": "Die Schiffe kamen mit der Abendflut, und niemand am Kai fragte, wo sie all die Jahre gewesen waren.",
    "fr": "Les navires rentrèrent avec la marée du soir, et personne sur le quai ne demanda où ils avaient été.",
    "es": "Los barcos llegaron con la marea de la tarde y nadie en el muelle preguntó dónde habían estado.",
    "ru": "Корабли пришли с вечерним приливом, и никто на причале не спросил, где они были все эти годы.",
    "zh": "船随着晚潮回来了，码头上没有人问这些年来它们去了哪里。",
    "ja": "船は夕方の潮に乗って戻ってきたが、埠頭の誰も何年もどこにいたのか尋ねなかった。",
    "ar": "عادت السفن مع مد المساء ولم يسأل أحد على الرصيف أين كانت طوال تلك السنوات.",
    "hi": "जहाज़ शाम के ज्वार के साथ लौट आए और घाट पर किसी ने नहीं पूछा कि वे इतने वर्षों तक कहाँ थे।",
}


@pytest.mark.parametrize("code", TEXTS)
def test_a_sentence_is_told_by_its_language(code: str) -> None:
    guess = DETECTOR.guess(TEXTS[code])
    assert guess.code == code
    assert guess.score > 0.9


@pytest.mark.parametrize("broken", ["\0", "\x0b", "\x7f", "\x85", "\ud800", "\ufdd0", "\uffff", "\U0010fffe"])
def test_control_characters_and_surrogates_do_not_hide_the_language(broken: str) -> None:
    assert DETECTOR.guess(TEXTS["de"] + broken + TEXTS["de"]).code == "de"


@pytest.mark.parametrize("text", ["", " ", "ok", "12345 67890", "\ud800", "\0"])
def test_too_little_text_is_unknown(text: str) -> None:
    assert DETECTOR.guess(text) == Guess(UNKNOWN, 0.0)


@given(text=st.text(max_size=300) | st.text(alphabet=st.characters(categories=["Cc", "Cs", "Cn", "Co", "Ll"]), max_size=100))
def test_no_text_breaks_it(text: str) -> None:
    guess = DETECTOR.guess(text)
    assert 0 <= guess.score <= 1


def test_what_is_kept_follows_the_settings() -> None:
    english = Language(keep=("en",))
    assert judge(Guess("en", 0.9), english) == ""
    assert judge(Guess("en", 0.5), english) == "language: mixed"
    assert judge(Guess("de", 0.9), english) == "language: not kept"
    assert judge(Guess(UNKNOWN, 0), english) == "language: unknown"
    assert judge(Guess(UNKNOWN, 0), Language(keep=("en",), unknown=True)) == ""
    assert judge(Guess("de", 0.1), Language()) == ""
    with pytest.raises(SpecError, match='keep has "EN"'):
        Language(keep=("EN",)).check("data.language")
