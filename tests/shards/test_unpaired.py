"""Unpaired responses: records with a label, as TRL's KTOTrainer and LLaMA-Factory have them, to rows with a label."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from test_shard_commands import shards as command

from shards.build.build import build
from shards.build.chunks import stored
from shards.common.errors import ShardError, SpecError
from shards.format.corpus import open_source
from shards.format.seekable_zstd import Cache
from shards.readers.layouts import told
from shards.sampling.batches import BatchFeed
from shards.spec import Build, Clean, Data, Source, TokenizerSpec, check
from shards.tokenization.records import Document, in_record
from shards.tokenization.tokenizer import FILE_NAME, Tokenizer

SOURCE = Source(name="ratings", kind="unpaired", origin="jsonl", path="r.jsonl")
USER, GOOD = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}


@pytest.mark.parametrize(
    ("record", "changes", "desirable"),
    [
        ({"prompt": "Why?", "completion": "Because.", "label": True}, {}, True),
        ({"prompt": "Why?", "completion": "Because.", "label": False}, {}, False),
        ({"prompt": "Why?", "completion": "Because.", "label": 0}, {}, False),
        ({"prompt": [USER], "completion": [GOOD], "label": True}, {}, True),
        ({"messages": [USER, GOOD], "label": False}, {}, False),
        ({"messages": [USER, GOOD], "kto_tag": False}, {"label_field": "kto_tag"}, False),
        ({"prompt": "Why?", "response": "Because.", "good": True}, {"completion_field": "response", "label_field": "good"}, True),
    ],
)
def test_records_with_a_label(record: dict[str, Any], changes: dict[str, str], desirable: bool) -> None:
    found = in_record(record, msgspec.structs.replace(SOURCE, **changes), "r.jsonl:1")
    assert isinstance(found, Document), found
    assert (found.parts, found.roles, found.desirable) == (("Why?", "Because."), ("user", "assistant"), desirable)
    assert stored(found).document() == found


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "Why?", "completion": "Because."}, 'no field "label"'),
        ({"prompt": "Why?", "completion": "Because.", "label": "good"}, 'field "label" is neither true nor false'),
        ({"prompt": "Why?", "completion": "Because.", "label": 0.5}, 'field "label" is neither true nor false'),
        ({"prompt": "Why?", "completion": "Because.", "label": True, "kto_tag": False}, '"kto_tag" is false'),
        ({"prompt": "Why?", "label": True}, 'no field "completion"'),
        ({"messages": [USER, GOOD, USER, {**GOOD, "weight": 0}], "label": True}, "the last answer is not to be learned"),
    ],
)
def test_a_record_whose_label_says_nothing_is_rejected(record: dict[str, Any], reason: str) -> None:
    found = in_record(record, SOURCE, "r.jsonl:1")
    assert isinstance(found, str) and found.startswith(reason)


def test_the_label_is_of_the_last_answer_and_those_before_it_are_context() -> None:
    found = in_record({"messages": [USER, GOOD, USER, GOOD], "label": False}, SOURCE, "")
    assert isinstance(found, Document) and found.masked == (1,)


def test_a_layout_without_a_label_is_not_taken_for_one_with_it() -> None:
    record = {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}], "label": False}
    assert told(record, SOURCE) == "plain" and told(record, msgspec.structs.replace(SOURCE, kind="sft")) == "sharegpt"
    with pytest.raises(SpecError, match='layout "alpaca" is of kind sft, not unpaired'):
        check(Build(data=Data(source=(msgspec.structs.replace(SOURCE, layout="alpaca"),)), out="x"))


def test_only_records_are_unpaired() -> None:
    with pytest.raises(SpecError, match="origin"):
        check(Build(data=Data(source=(msgspec.structs.replace(SOURCE, origin="stackexchange"),)), out="x"))


@pytest.fixture(scope="module", params=["plain", "clean"])
def shards(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    lines = [{"prompt": f"Question {n}?", "completion": f"Answer {n}.", "label": n % 3 == 0} for n in range(60)]
    lines.append({"messages": [USER, GOOD, {"role": "user", "content": "And then?"}, GOOD], "label": False})
    (place / "r.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = msgspec.structs.replace(SOURCE, path=str(place / "r.jsonl"))
    data = Data(source=(source,), held_out=0.2, clean=Clean() if request.param == "clean" else None)
    build(Build(data=data, tokenizer=TokenizerSpec(vocab=384, sample_bytes=10_000), out=str(place / "out")), workers=0)
    return place / "out"


def test_rows_have_the_prompt_one_answer_and_the_label(shards: Path) -> None:
    feed = BatchFeed(shards, "train", "labelled", 48, {"ratings": 1.0}, seed=0)
    count = feed.samples_per_epoch("ratings")
    batch, tokenizer = feed.samples("ratings", 0, count), feed.tokenizer
    assert 30 < count < 61 and batch.tokens.shape == (count, 48)
    for row in range(count):
        real = batch.segments[row] >= 0
        text = tokenizer.decode(batch.tokens[row][real])
        answer = tokenizer.decode(batch.targets[row][batch.mask[row] > 0])
        if "Question" in text:
            number = int(text.split("Question ")[1].split("?")[0])
            assert answer.strip() == f"Answer {number}." and bool(batch.desirable[row]) == (number % 3 == 0)
        else:
            assert text.count("Because.") == 2 and answer.strip() == "Because." and not batch.desirable[row]
    short = BatchFeed(shards, "train", "labelled", 6, {"ratings": 1.0}, seed=0).samples("ratings", 0, count)
    assert (short.mask.sum(-1) > 0).all(), "a long prompt loses its beginning first"
    prompts = BatchFeed(shards, "train", "prompt", 48, {"ratings": 1.0}, seed=0).prompts(0, 3)
    assert all("Question" in tokenizer.decode(prompt) or "Why" in tokenizer.decode(prompt) for prompt in prompts)
    with pytest.raises(ShardError, match='kind "unpaired", but the stage needs "preference"'):
        BatchFeed(shards, "train", "preference", 48, {"ratings": 1.0}, seed=0)


def test_the_mask_tells_good_answers_from_bad_ones_and_cat_shows_them(shards: Path) -> None:
    corpus = open_source(shards, "ratings", "train", Tokenizer.load(shards / FILE_NAME), Cache())
    values = [set(np.unique(corpus.read(*corpus.span(document), "mask")).tolist()) for document in range(corpus.documents)]
    assert {frozenset(each) for each in values} == {frozenset({0, 1}), frozenset({0, 2})}
    for kind, title in ((1, "desirable"), (2, "undesirable")):
        number = next(document for document, each in enumerate(values) if kind in each)
        shown = json.loads(command("cat", shards, "--source", "ratings", "--sample", number, "--context", 48, "--json").stdout)
        (part,) = shown["parts"] if isinstance(shown, dict) else shown
        assert part["title"] == f"document {number}, {title}" and set(part["mask"]) == {0, kind}
