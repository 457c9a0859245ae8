"""Chat templates and conversations: what cannot be used is said, what decides shards is in their hash; records of many turns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from shards.build.build import build
from shards.build.marker import build_key, conflict, is_built
from shards.common.errors import ShardError, SpecError
from shards.format import manifest
from shards.format.corpus import Corpus
from shards.sampling.batches import BatchFeed
from shards.spec import Build, Data, Source, TokenizerSpec
from shards.tokenization.encode import chats
from shards.tokenization.records import Document, in_record
from shards.tokenization.templates import Template, named
from shards.tokenization.tokenizer import Tokenizer as Loaded
from shards.tokenization.tokenizer import train

GOOD = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
GOOD += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
EACH = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}
CHAT = Source(name="chat", kind="sft", origin="jsonl", path="d.jsonl")
PAIRS = Source(name="pairs", kind="preference", origin="jsonl", path="d.jsonl")
TEXTS = [Path(__file__).read_text()]


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        ("{% for m in messages %}", r"t.jinja:1: is not Jinja: .*endfor"),
        ("\n{{ messages | nothing }}", r"t.jinja:2: is not Jinja: No filter named 'nothing'"),
        ("{{ messages[7].content + 1 }}", "refuses it: "),
        ("{{ raise_exception('not today') }}", "refuses it: not today"),
        ("{{ messages.__class__.__mro__ }}", "refuses it: access to attribute '__class__'"),
        ("no messages at all", "has no assistant turn"),
        (EACH.replace("{{ m.content }}", "{% if m.role == 'user' %}{{ m.content }}{% endif %}"), "has no assistant turn"),
        (
            EACH.replace("{{ m.content }}", "{% if m.role != 'user' %}{{ m.content }}{% endif %}"),
            "leaves out what the user says",
        ),
        (EACH.replace("in messages", "in messages if m.role != 'system'"), "leaves out what the system says"),
        (EACH.replace("messages", "messages[:2]"), "leaves out what the user says"),
        (EACH.replace("in messages", "in messages | reverse"), "changes the order of messages"),
        (EACH.replace("{{ m.content }}", "{{ m.content }} {{ m.content }}"), "repeats what a message says"),
        (EACH.replace("m.content", "m.content | upper"), "changes what a message says"),
        (EACH.replace("m.content", "m.content | e"), "changes what a message says"),
        (EACH.replace("{{ eos_token }}", "\n"), r"no token of its own ends what the assistant says \(write eos_token after it\)"),
        (GOOD.replace("{{ m.content }}", "{% generation %}{{ m.content }}{% endgeneration %}"), "would never be learned"),
    ],
)
def test_a_template_that_cannot_be_used_is_an_error_in_one_line_before_anything_is_built(
    jinja: str, message: str, tmp_path: Path
) -> None:
    path, data = tmp_path / "t.jinja", write(tmp_path / "d.jsonl", [{"messages": [USER, ASSISTANT]}] * 5)
    path.write_text(jinja)
    source = Source(name="chat", kind="sft", origin="jsonl", path=str(data))
    spec = Build(data=Data(source=(source,)), tokenizer=TokenizerSpec(vocab=400, template=str(path)), out=str(tmp_path / "o"))
    with pytest.raises(SpecError, match=message) as raised:
        build(spec, workers=0)
    said = str(raised.value)
    assert str(path) in said and "another template" in said and "\n" not in said
    assert not (tmp_path / "o").exists()


def test_a_template_that_does_not_exist_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r'lama3: No such file or directory \(did you mean "llama3"\?\)'):
        build(spec_of(tmp_path, template=str(tmp_path / "lama3")), workers=0)
    with pytest.raises(SpecError, match=r'template is "own", but no tokenizer is brought along'):
        build(spec_of(tmp_path, template="own"), workers=0)


def test_a_directory_without_a_template_of_its_own_is_said(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train(TEXTS, vocab=400))
    with pytest.raises(SpecError, match=r'has no chat template of its own \(set template to "chatml"'):
        build(spec_of(tmp_path, template="own", path=str(tmp_path / "tokenizer.model")), workers=0)


def test_a_templates_day_is_always_the_same() -> None:
    dated = Template("file", "{{ strftime_now('%d %B %Y') }}" + GOOD, "t.jinja")
    ids, _ = Loaded(train(TEXTS, vocab=400, template=dated), template=dated).chat([("user", "Hi")])
    assert Loaded(train(TEXTS, vocab=400, template=dated), template=dated).decode(ids) == "26 July 2024Hi"


def test_a_template_without_a_generation_prompt_is_prompted_with_what_it_writes_before_an_answer() -> None:
    template = Template("file", EACH, "t.jinja")
    tokenizer = Loaded(train(TEXTS, vocab=400, template=template), template=template)
    prompt, _ = tokenizer.chat([("user", "Hi")])
    assert tokenizer.decode(prompt, reserved=True) == "<|user|>Hi[EOS]<|assistant|>"
    ids, mask = tokenizer.chat([("user", "Hi"), ("assistant", "Ho")])
    assert ids[: mask.index(1)] == prompt


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def spec_of(tmp_path: Path, kind: Any = "sft", records: list[Any] | None = None, **tokenizer: Any) -> Build:
    """A build of one source, of a few questions and answers."""
    plain = [{"prompt": f"What is {n}?", "response": "A number.", "chosen": "One.", "rejected": "None."} for n in range(30)]
    path = write(tmp_path / "d.jsonl", plain if records is None else records)
    # The prose is there for the tokenizer to learn from.
    source = (
        Source(name="own", kind=kind, origin="jsonl", path=str(path)),
        Source(name="prose", kind="text", origin="text", path=__file__),
    )
    tokenizer = {"vocab": 400} | tokenizer
    return Build(data=Data(source=source, held_out=0), tokenizer=TokenizerSpec(**tokenizer), out=str(tmp_path / "o"))


def told(out: Path, number: int, source: str = "own") -> list[str]:
    """A document by its mask: what is 0, 1 and 2 of it."""
    tokenizer, corpus = Loaded.load(out / "tokenizer.model"), Corpus(out, source, "train")
    ids, mask = corpus.read(*corpus.span(number)), corpus.read(*corpus.span(number), "mask")
    return [tokenizer.decode(ids[mask == part], reserved=True) for part in range(3)]


def test_what_names_a_build_changes_on_purpose_alone() -> None:
    """A new key with its default leaves shards valid; where the same files are read otherwise, `READING` goes up."""
    source = Source(name="own", kind="sft", origin="jsonl", path="d.jsonl")
    spec = Build(data=Data(source=(source,)), tokenizer=TokenizerSpec(vocab=400), out="o", seed=3)
    assert build_key(spec) == "9b4cec3c80760694798f1f44bc8ca973"
    model = train(TEXTS, vocab=400)
    assert Loaded(model).hash == Loaded(model, template=named("midwatch")).hash == xxhash.xxh3_128_hexdigest(model)
    assert len({Loaded(model, template=named(name)).hash for name in ("midwatch", "chatml", "llama2", "zephyr")}) == 4


def test_shards_of_one_template_are_not_read_with_another(tmp_path: Path) -> None:
    out = build(spec_of(tmp_path, template="zephyr"), workers=0)
    assert manifest.load(out / "own/train").tokenizer == Loaded.load(out / "tokenizer.model").hash
    (out / "tokenizer.template").write_bytes(named("chatml").encoded())
    with pytest.raises(ShardError, match="made with tokenizer"):
        BatchFeed(out, "train", "sft", 64, {"own": 1}, 0)
    (out / "tokenizer.template").write_text("{")
    with pytest.raises(ShardError, match=r"tokenizer\.template: not a template"):
        BatchFeed(out, "train", "sft", 64, {"own": 1}, 0)


def test_another_template_is_another_build(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text(GOOD)
    spec = spec_of(tmp_path, template=str(file))
    build(spec, workers=0)
    assert is_built(spec)
    assert "tokenizer.template was" in conflict(spec_of(tmp_path, template="chatml"))
    file.write_text(GOOD + "\n\n.")
    assert not is_built(spec) and "had other content" in conflict(spec)
    moved = tmp_path / "moved.jinja"
    moved.write_text(GOOD)
    assert is_built(spec_of(tmp_path, template=str(moved))), "where the file lies does not count"


@pytest.mark.parametrize("name", ["midwatch", "llama2", "llama3", "chatml", "zephyr"])
def test_a_pair_is_a_templates_prompt_and_two_answers_with_their_ends(name: str, tmp_path: Path) -> None:
    out = build(spec_of(tmp_path, "preference", template=name), workers=0)
    prompt, chosen, rejected = told(out, 3)
    end = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>"}.get(name, "[EOS]")
    blank = " " if name == "llama2" else ""
    assert (chosen, rejected) == (f"{blank}One.{blank}{end}", f"{blank}None.{blank}{end}")
    tokenizer = Loaded.load(out / "tokenizer.model")
    asked = tokenizer.decode(tokenizer.chat([("user", "What is 3?")])[0], reserved=True)
    assert prompt == asked


def test_a_conversation_of_many_turns_learns_every_answer(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "S"}, USER, ASSISTANT, {"role": "user", "content": "And?"}, ASSISTANT, USER]
    out = build(spec_of(tmp_path, records=[{"messages": turns, "id": n} for n in range(4)]), workers=0)
    zero, one, _ = told(out, 1)
    assert zero == "<|system|>S<|user|>Why?<|assistant|><|user|>And?<|assistant|>", "nothing follows the last answer"
    assert one == "Because.[EOS]Because.[EOS]"


@pytest.mark.parametrize("workers", [0, 2])
def test_conversations_that_teach_nothing_are_counted_by_reason_and_never_end_a_build(tmp_path: Path, workers: int) -> None:
    good = [{"messages": [{"role": "user", "content": f"{n}?"}, ASSISTANT]} for n in range(20)]
    broken: list[Any] = [
        {"messages": [USER]},
        {"messages": []},
        {"messages": "Why?"},
        {"messages": [USER, "Because."]},
        {"messages": [USER, {"role": "assistant"}]},
        {"messages": [USER, {"role": "tool", "content": "4"}, ASSISTANT]},
        {"messages": [{"role": "user", "content": " "}, ASSISTANT]},
        {"messages": [ASSISTANT, USER, ASSISTANT]},
        {"messages": [USER, USER, ASSISTANT]},
        {"text": "x"},
    ]
    out = build(spec_of(tmp_path, records=good[:10] + broken + good[10:], template="llama2"), workers=workers)
    found = manifest.load(out / "own/train")
    assert found.documents == len(good)
    assert found.rejected == {
        "no assistant turn": 2,
        "empty": 2,
        'field "messages" is not a list of messages with role and content': 2,
        "a role that is none of system, user, assistant": 1,
        "the template refuses it: in Llama 2 user and assistant take turns": 2,
        'no field "prompt"': 1,
    }
    kept = [json.loads(line) for line in (out / "own/rejected.jsonl").read_text().splitlines()]
    assert {record["where"] for record in kept} == {f"{tmp_path / 'd.jsonl'}:{number}" for number in range(11, 21)}


def test_a_conversation_whose_words_the_template_would_change_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(GOOD.replace("m.content", "m.content.split('</think>')[-1]"))
    records = [{"prompt": "Why?", "response": answer} for answer in ["Because.", "hm</think>Because.", "So."]]
    out = build(spec_of(tmp_path, records=records, template=str(tmp_path / "t.jinja")), workers=0)
    found = manifest.load(out / "own/train")
    assert (found.documents, found.rejected) == (2, {"the template changes what a message says": 1})


def roles_and_parts(record: dict[str, Any], source: Source) -> Any:
    found = in_record(record, source, "d.jsonl:1")
    return chats(found, source.kind) if isinstance(found, Document) else found


def test_a_pair_of_equal_answers_prefers_nothing_and_is_left_out() -> None:
    assert roles_and_parts({"prompt": "Why?", "chosen": "A", "rejected": "A"}, PAIRS) == "both answers are the same"
    assert not isinstance(roles_and_parts({"prompt": "Why?", "chosen": "A", "rejected": "B"}, PAIRS), str)


def test_a_prompt_may_be_a_list_of_messages() -> None:
    said = [("user", "Why?"), ("assistant", "Because."), ("user", "Why?")]
    prompt = [USER, ASSISTANT, USER]
    whole = {
        "chosen": [*prompt, {"role": "assistant", "content": "A"}],
        "rejected": [*prompt, {"role": "assistant", "content": "B"}],
    }
    pair = [[*said, ("assistant", "A")], [*said, ("assistant", "B")]]
    assert roles_and_parts({"prompt": prompt, "chosen": "A", "rejected": "B"}, PAIRS) == pair
    alone = {key: turns[-1:] for key, turns in whole.items()}
    assert roles_and_parts({"prompt": prompt} | alone, PAIRS) == pair
    assert roles_and_parts(whole, PAIRS) == pair
    assert roles_and_parts({"prompt": prompt, "response": "A"}, CHAT) == [[*said, ("assistant", "A")]]
    assert (
        roles_and_parts({"prompt": [USER, ASSISTANT], "chosen": "A", "rejected": "B"}, PAIRS)
        == "the prompt ends with the assistant"
    )
    wrong = {"prompt": "Q"} | alone | {"chosen": [USER]}
    assert roles_and_parts(wrong, PAIRS) == 'field "chosen" is not one answer of the assistant\'s'


def test_a_conversation_and_a_preference_that_begin_alike_are_held_out_together() -> None:
    chat = in_record({"messages": [{"role": "system", "content": "S"}, USER, ASSISTANT]}, CHAT, "")
    pair = in_record({"prompt": "Why?", "chosen": "A", "rejected": "B"}, PAIRS, "")
    assert isinstance(chat, Document) and isinstance(pair, Document) and chat.key == pair.key == "Why?"


def test_a_build_that_was_interrupted_counts_what_the_template_refuses_once(
    tmp_path: Path, make_spec: Callable[..., Build], monkeypatch: pytest.MonkeyPatch
) -> None:
    from shards.build import split_writer

    records = [{"messages": [USER, ASSISTANT] if n % 5 else [USER, USER, ASSISTANT], "n": n} for n in range(400)]
    path = write(tmp_path / "d.jsonl", records)
    prose = Source(name="prose", kind="text", origin="text", path=__file__)
    small = {
        "source": (Source(name="own", kind="sft", origin="jsonl", path=str(path)), prose),
        "tokenizer": TokenizerSpec(vocab=400, template="llama2"),
        "frame_tokens": 64,
        "shard_tokens": 1024,
        "held_out": 0,
    }
    whole = build(make_spec(tmp_path / "whole", **small), workers=0)
    finish, times = split_writer.SplitWriter.finish, []

    def cut(self: Any) -> None:
        finish(self)
        times.append(1)
        if len(times) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(split_writer.SplitWriter, "finish", cut)
        with pytest.raises(KeyboardInterrupt):
            build(make_spec(tmp_path / "cut", **small), workers=0)
    again = build(make_spec(tmp_path / "cut", **small), workers=0)
    assert manifest.load(again / "own/train").digest == manifest.load(whole / "own/train").digest
    assert sum(manifest.load(again / "own/train").rejected.values()) == 80
