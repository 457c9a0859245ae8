"""The quality classifier tells good from bad text, is the same each time, and is never executed from its file."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest

from shards.common.errors import ShardError, SpecError
from shards.filters.quality import Classifier, bucket, judge, quantiles
from shards.filters.settings import Quality

pytest.importorskip("sklearn", reason="scikit-learn is not installed (make setup)")
SETTINGS = Quality(features=1 << 14)


def prose() -> list[str]:
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def code() -> list[str]:
    return [path.read_text(errors="replace") for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:80]]


@pytest.fixture(scope="module")
def model() -> Classifier:
    return Classifier.train(prose()[:60], code()[:60], SETTINGS)


def test_prose_and_code_are_told_apart_on_text_it_never_saw(model: Classifier) -> None:
    good, bad = model.scores(prose()[60:]), model.scores(code()[60:])
    assert sum(score > 0.5 for score in good) / len(good) > 0.85
    assert sum(score < 0.5 for score in bad) / len(bad) > 0.85
    assert all(0 <= score <= 1 for score in good + bad)


def test_its_own_scores_are_measured_on_examples_kept_apart(model: Classifier) -> None:
    report = model.report
    assert (report.good, report.bad) == (60, 60)
    assert 10 <= report.held_out <= 40
    assert report.accuracy > 0.85 and report.auc > 0.95


def test_labels_that_say_nothing_score_near_chance() -> None:
    texts = prose() + code()
    assert 0.2 < Classifier.train(texts[::2], texts[1::2], SETTINGS).report.auc < 0.8


def test_the_same_examples_give_the_same_bytes_and_the_file_scores_as_the_model(model: Classifier, tmp_path: Path) -> None:
    model.save(tmp_path / "one")
    Classifier.train(iter(prose()[:60]), iter(code()[:60]), SETTINGS).save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    loaded = Classifier.load(tmp_path / "one")
    assert loaded.scores(prose()[60:]) == model.scores(prose()[60:])
    assert loaded.report == model.report


def test_scores_do_not_depend_on_what_else_is_scored(model: Classifier) -> None:
    texts = prose()[60:70]
    assert [model.scores([text])[0] for text in texts] == pytest.approx(model.scores(texts), abs=1e-6)


@pytest.mark.parametrize("damage", [lambda raw: raw[:-4], lambda raw: raw[:-1], lambda raw: raw[3:], lambda raw: b""])
def test_a_damaged_model_is_refused_by_name(model: Classifier, tmp_path: Path, damage: object) -> None:
    model.save(tmp_path / "model")
    (tmp_path / "model").write_bytes(damage((tmp_path / "model").read_bytes()))  # type: ignore[operator]
    with pytest.raises(ShardError, match=r"model: .*train it again"):
        Classifier.load(tmp_path / "model")


def test_too_few_examples_and_examples_that_are_all_the_same_are_refused() -> None:
    with pytest.raises(SpecError, match="3 bad examples"):
        Classifier.train(prose()[:20], ["x y", "y z", "z x", " "], SETTINGS)
    with pytest.raises(SpecError, match="all the same text"):
        Classifier.train(prose()[:20], ["the same"] * 20, SETTINGS)


def test_buckets_part_a_sample_evenly(model: Classifier) -> None:
    scores = model.scores(prose() + code())
    edges = quantiles(scores, 4)
    sizes = [sum(bucket(score, edges) == name for score in scores) for name in ("q0", "q1", "q2", "q3")]
    assert sum(sizes) == len(scores)
    assert max(sizes) - min(sizes) <= 2
    assert [bucket(score, (0.2, 0.8)) for score in (0, 0.2, 0.5, 0.9)] == ["q0", "q1", "q1", "q2"]


def test_texts_below_the_least_score_are_refused() -> None:
    assert judge(0.1, Quality(min_score=0.2)) == "quality: score too low"
    assert judge(0.1, Quality()) == ""
    for wrong in (Quality(features=1000), Quality(held_out=0), Quality(edges=(0.5, 0.2)), Quality(min_score=2)):
        with pytest.raises(SpecError, match=r"data\.quality"):
            wrong.check("data.quality")
