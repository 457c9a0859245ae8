"""Builds that judge: every judge's verdict shows in the shards and in the report."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shards.build import report
from shards.build.build import build
from shards.common.errors import SpecError
from shards.filters.heuristics.settings import GopherQuality, GopherRepetition
from shards.filters.settings import Contamination, Language, Perplexity, Pii, Quality, Toxicity
from shards.format.corpus import Corpus, sources
from shards.format.manifest import load, verify
from shards.readers import stdlib
from shards.sampling.batches import BatchFeed
from shards.spec import Build, Clean, Source
from shards.tokenization.tokenizer import FILE_NAME, Tokenizer

ENGLISH = "The harbour was quiet in the morning, and the boats that had come in at night were still to be unloaded by the men. "
GERMAN = "Der Hafen war am Morgen still, und die Boote, die in der Nacht gekommen waren, mussten noch entladen werden. "
FRENCH = "Le port était calme le matin, et les bateaux arrivés pendant la nuit devaient encore être déchargés par les hommes. "


def prose(count: int) -> list[str]:
    """Documentation of the standard library's modules."""
    return [parts[0] for _, parts in stdlib.docs(lambda key: True) if len(parts[0]) > 600][:count]


def shuffled(sentence: str, times: int, seed: int) -> str:
    """Text of a language that repeats no other text of it."""
    rnd = random.Random(seed)
    words = sentence.split()
    return " ".join(f"{' '.join(rnd.sample(words, len(words)))} {seed}." for _ in range(times))


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def texts_of(out: Path, source: str) -> list[str]:
    tokenizer = Tokenizer.load(out / FILE_NAME)
    found = []
    for split in ("train", "held_out"):
        corpus = Corpus(out, source, split)
        found += [tokenizer.decode(corpus.read(*corpus.span(number))) for number in range(corpus.documents)]
    return found


Make = Callable[..., Path]


@pytest.fixture
def make(make_spec: Callable[..., Build], tmp_path: Path) -> Make:
    """Builds texts with a `clean` table."""

    def made(texts: list[str], clean: Clean, **source: Any) -> Path:
        path = jsonl(tmp_path / "texts.jsonl", texts)
        return build(
            make_spec(
                tmp_path / "out", source=(Source(name="web", kind="text", origin="jsonl", path=path, **source),), clean=clean
            ),
            workers=0,
        )

    return made


def test_a_source_is_split_by_language_and_mixed_by_its_parts(make: Make) -> None:
    texts = [shuffled(text, 8, number) for number in range(30) for text in (ENGLISH, GERMAN, FRENCH)]
    out = make(texts, Clean(near_dup_threshold=0, language=Language(keep=("en", "de"))), split_by="language")
    assert sources(out) == ["web.de", "web.en"]
    assert len(texts_of(out, "web.de")) == len(texts_of(out, "web.en")) == 30
    assert all("Hafen" in text for text in texts_of(out, "web.de"))
    assert not [message for name in sources(out) for split in ("train", "held_out") for message in verify(out / name / split)]
    funnel = report.load(out).sources[0].funnel
    assert {code: count.documents for code, count in funnel.told["language"].items()} == {"en": 30, "de": 30, "fr": 30}
    assert funnel.reasons["language: not kept"].documents == 30
    feed = BatchFeed(out, "train", "text", 64, {"web": 1}, 0)
    assert {name for name, _, _ in feed.read(0, 64).samples} == {"web.de", "web.en"}


def test_personal_data_is_redacted_in_the_shards(make: Make) -> None:
    texts = [f"{text[:500]}\nWrite to someone{number}@example-host.org or come by." for number, text in enumerate(prose(40))]
    out = make(texts, Clean(pii=Pii()))
    kept = texts_of(out, "web")
    assert len(kept) == 40 and all("<EMAIL>" in text and "@example-host" not in text for text in kept)
    funnel = report.load(out).sources[0].funnel
    assert funnel.told["personal data"]["email"].documents == 40 and funnel.changed["pii"].documents >= 40


def test_what_judges_learn_from_is_read_once_and_decides(make: Make, tmp_path: Path) -> None:
    good, bad = prose(120), [path.read_text("utf-8", "replace")[:4000] for _, path in stdlib.files()[:120]]
    quality = Quality(good=jsonl(tmp_path / "good.jsonl", good[:60]), bad=jsonl(tmp_path / "bad.jsonl", bad[:60]), min_score=0.5)
    perplexity = Perplexity(reference=jsonl(tmp_path / "reference.jsonl", good[:60]), order=3, max_perplexity=100_000)
    contamination = Contamination(sets={"exam": jsonl(tmp_path / "exam.jsonl", [good[70][:400]])})
    out = make(good[60:] + bad[60:], Clean(quality=quality, perplexity=perplexity, contamination=contamination))
    funnel = report.load(out).sources[0].funnel
    assert funnel.reasons["quality: score too low"].documents > 40
    said = report.load(out).models
    assert said["quality"].startswith("trained on 60 good and 60 bad documents: accuracy ")
    assert said["contamination"] == "looked for exam (1 texts)" and said["perplexity"].startswith("n-grams of 1 to 3 words: ")
    assert funnel.reasons["contamination: exam"].documents == 1
    assert sum(count.documents for count in funnel.told["perplexity"].values()) == funnel.steps["near"].documents
    assert sorted(path.name for path in (out / "models").iterdir()) == ["contamination.index", "perplexity.arpa", "quality.model"]
    assert not any(good[70][:300] in text for text in texts_of(out, "web"))


