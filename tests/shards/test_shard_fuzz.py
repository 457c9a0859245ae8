"""What shards, tokenizers and chat templates read, damaged and hostile: it loads, or a ShardError says what and where."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash

from shards.build.build import build
from shards.common.errors import ShardError
from shards.format import manifest
from shards.format.corpus import Corpus
from shards.format.seekable_zstd import HEADER, ColumnFile
from shards.spec import Build, Data, Source, decode_build
from shards.spec import TokenizerSpec as TokenizerSpec
from shards.tokenization.chat import Message
from shards.tokenization.huggingface import CONFIG, from_sentencepiece
from shards.tokenization.jinja import ChatError, Renderer
from shards.tokenization.templates import NAMED, Template
from shards.tokenization.tokenizer import RESERVED, Tokenizer, piece_count, read_model, train
from tests.fuzzing import COUNT, Subject, attack, holds, scratch

TALK: list[Message] = [("user", "What?"), ("assistant", "That.")]
TEXT = ["The river rises in the mountains and flows north.\nif a == b:\n\treturn 日本"] * 20


def small(place: Path) -> Path:
    """A build of one conversation source, with all three columns."""
    source = Source(name="chat", kind="sft", origin="stdlib-sft", max_documents=60)
    data = Data(source=(source,), frame_tokens=256, shard_tokens=4096, held_out=0.1, level=3)
    spec = Build(data=data, tokenizer=TokenizerSpec(vocab=400, sample_bytes=50_000), out=str(place / "out"))
    return build(spec, workers=0)


def read_all(root: Path) -> None:
    corpus = Corpus(root, "chat", "train")
    corpus.read(0, min(corpus.tokens, 5000))
    corpus.read(0, min(corpus.tokens, 5000), "mask")
    corpus.lengths()
    if corpus.documents:
        corpus.span(corpus.documents - 1)
    if corpus.tokens:
        corpus.document_at(corpus.tokens - 1)


def raise_what(directory: Path) -> None:
    found = list(manifest.verify(directory))
    assert all(str(directory) in message for message in found), found
    if found:
        raise ShardError(found[0])


def sealed(raw: bytes) -> bytes:
    """A manifest's own digest, over what it says."""
    try:
        said = msgspec.json.decode(raw, type=manifest.SplitManifest)
        return raw.replace(f'"digest":"{said.digest}"'.encode(), f'"digest":"{said.computed_digest()}"'.encode())
    except (ValueError, RecursionError):
        return raw


def fuzz_manifest(place: Path) -> Subject:
    root = small(place)
    directory = root / "chat" / "train"
    seed = msgspec.json.encode(msgspec.json.decode((directory / manifest.FILE_NAME).read_bytes()))

    def load(raw: bytes) -> None:
        (directory / manifest.FILE_NAME).write_bytes(raw)
        with contextlib.suppress(ShardError):
            read_all(root)
        raise_what(directory)

    return Subject("manifest", [seed], load, (ShardError,), "json", seal=sealed, names=str(directory))


def fuzz_column(place: Path) -> Subject:
    """A column's bytes, with a manifest that names their hashes."""
    root = small(place)
    directory = root / "chat" / "train"
    said = manifest.load(directory)
    whole = {name: (directory / column.file).read_bytes() for name, column in said.shards[0].columns.items()}

    def load(raw: bytes) -> None:
        name = next((name for name, content in whole.items() if raw[:30] == content[:30]), "tokens")
        column = said.shards[0].columns[name]
        length = int.from_bytes(raw[-9:-5], "little") * 12 + HEADER.size + 9 if len(raw) > 9 else 0
        table = xxhash.xxh3_128_hexdigest(raw[-length:])
        known = msgspec.structs.replace(column, bytes=len(raw), hash=xxhash.xxh3_128_hexdigest(raw), table=table)
        columns: dict[str, ColumnFile] = said.shards[0].columns | {name: known}
        shard = msgspec.structs.replace(said.shards[0], columns=columns)
        for other, content in whole.items():
            (directory / said.shards[0].columns[other].file).write_bytes(raw if other == name else content)
        msgspec.structs.replace(said, shards=(shard, *said.shards[1:])).save(directory)
        with contextlib.suppress(ShardError):
            read_all(root)
        raise_what(directory)

    return Subject("column", list(whole.values()), load, (ShardError,), names=str(directory))


