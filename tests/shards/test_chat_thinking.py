"""Templates that write thoughts, or move text: an answer is learned only behind text that it is asked for with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shards.build.build import build
from shards.common.errors import SpecError
from shards.format import manifest
from shards.spec import Build, Data, Source
from shards.spec import TokenizerSpec as TokenizerSpec
from shards.tokenization.chat import NOT_AS_ASKED
from shards.tokenization.templates import Template
from shards.tokenization.tokenizer import Tokenizer, train

TEXTS = [Path(__file__).read_text()]
# As in Qwen3's: an empty thought before the newest answer, none before earlier ones, none in the prompt.
THINKS = (
    "{%- set last = namespace(at=0) -%}{%- for m in messages -%}"
    "{%- if m.role == 'user' -%}{%- set last.at = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' and loop.index0 > last.at -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{{- m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
# A reminder that goes with the newest question alone.
REMINDS = (
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{- '<|ask|>' + m.content -}}"
    "{%- if loop.index0 >= messages | length - 2 -%}{{- '\nBe brief.' -}}{%- endif -%}{{- '<|answer|>' -}}"
    "{%- else -%}{{- m.content + eos_token -}}{%- endif -%}{%- endfor -%}"
)
TAGGED = "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}\n"
TURNS = [("user", "1?"), ("assistant", "One."), ("user", "2?"), ("assistant", "Two.")]


def made(jinja: str) -> Tokenizer:
    template = Template("file", jinja, "t.jinja")
    return Tokenizer(train(TEXTS, vocab=400, template=template), template=template)


def learned(tokenizer: Tokenizer, turns: list[tuple[str, str]]) -> list[str]:
    """What is learned, stretch by stretch."""
    ids, mask = tokenizer.chat(turns)
    found: list[list[int]] = [[]]
    for number, counts in zip(ids, mask, strict=True):
        if counts:
            found[-1].append(number)
        elif found[-1]:
            found.append([])
    return [tokenizer.decode(part, reserved=True) for part in found if part]


def test_a_thought_that_the_prompt_does_not_have_is_learned_with_the_answer() -> None:
    tokenizer = made(THINKS)
    prompt, _ = tokenizer.chat(TURNS[:1])
    ids, mask = tokenizer.chat(TURNS[:2])
    assert ids[: len(prompt)] == prompt and mask.index(1) == len(prompt)
    assert tokenizer.decode(prompt, reserved=True) == "<|im_start|>user\n1?<|im_end|>\n<|im_start|>assistant\n"
    assert learned(tokenizer, TURNS[:2]) == ["<think>\n\n</think>\n\nOne.<|im_end|>"]
    assert tokenizer.stops == {tokenizer.eos, tokenizer.reserved["<|im_end|>"]}, "the end of a thought ends no turn"


def test_an_earlier_answer_that_lost_its_thought_is_context_alone_and_counted() -> None:
    tokenizer = made(THINKS)
    assert learned(tokenizer, TURNS) == ["<think>\n\n</think>\n\nTwo.<|im_end|>"]
    assert tokenizer.decode(tokenizer.chat(TURNS)[0]).count("think") == 2
    assert tokenizer.notes(TURNS) == [NOT_AS_ASKED] and tokenizer.notes(TURNS[:2]) == []


def test_an_earlier_answer_behind_another_question_than_it_is_asked_with_is_context_alone() -> None:
    tokenizer = made(REMINDS)
    assert learned(tokenizer, TURNS) == ["Two.[EOS]"] and tokenizer.notes(TURNS) == [NOT_AS_ASKED]
    always = made(REMINDS.replace("messages | length - 2", "0"))
    assert learned(always, TURNS) == ["One.[EOS]", "Two.[EOS]"] and always.notes(TURNS) == []


@pytest.mark.parametrize(
    ("jinja", "message"),
    [
        (
            THINKS.replace("'<think>\n\n</think>\n\n'", "''").replace("assistant\n' -}}", "assistant\n<think>\n' -}}"),
            r"t.jinja: asks for an answer behind '.*assistant\\n<think>\\n', but writes other text before one",
        ),
        (
            THINKS.replace("{{- m.content + '<|im_end|>\n' -}}", TAGGED),
            r"t.jinja: writes '<think>\\n\\n</think>\\n\\n' before an answer, outside of {% generation %} and of the prompt",
        ),
    ],
    ids=["prompt", "tags"],
)
def test_a_template_that_teaches_answers_behind_other_text_than_it_asks_with_is_refused(jinja: str, message: str) -> None:
    with pytest.raises(SpecError, match=message) as raised:
        made(jinja)
    assert "name another template" in str(raised.value)


def test_a_build_counts_earlier_answers_that_are_not_learned(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(THINKS)
    turns = [{"role": role, "content": content} for role, content in TURNS]
    records = [{"messages": turns}] * 5 + [{"messages": turns[:2]}] * 3
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    source = Source(name="own", kind="sft", origin="jsonl", path=str(tmp_path / "d.jsonl"))
    prose = Source(name="prose", kind="text", origin="text", path=__file__)
    spec = TokenizerSpec(vocab=400, template=str(tmp_path / "t.jinja"))
    out = build(Build(data=Data(source=(source, prose), held_out=0), tokenizer=spec, out=str(tmp_path / "o")), workers=0)
    assert manifest.load(out / "own/train").notes == {NOT_AS_ASKED: 5}
