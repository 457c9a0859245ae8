"""Fields that change what a conversation means: each is honoured, or its record is rejected, or it is counted as not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shards.build import report as reporting
from shards.build.build import build
from shards.build.chunks import stored
from shards.build.sources import Rejected
from shards.format import manifest
from shards.format.corpus import Corpus
from shards.readers.layouts import documents
from shards.spec import Build, Clean, Data, Source, TokenizerSpec
from shards.tokenization.encode import encode, refusal
from shards.tokenization.records import Document
from shards.tokenization.templates import named
from shards.tokenization.tokenizer import Tokenizer as Loaded
from shards.tokenization.tokenizer import read_model, train

ASK, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
TOLD = [("user", "2+2?"), ("assistant", "4")]


def read(record: dict[str, Any], kind: Any = "sft", **more: Any) -> Document | str:
    """The document in a record, or why there is none."""
    source = Source(name="own", kind=kind, origin="jsonl", path="d.jsonl", **more)
    (found,) = documents(iter([("d.jsonl:1", record)]), source)
    return found.reason if isinstance(found, Rejected) else found


def said(record: dict[str, Any], kind: Any = "sft", **more: Any) -> list[tuple[str, str]]:
    found = read(record, kind, **more)
    assert isinstance(found, Document), found
    return list(zip(found.roles or ("user", "assistant"), found.parts, strict=False))


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
@pytest.mark.parametrize("off", [0, False, 0.0])
def test_a_turn_of_weight_0_is_context_and_not_learned(key: str, off: Any) -> None:
    turns = [ASK, ANSWER | {key: off}, ASK, ANSWER | {key: 1}, ASK, ANSWER | {key: off}]
    found = read({"messages": turns})
    assert isinstance(found, Document) and found.parts == ("2+2?", "4") * 2, "nothing is kept behind the last word that is learned"
    assert found.masked == (1,)
    assert read({"messages": turns[:2]}) == "no assistant turn that is to be learned"


REJECTED: list[tuple[dict[str, Any], str]] = [
    ({"weight": 0.5}, '"weight" of a turn is neither 0 nor 1: it is not honoured'),
    ({"tool_calls": [{"id": "a"}]}, 'a turn has "tool_calls": tool calls are not learned'),
    ({"function_call": {"name": "f"}}, 'a turn has "function_call": tool calls are not learned'),
    ({"reasoning_content": "hm"}, 'a turn has "reasoning_content": reasoning apart from'),
    ({"reasoning": "hm"}, 'a turn has "reasoning": reasoning apart from'),
    ({"thinking": "hm"}, 'a turn has "thinking": reasoning apart from'),
    ({"name": "Ann"}, 'a turn has "name": templates are not given it'),
    ({"train_detail": [{"begin_offset": 0}]}, 'a turn has "train_detail": it is not honoured'),
    ({"mask": True}, 'a turn has "mask": it is not honoured'),
    ({"content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}, 'a part of the content is of type "image_url"'),
    ({"content": []}, 'field "messages" is not a list of messages'),
    ({"content": None, "tool_calls": [{}]}, 'a turn has "tool_calls"'),
]  # fmt: skip


@pytest.mark.parametrize(("more", "reason"), REJECTED)
def test_a_turn_that_means_something_else_is_rejected_by_its_field(more: dict[str, Any], reason: str) -> None:
    found = read({"messages": [ASK, ANSWER | more]})
    assert isinstance(found, str) and found.startswith(reason)
    if "content" not in more:
        sharegpt = {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"} | more]}
        assert str(read(sharegpt)).startswith(reason), "in every layout"


def test_what_the_user_says_is_not_learned_even_where_a_record_asks_for_it() -> None:
    assert (
        read({"messages": [ASK | {"train": True}, ANSWER]}) == '"train" of a turn by the user: the assistant\'s alone are learned'
    )
    assert said({"messages": [ASK | {"train": False, "weight": 0}, ANSWER]}) == TOLD


def test_empty_values_are_no_fields() -> None:
    """Parquet gives every row every field."""
    none = dict.fromkeys(("weight", "tool_calls", "reasoning_content", "name", "train_detail", "other"))
    record = {"messages": [ASK | none, ANSWER | none], "tools": [], "system": "", "images": None, "history": [], "other": {}}
    found = read(record)
    assert isinstance(found, Document) and found.parts == ("2+2?", "4") and not found.unread
    assert said(dict.fromkeys(("prompt", "response")) | {"messages": [ASK, ANSWER]}) == TOLD


@pytest.mark.parametrize("layout", ["alpaca", "plain", "sharegpt"])
def test_system_and_history_come_before_the_question(layout: str) -> None:
    own = {
        "alpaca": {"instruction": "2+2?", "input": "", "output": "4"},
        "plain": {"prompt": "2+2?", "response": "4"},
        "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    }[layout]
    more = {"history": [["1+1?", "2"]], "system": "You count."}
    assert said(own | more) == [("system", "You count."), ("user", "1+1?"), ("assistant", "2"), *TOLD]
    found = read(own | more)
    assert isinstance(found, Document) and found.masked == () and found.key == "1+1?"
    assert read(own | {"history": "1+1?"}) == 'field "history" is not a list of questions with their answers'


def test_a_system_message_beside_the_conversation_is_not_said_twice() -> None:
    system = {"role": "system", "content": "You count."}
    assert said({"messages": [system, ASK, ANSWER], "system": "You count."}) == [("system", "You count."), *TOLD]
    assert read({"messages": [system, ASK, ANSWER], "system": "You add."}) == "has two system messages that differ"
    assert said({"messages": [system | {"content": " "}, ASK, ANSWER]}) == TOLD, "an empty one is none"
    pair = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    found = read(pair | {"system": "You count."}, "preference")
    assert isinstance(found, Document) and (found.roles, found.parts) == (("system", "user"), ("You count.", "2+2?", "4", "5"))
    assert read(pair | {"chosen": [ANSWER | {"weight": 0}]}, "preference") == 'the answer in "chosen" is not to be learned'


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"tools": [{"type": "function"}]}, 'has "tools": tool calls are not learned'),
        ({"images": ["a.png"]}, 'has "images": text alone is learned'),
        ({"mask": "User"}, 'has "mask": it is not honoured'),
        ({"chat_template_kwargs": {"enable_thinking": False}}, 'has "chat_template_kwargs": templates are not given it'),
        ({"weight": 0.3}, '"weight" of a record is not honoured (leave it out, or 1)'),
        ({"label": False}, '"label" is false: an example of what not to say'),
        ({"kto_tag": 0}, '"kto_tag" is false: an example of what not to say'),
        ({"reasoning": "two and two"}, 'has "reasoning": reasoning apart from the content is not learned: put it into the content'),
    ],
)
def test_a_record_that_means_something_else_is_rejected_by_its_field(more: dict[str, Any], reason: str) -> None:
    for own in ({"messages": [ASK, ANSWER]}, {"instruction": "2+2?", "output": "4"}):
        assert read(own | more) == reason


def test_what_a_judge_says_of_a_pair_does_not_reject_it() -> None:
    pair = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    found = read(pair | {"label": False, "reasoning": "5 is wrong"}, "preference")
    assert isinstance(found, Document) and found.unread == ("reasoning",)
    assert read(pair | {"tools": [{}]}, "preference") == 'has "tools": tool calls are not learned'


def test_parts_of_text_are_put_together() -> None:
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    assert said({"messages": [ASK | {"content": parts}, ANSWER]}) == TOLD


def test_an_answer_before_the_first_question_is_not_learned() -> None:
    system = {"role": "system", "content": "S"}
    found = read({"messages": [system, ANSWER, ASK, ANSWER]})
    assert isinstance(found, Document) and found.masked == (1,), "as context it stays"
    turns = [{"from": "system", "value": "S"}, {"from": "gpt", "value": "Hi"}, {"from": "human", "value": "2+2?"}]
    assert said({"conversations": [*turns, {"from": "gpt", "value": "4"}]}) == [("system", "S"), *TOLD]
    assert read({"conversations": turns[:2]}) == "no question"


@pytest.mark.parametrize(("clean", "workers"), [(None, 0), (None, 2), (Clean(exact=False, near_dup_threshold=0), 0)])
def test_fields_that_are_not_read_are_counted_and_shown(tmp_path: Path, clean: Clean | None, workers: int) -> None:
    records = [{"messages": [ASK | {"content": f"{n}?"}, ANSWER | {"mood": "glad"}], "id": n, "hint": "x"} for n in range(20)]
    records += [{"messages": [ASK, ANSWER | {"weight": 0}, ASK, ANSWER]}, {"messages": [ASK, ANSWER | {"tool_calls": [1]}]}]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = (
        Source(name="own", kind="sft", origin="jsonl", path=str(path)),
        Source(name="prose", kind="text", origin="text", path=__file__),
    )
    data = Data(source=source, held_out=0, clean=clean)
    out = build(Build(data=data, tokenizer=TokenizerSpec(vocab=400), out=str(tmp_path / "o")), workers=workers)
    found = manifest.load(out / "own/train")
    assert found.notes == {'field not read: "hint"': 20, 'field not read: "mood of a turn"': 20}
    assert found.rejected == {'a turn has "tool_calls": tool calls are not learned': 1}
    report = next(each for each in reporting.load(out).sources if each.name == "own")
    assert (report.notes, report.rejected) == (found.notes, found.rejected)
    assert list(reporting.left_out(out)) == [
        'own: left out: a turn has "tool_calls": tool calls are not learned: 1',
        'own: kept, but: field not read: "hint": 20; field not read: "mood of a turn": 20',
    ]
    corpus, tokenizer = Corpus(out, "own", "train"), Loaded.load(out / "tokenizer.model")
    start, stop = corpus.span(20)
    ids, mask = corpus.read(start, stop), corpus.read(start, stop, "mask")
    assert tokenizer.decode(ids[mask == 1], reserved=True) == "4[EOS]"
    assert tokenizer.decode(ids, reserved=True) == "<|user|>2+2?<|assistant|>4[EOS]" * 2, "the same ids, learned or not"


def test_a_manifest_without_notes_is_byte_for_byte_what_it_was_before_there_were_any(built: Path) -> None:
    raw = (built / "chat/train/manifest.json").read_text()
    assert "notes" not in raw and manifest.load(built / "chat/train").notes == {}


def test_long_conversations_made_of_others_leave_out_what_those_leave_out() -> None:
    from shards.build.chunks import StoredDocument
    from shards.build.synthetic import _make

    text = "the harbour of the old town was closed in winter, and the ferry went from the stone bridge in spring " * 4
    roles = ("user", "assistant") * 2
    documents = [
        StoredDocument("k", (f"{n}? " + text.replace("winter", f"winter {n}"), "no", text, f"yes {n}"), roles, "", "", (1,))
        for n in range(4)
    ]
    source = Source(name="long", kind="sft", origin="made", made="conversations", of=("own",), characters=1500)
    made = list(_make(source, documents, "trained on", 0))
    assert made and all(each.parts[at] == "no" for each in made for at in each.masked)
    assert all(len(each.masked) == sum(part == "no" for part in each.parts) >= 2 for each in made)


@pytest.fixture(scope="module")
def tokenizer() -> Loaded:
    return Loaded(train([Path(__file__).read_text()], vocab=400))


def learned(tokenizer: Loaded, record: dict[str, Any], kind: Any = "sft") -> tuple[list[int], list[int]]:
    document = read(record, kind)
    assert isinstance(document, Document), document
    encoded = encode(tokenizer, kind, [stored(document).document()])
    assert encoded.mask is not None
    return encoded.tokens[encoded.mask == 1].tolist(), encoded.tokens[encoded.mask == 2].tolist()


def test_an_answer_that_was_cut_off_is_not_taught_an_end(tokenizer: Loaded) -> None:
    end = [tokenizer.eos]
    record = {"prompt": "2+2?", "response": "It is"}
    assert learned(tokenizer, record)[0] == tokenizer.encode("It is") + end
    assert learned(tokenizer, record | {"finish_reason": "stop"})[0] == tokenizer.encode("It is") + end
    assert learned(tokenizer, record | {"finish_reason": "length"})[0] == tokenizer.encode("It is")
    turns = {"messages": [ASK, ANSWER, ASK, {"role": "assistant", "content": "It is"}], "finish_reason": "length"}
    assert learned(tokenizer, turns)[0] == tokenizer.encode("4") + end + tokenizer.encode("It is")
    assert read({"messages": [ASK, ANSWER | {"finish_reason": "length"}]}) == (
        'a turn has a "finish_reason" that says it was cut off (say so beside the messages, of the last answer)'
    )
    pair = {
        "prompt": "2+2?",
        "chosen": "It is",
        "rejected": "No",
        "chosen_finish_reason": "length",
        "rejected_finish_reason": "stop",
    }
    assert learned(tokenizer, pair, "preference") == (tokenizer.encode("It is"), tokenizer.encode("No") + end)
    assert read(record | {"finish_reason": "sad"}) == (
        '"finish_reason" is none of stop, eos, end_turn, length, max_tokens, aborted'
    )


def test_the_ids_that_were_drawn_are_learned_unless_the_text_was_edited(tokenizer: Loaded) -> None:
    drawn = [id for letter in "It is" for id in tokenizer.encode(letter)]
    assert drawn != tokenizer.encode("It is") and tokenizer.decode(drawn) == "It is"
    record = {"prompt": "2+2?", "response": "It is", "response_ids": drawn, "finish_reason": "length"}
    assert learned(tokenizer, record)[0] == drawn
    ended = record | {"response_ids": [*drawn, tokenizer.eos], "finish_reason": "stop"}
    assert learned(tokenizer, ended)[0] == [*drawn, tokenizer.eos]
    edited = record | {"response": "It was"}
    assert learned(tokenizer, edited)[0] == tokenizer.encode("It was"), "and still it has no end"
    for wrong in ([*drawn[:-1], 10**6], [*drawn, tokenizer.eos], [-1]):
        assert learned(tokenizer, record | {"response_ids": wrong})[0] == tokenizer.encode("It is")
    assert read(record | {"response_ids": "abc"}) == '"response_ids" is not a list of ids'
    pair = {
        "prompt": "2+2?",
        "chosen": "It is",
        "rejected": "No",
        "chosen_ids": [*drawn, tokenizer.eos],
        "chosen_finish_reason": "stop",
    }
    assert learned(tokenizer, pair, "preference") == ([*drawn, tokenizer.eos], [*tokenizer.encode("No"), tokenizer.eos])


@pytest.mark.parametrize(("template", "same"), [("llama3", True), ("chatml", False)])
def test_answers_that_are_the_same_once_the_template_has_trimmed_them_prefer_nothing(template: str, same: bool) -> None:
    ours = Loaded(train([Path(__file__).read_text()], vocab=400, template=named(template)), template=named(template))
    document = read({"prompt": "2+2?", "chosen": "4", "rejected": "4\n"}, "preference")
    assert isinstance(document, Document)
    reason = "both answers are the same, as the template and the tokenizer write them"
    assert refusal(ours, "preference", document) == (reason if same else "")


@pytest.mark.parametrize(
    "empty",
    [
        {"tools": "[]"},
        {"tools": " {} "},
        {"images": [None]},
        {"finish_reason": ""},
        {"system": None},
        {"system": "  "},
    ],
)
def test_a_value_that_holds_nothing_is_no_field(empty: dict[str, Any]) -> None:
    assert said({"messages": [ASK, ANSWER]} | empty) == TOLD
    assert said({"messages": [{"role": "system", "content": None}, ASK, ANSWER]}) == TOLD


@pytest.mark.parametrize("system", [["be brief"], 5, {"text": "be brief"}])
def test_a_system_message_that_is_no_text_rejects_the_record(system: Any) -> None:
    assert read({"messages": [ASK, ANSWER], "system": system}) == 'field "system" is not text'


def test_a_pair_that_the_tokenizer_makes_equal_is_left_out(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Fast
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    made = Fast(models.BPE())
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["yes no maybe"] * 9, trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]))
    made.save(str(tmp_path / "tokenizer.json"))
    names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names))
    tokenizer = Loaded(read_model(tmp_path / "tokenizer.json"), "it", named("midwatch"))
    assert refusal(tokenizer, "preference", Document("k", ("Is it?", "Yes", "yes"))).startswith("both answers are the same")
    assert refusal(tokenizer, "preference", Document("k", ("Is it?", "Yes", "no"))) == ""
