"""Toxic text is refused by kind, and text of medicine, law and history is not."""

from __future__ import annotations

import codecs
import sysconfig
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.common.errors import SpecError
from shards.filters.settings import Toxicity
from shards.filters.toxicity import ToxicityScorer
from shards.filters.wordlists import NEEDED, NEEDED_SLURS, SLURS, WORDS, digest

pytest.importorskip("profanity_check", reason="alt-profanity-check is not installed (make setup)")
METER = ToxicityScorer(Toxicity())


def reason(text: str, meter: ToxicityScorer = METER) -> str:
    return meter.judge(meter.measure([text])[0])


def clear(text: str) -> str:
    """Test texts are kept in rot13, as the lists are."""
    return codecs.decode(text, "rot13")


MEDICAL = [
    "The patient was seen for a lump in the left breast. On examination the breast was tender; an ultrasound and a biopsy were"
    " arranged. Breast cancer was excluded, and treatment of the infection was begun.",
    "Erection of the penis depends on the flow of blood from the artery. Symptoms of vascular disease often show there first, so"
    " that a physician should ask every patient about it. Therapy depends on the diagnosis; surgery of the penis is rare.",
    "Digital rectal examination: the prostate is felt through the rectum. Anal fissures and tumours of the rectum may be found."
    " A biopsy of any lesion is sent to pathology before surgery.",
    "Semen analysis counts sperm under the microscope. Low sperm counts have many causes; hormone levels and an infection of the"
    " urinary tract are looked at first. Fertility treatment helps most patients whose sperm is motile.",
    "The cervix lies between vagina and uterus. Cervical screening takes cells from the top of the vagina; most patients whose"
    " result is abnormal need no treatment.",
    "After the birth the nurse helps the mother to put the child to the breast. Breast milk protects from infection, and a blocked"
    " duct of the breast needs treatment early.",
]
LEGAL = [
    "The defendant was convicted of murder and rape. On appeal counsel argued that the jury had been misdirected on the evidence;"
    " the court held that the verdict of murder was safe and dismissed the appeal.",
    "Under section 2 of the act it is an offence to assault, torture or kill a protected animal. The prosecution must prove"
    " that the"
    " defendant meant to kill. The court may sentence for each killing.",
    "The witness stated in testimony that the accused stabbed the victim twice. The stabbing was admitted by the defence, who"
    " pleaded"
    " to manslaughter; the judge left murder to the jury.",
    "The statute defines pornography and its possession. The plaintiff said that the pornography act went beyond the"
    " jurisdiction of"
    " the state; the court of appeal disagreed.",
]
HISTORICAL = [
    "In the siege of the city the army killed thousands; the massacre is told in the archives of the province. Soldiers were"
    " executed,"
    " and the king ordered the murder of the bishop. Historians doubt the number of those killed.",
    "The trade in slaves made the colony rich. Of the slaves taken to the plantation a third died; the revolution began with"
    " the killing"
    " of the overseers, and troops tortured and executed its leaders within the century.",
    "After the war segregation was enforced by terror: lynching went unpunished, and soldiers who came home were murdered."
    " The census of"
    " that century counts the lynched of each county; historians speak of four thousand.",
    "The bastard son of the king, called the Bastard of the province, won the war and was crowned; the treaty left the empire"
    " to him,"
    " bastard or not, and the church agreed.",
]
TOXIC = {
    "toxicity: profanity": "fuhg gur shpx hc lbh shpxvat ovgpu, lbh ner n cvrpr bs fuvg naq rirelobql xabjf vg",
    "toxicity: sexual": "ubg cbea jvgu ubeal zvys fyhgf, oybjwbo naq perracvr ivqrbf, zber cbea naq uneqpber chffl sbe serr",
    "toxicity: slurs": "gubfr avttref naq fcvpf fubhyq tb ubzr, fnvq gur zna, naq gbbx gur puvaxf jvgu gurz ntnva",
}


@pytest.mark.parametrize("kind", TOXIC)
def test_toxic_text_is_refused_by_its_kind(kind: str) -> None:
    assert reason(clear(TOXIC[kind])) == kind


def test_lines_that_the_model_takes_for_profane_refuse_a_text_that_no_list_knows() -> None:
    meter = ToxicityScorer(Toxicity(profanity=0, slurs=0, sexual=0))
    text = clear("lbh fghcvq vqvbg fhpx zl qvpx\nfuhg hc lbh shpxvat zbeba\nlbh ner n cngurgvp ovgpu\n")
    assert reason(text, meter) == "toxicity: score"
    assert reason("It rained in the morning.\nThe ships stayed in.\nNobody minded.\n", meter) == ""


@pytest.mark.parametrize("text", MEDICAL + LEGAL + HISTORICAL)
def test_medicine_law_and_history_are_kept(text: str) -> None:
    strict = ToxicityScorer(Toxicity(profanity=5, sexual=5, violence=5))
    assert reason(text, strict) == ""


def test_without_its_guard_many_of_those_would_be_refused() -> None:
    strict = ToxicityScorer(Toxicity(profanity=5, sexual=5, violence=5, guard=False))
    assert sum(reason(text, strict) != "" for text in MEDICAL + LEGAL + HISTORICAL) >= 12


def test_the_guard_does_not_cover_what_no_field_needs() -> None:
    assert reason(MEDICAL[0] + clear(" Lbh shpxvat ovgpu, shpx lbh.")) == "toxicity: profanity"


def test_one_word_does_not_refuse_a_text() -> None:
    assert reason(clear("Bu fuvg, vg vf envavat ntnva.")) == ""


def test_ordinary_text_of_this_machine_is_kept() -> None:
    from pydoc_data.topics import topics

    texts = list(topics.values())
    texts += [path.read_text(errors="replace") for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[::6]]
    assert [METER.judge(found) for found in METER.measure(texts)] == [""] * len(texts)


def test_many_texts_at_once_measure_as_each_alone() -> None:
    texts = [*MEDICAL, clear(TOXIC["toxicity: profanity"]), "", "x" * 1000, "\n\n"]
    assert METER.measure(texts) == [METER.measure([text])[0] for text in texts]


def test_the_lists_hold_what_they_should() -> None:
    assert NEEDED_SLURS <= SLURS
    assert len(SLURS) > 60
    assert WORDS["violence"] <= NEEDED <= WORDS["violence"] | WORDS["sexual"] | WORDS["profanity"]
    assert not any(digest(word) in SLURS for word in ("the", "house", "person", "english", "chinese", "black", "queer", "jew"))


@given(text=st.text(max_size=300))
def test_no_text_breaks_it(text: str) -> None:
    found = METER.measure([text])[0]
    assert 0 <= found.profane_lines <= found.lines
    assert METER.judge(found) == ""


def test_it_reads_over_a_megabyte_a_second() -> None:
    from pydoc_data.topics import topics

    texts = list(topics.values())
    began = time.process_time()
    METER.measure(texts)
    assert sum(map(len, texts)) / 1e6 / (time.process_time() - began) > 1


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong in (Toxicity(score=2), Toxicity(slurs=-1), Toxicity(least=0)):
        with pytest.raises(SpecError, match=r"data\.toxicity"):
            wrong.check("data.toxicity")