def fuzz_spec(place: Path) -> Subject:
    source = Source(name="a", kind="text", origin="jsonl", path="x")
    seed = msgspec.json.encode(Build(data=Data(source=(source,)), out="o"))
    return Subject("spec", [seed], lambda raw: decode_build(raw, "spec.json"), (ShardError,), "json", names="spec.json")


def use(model: bytes, where: str) -> None:
    tokenizer = Tokenizer(model, where)
    for text in ("Hello <s> 日本\n", " \x00é"):
        tokenizer.decode(tokenizer.encode(text), reserved=True)
    tokenizer.chat(TALK)
    tokenizer.piece(tokenizer.vocab - 1)


def fuzz_tokenizer_json(place: Path, what: str) -> Subject:
    file = place / "tokenizer.json"
    reserved = dict(enumerate(RESERVED))
    seed = json.dumps(from_sentencepiece(train(TEXT, vocab=300), reserved)).encode()
    config = {"bos_token": "[BOS]", "eos_token": {"content": "[EOS]"}, "pad_token": None, "chat_template": "{{ bos_token }}"}
    (place / CONFIG).write_text(json.dumps(config))
    file.write_bytes(seed)

    def load(raw: bytes) -> None:
        (place / what).write_bytes(raw)
        piece_count(file)
        use(read_model(file), str(file))

    seeds = [seed] if what == file.name else [json.dumps(config).encode()]
    return Subject(what, seeds, load, (ShardError, ChatError), "json", quick=400)


def fuzz_tokenizer_model(place: Path) -> Subject:
    file = place / "tokenizer.model"

    def load(raw: bytes) -> None:
        file.write_bytes(raw)
        piece_count(file)
        use(read_model(file), str(file))
        from_sentencepiece(raw, {0: "[PAD]"})

    return Subject("tokenizer.model", [train(TEXT, vocab=300)], load, (ShardError, ChatError))


def fuzz_template(place: Path) -> Subject:
    model = train(TEXT, vocab=300)

    def load(raw: bytes) -> None:
        jinja = raw.decode(errors="replace")
        tokenizer = Tokenizer(model, "tokenizer", Template("file", jinja, "chat.jinja"))
        tokenizer.chat(TALK)

    return Subject("template", [jinja.encode() for jinja in NAMED.values()], load, (ShardError, ChatError), quick=500)


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "manifest": fuzz_manifest,
    "column": fuzz_column,
    "spec": fuzz_spec,
    "tokenizer.json": lambda place: fuzz_tokenizer_json(place, "tokenizer.json"),
    CONFIG: lambda place: fuzz_tokenizer_json(place, CONFIG),
    "tokenizer.model": fuzz_tokenizer_model,
    "template": fuzz_template,
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_damaged_or_hostile_input_loads_or_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with scratch(tmp_path) as place:
        holds(SUBJECTS[name](place))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SUBJECTS)
def test_thousands_of_damaged_or_hostile_inputs_load_or_are_refused_by_name(tmp_path: Path, name: str, seed: int) -> None:
    with scratch(tmp_path) as place:
        holds(SUBJECTS[name](place), COUNT, seed)