def test_rules_and_toxicity_are_steps_of_the_funnel(make: Make) -> None:
    texts = [*prose(60), "buy now " * 300, "too short", *(["A plain insult, you idiot. " * 3] * 2)]
    out = make(
        texts,
        Clean(near_dup_threshold=0, gopher_repetition=GopherRepetition(), gopher_quality=GopherQuality(), toxicity=Toxicity()),
    )
    funnel = report.load(out).sources[0].funnel
    assert list(funnel.steps) == ["read", "exact", "near", "gopher_repetition", "gopher_quality", "toxicity"]
    assert any(reason.startswith("gopher_repetition") for reason in funnel.reasons)
    assert funnel.reasons["exact duplicate"].documents == 1


def test_a_source_is_split_by_the_length_of_its_documents(make: Make) -> None:
    texts = [text * times for times, text in zip([1, 1, 30] * 20, prose(60), strict=False)]
    out = make(texts, Clean(near_dup_threshold=0), split_by="length", lengths=(2000, 8000))
    assert set(sources(out)) <= {"web.to2000", "web.to8000", "web.over8000"} and "web.over8000" in sources(out)
    for name, low, high in (("web.to2000", 0, 2000), ("web.over8000", 8001, 1 << 40)):
        lengths = Corpus(out, name, "train").lengths()
        assert len(lengths) and low <= lengths.min() and lengths.max() <= high


def test_long_documents_are_made_and_marked(make_spec: Callable[..., Build], tmp_path: Path) -> None:
    web = Source(name="web", kind="text", origin="jsonl", path=jsonl(tmp_path / "web.jsonl", prose(150)))
    chats = tmp_path / "chats.jsonl"
    turns = [{"prompt": f"What is said of {text[:60]}?", "response": text[:900]} for text in prose(150)]
    chats.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    source = (
        Source(name="tasks", kind="text", origin="made", made="tasks", of=("web",), characters=6000),
        web,
        Source(name="talk", kind="sft", origin="jsonl", path=str(chats)),
        Source(name="long", kind="text", origin="made", made="related", of=("web",), characters=8000),
        Source(name="talks", kind="sft", origin="made", made="conversations", of=("talk",), characters=4000),
    )
    out = build(make_spec(tmp_path / "out", source=source, clean=Clean(chunk_bytes=150_000)), workers=0)
    assert all(len(text) >= 6000 for text in texts_of(out, "tasks")) and len(texts_of(out, "tasks")) >= 5
    assert all(len(text) >= 8000 for text in texts_of(out, "long")) and texts_of(out, "long")
    assert texts_of(out, "talks")
    assert load(out / "long" / "train").origin == "made: related of web, 8,000 characters or more each"
    told = {each.name: each.funnel.told for each in report.load(out).sources}
    assert set(told["long"]["made"]) == {"related"} and all(label.startswith("task-") for label in told["tasks"]["made"])
    # What is held out of the sources is in no document that is trained on.
    tokenizer = Tokenizer.load(out / FILE_NAME)
    held = Corpus(out, "web", "held_out")
    kept_out = [tokenizer.decode(held.read(*held.span(number)))[100:300] for number in range(held.documents)]
    train = Corpus(out, "long", "train")
    trained_on = tokenizer.decode(train.read(0, train.tokens))
    assert kept_out and not any(text in trained_on for text in kept_out)


def test_made_documents_are_the_same_however_the_build_runs(make_spec: Callable[..., Build], tmp_path: Path) -> None:
    source = (
        Source(name="web", kind="text", origin="jsonl", path=jsonl(tmp_path / "web.jsonl", prose(80))),
        Source(name="tasks", kind="text", origin="made", made="tasks", of=("web",), characters=4000),
    )
    spec = make_spec(tmp_path / "one", source=source, clean=Clean(chunk_bytes=60_000))
    first = build(spec, workers=0)
    second = build(msgspec.structs.replace(spec, out=str(tmp_path / "two")), workers=2)
    for split in ("train", "held_out"):
        assert load(first / "tasks" / split).digest == load(second / "tasks" / split).digest


@pytest.mark.parametrize(
    ("clean", "message"),
    [
        (Clean(quality=Quality()), "quality.good is not set"),
        (Clean(perplexity=Perplexity(reference="nowhere.txt")), "nowhere.txt: no such file"),
        (Clean(near_dup_threshold=0.3), "near_dup_threshold is 0.3"),
        (Clean(language=Language(min_score=2)), "min_score is 2"),
    ],
    ids=["no path", "path", "near", "share"],
)
def test_settings_that_cannot_work_are_said_before_anything_is_read(make: Make, clean: Clean, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        make(prose(3), clean)