TURNS = (
    "{% for m in messages %}{{ m['role'] + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
DOUBLING = "{% set ns = namespace(x='aa') %}{% for i in range(64) %}{% set ns.x = WAY %}{% endfor %}"
HOSTILE = {
    "a long range": "{% for i in range(10**9) %}{% endfor %}",
    "nested loops": "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro a(n) %}{{ a(n) }}{{ a(n) }}{% endmacro %}{{ a(1) }}",
    "text times a number": "{% set x = 'a' * 10**9 %}",
    "a number times a list": "{% set x = 10**9 * [0] %}",
    "a constant": "{{ 'a' * 999999 * 999999 }}",
    "a power": "{{ 2**100000000 }}",
    "squares": DOUBLING.replace("'aa'", "9").replace("WAY", "ns.x * ns.x"),
    "sums": DOUBLING.replace("WAY", "ns.x + ns.x"),
    "concatenations": DOUBLING.replace("WAY", "ns.x ~ ns.x"),
    "a long separator": "{{ range(60000)|join('x' * 1000000) }}",
    "a long separator's method": "{{ ('x' * 1000000).join(range(60000)|map('string')|list) }}",
    "a long indent": "{% set x = ('a\n' * 60000)|indent('x' * 1000000) %}",
    "a long line end": "{{ ('a ' * 60000)|wordwrap(1, true, 'x' * 1000000) }}",
    "a long translation": "{{ ('a' * 60000).translate({97: 'x' * 1000000}) }}",
    "joins": DOUBLING.replace("WAY", "[ns.x, ns.x]|join"),
    "replacements": DOUBLING.replace("WAY", "ns.x.replace('a', 'aaaa')"),
    "lists of lists": DOUBLING.replace("WAY", "[ns.x, ns.x]"),
    "a wide %": "{{ '%1000000000d' % 1 }}",
    "a width that is given": "{{ '%*d' % (10**9, 1) }}",
    "a wide format": "{{ '{:>1000000000}'.format('a') }}",
    "a wide filter": "{{ 'a'|center(10**9) }}",
    "an indent": "{{ ('a\n' * 1000)|indent(10**7) }}",
    "a wide method": "{{ 'a'.ljust(10**9) }}",
    "batches": "{{ [1]|batch(10**9, 0)|list }}",
    "slices": "{{ [1]|slice(10**9)|list }}",
    "JSON": "{{ messages|tojson(indent=10**8) }}",
    "long output": "{% for i in range(9999) %}{{ 'x' * 100000 }}{% endfor %}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "deep blocks": "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    "filler text": "{{ lipsum(n=10**7) }}",
    "an include": "{% include 'x' %}",
    "a filter that is not there": "{{ 'a'|nothing }}",
    "a long template": "a" * (1 << 20) + "b",
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_template_without_end_is_refused_in_a_moment(tmp_path: Path, what: str) -> None:
    model = train(TEXT, vocab=300)

    def load(raw: bytes) -> None:
        with pytest.raises(ShardError, match=r"^tokenizer: template: chat\.jinja:"):
            Tokenizer(model, "tokenizer", Template("file", raw.decode() + TURNS, "chat.jinja"))

    subject = Subject("hostile template", [HOSTILE[what].encode()], load)
    assert attack(subject, 0) == []


def test_a_long_conversation_is_within_what_a_template_may_do() -> None:
    """A budget that grows with the conversation: 2,000 turns, and a message of a million characters."""
    render = Renderer(Template("file", NAMED["llama3"] + "{{ messages|tojson|length }}", "chat.jinja"), {"bos_token": "<s>"})
    turns = [{"role": ("user", "assistant")[number % 2], "content": f"{number} " * 50} for number in range(2000)]
    assert "1999 1999" in render(turns, False)
    assert len(render([{"role": "user", "content": "é" * 1_000_000}], True)) > 1_000_000


def manifest_of(place: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A small build whose manifest says something else, with the digest of just that."""
    directory = small(place) / "chat" / "train"
    said = json.loads((directory / manifest.FILE_NAME).read_bytes())
    change(said)
    (directory / manifest.FILE_NAME).write_bytes(sealed(json.dumps(said, separators=(",", ":")).encode()))
    return directory


def in_shard(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda said: said["shards"][0]["columns"]["tokens"].update(changes)


CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a type of number that is none": (in_shard(dtype="uijt16"), "column tokens is of type 'uijt16'"),
    "a type of thousands of digits": (lambda said: said.update(dtype="9" * 5000), "column tokens is of type 'uint16'"),
    "more items than the shard": (in_shard(items=10**6), "column tokens has 1000000 items"),
    "a column that is missing": (lambda said: said["shards"][0]["columns"].pop("ends"), r"its columns are \['mask', 'tokens'\]"),
    "a column too many": (
        lambda said: said["shards"][0]["columns"].update(x=said["shards"][0]["columns"]["ends"]),
        "its columns are",
    ),
    "frames of nothing": (lambda said: said.update(frame_items=0), "in frames of 0 items"),
    "frames without end": (lambda said: said.update(frame_items=2**40), "in frames of 1099511627776 items"),
    "more tokens than its shards": (lambda said: said.update(tokens=said["tokens"] + 1), "its tokens are not those of its shards"),
    "more than 64 bits": (lambda said: said.update(tokens=10**23), "not a manifest: Expected `int` <="),
    "a name with a NUL": (in_shard(file="a\0b"), "outside its directory"),
    "another split": (lambda said: said.update(split="test"), "split 'test'"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_a_manifest_that_contradicts_itself_is_refused_though_its_digest_is_right(tmp_path: Path, what: str) -> None:
    change, says = CONTRADICTIONS[what]
    directory = manifest_of(tmp_path, change)
    with pytest.raises(ShardError, match=says):
        manifest.load(directory)
    assert len(list(manifest.verify(directory))) == 1
