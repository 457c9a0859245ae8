"""A Hugging Face directory's tokenizer gives the ids of `transformers`, or it is refused and the two files are named."""

from __future__ import annotations

import base64
import io
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from shards.common.errors import SpecError
from shards.spec import TokenizerSpec as TokenizerSpec
from shards.tokenization.huggingface_directory import QWEN2_SPLIT
from shards.tokenization.templates import DEFAULT, read
from shards.tokenization.tokenizer import RESERVED, Tokenizer, read_model
from trainer.huggingface.tokenizer import files

transformers = pytest.importorskip("transformers")

Files = dict[str, Any]
DOCS = Path(__file__).parents[2] / "docs"
PIECES = [
    "Hello",
    " world",
    "  ",
    "\n",
    "\t",
    "def f(x):\n    return x",
    "naïve café",
    "Ελλάδα",
    "日本語の文",
    "🙂👩‍👩‍👧",
    "ﬁ ＡＢＣ",
    "\u2581",
    "\r\n",
    "العربية",
]
PIECES += [
    "0123456789",
    "a" * 40,
    "<z>",
    "<|im_end|>",
    "<|im_start|>user",
    "</s>",
    "<s>",
    "<unk>",
    "<|endoftext|>",
    "[BOS]",
    "\u200b",
    ".",
    "!",
]
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@cache
def texts() -> list[str]:
    rng = random.Random(3)
    found = ["", " ", "\n", *PIECES, *(f" {piece}" for piece in PIECES), *(f"{piece} end" for piece in PIECES)]
    while len(found) < 200:
        found.append(rng.choice(["", " "]).join(rng.choices(PIECES, k=rng.randint(2, 9))))
    return found


@cache
def lines() -> list[str]:
    return [line for file in sorted(DOCS.glob("*.md"))[:4] for line in file.read_text().split("\n") if line.strip()]


@cache
def sentence_pieces(**settings: Any) -> bytes:
    given: Any = {"model_type": "bpe", "vocab_size": 500, "byte_fallback": True, "normalization_rule_name": "identity"}
    settings = {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()}
    given |= {"add_dummy_prefix": True, "remove_extra_whitespaces": False, "minloglevel": 3}
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines()), model_writer=out, **given | settings)
    return out.getvalue()


@cache
def _byte_level(prefix: bool) -> str:
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Fast

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(lines(), trainer)
    fast.add_tokens([AddedToken(name, special=False, normalized=False) for name in ("<|im_start|>", "<|im_end|>")])
    return str(fast.to_str())


def byte_level(prefix: bool = False, **changes: Any) -> Files:
    found: Files = json.loads(_byte_level(prefix)) | changes
    return found


def qwen2() -> Files:
    split = {"type": "Split", "pattern": {"Regex": QWEN2_SPLIT}, "behavior": "Isolated", "invert": False}
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return byte_level(normalizer={"type": "NFC"}, pre_tokenizer={"type": "Sequence", "pretokenizers": [split, last]})


def converted(**settings: Any) -> Files:
    """The tokenizer.json that releases of `transformers` before 5 made of a SentencePiece model."""
    from shards.tokenization.huggingface_directory import _merges
    from shards.tokenization.sentencepiece_model import parse

    vocab = {name: number for number, (name, _, _) in enumerate(parse(sentence_pieces())[0])}
    normalizers = [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]
    added = [token(number, name, named=True) for number, name in enumerate(("<unk>", "<s>", "</s>"))]
    added += [token(500, "<|im_end|>", named=True), token(501, "<z>", special=False, normalized=True, named=True)]
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None}
    model |= {"fuse_unk": True, "byte_fallback": True, "ignore_merges": False, "vocab": vocab, "merges": _merges(vocab)}
    decoders = [{"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]
    found: Files = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "pre_tokenizer": None}
    found |= {"normalizer": {"type": "Sequence", "normalizers": normalizers}, "post_processor": None, "model": model}
    return found | {"decoder": {"type": "Sequence", "decoders": decoders}} | settings


def token(number: int, content: str, special: bool = True, named: bool = False, **more: Any) -> Files:
    """An entry of added_tokens_decoder, or with its id inside one of added_tokens."""
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": special} | more
    return {"id": number, "content": content} | flags if named else {str(number): {"content": content} | flags}


TIKTOKEN = "".join(f"{base64.b64encode(bytes([number])).decode()} {number}\n" for number in range(256)).encode()
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
TWO = {"added_tokens.json": {"<|im_end|>": 500, "<z>": 501}}
END = {"eos_token": "<|endoftext|>"}
LISTED = token(500, "<|im_end|>") | token(501, "<z>", special=False)


def sp(config: Files, /, **more: Any) -> Files:
    return {"tokenizer.model": sentence_pieces(), "tokenizer_config.json": config} | more


def fast(config: Files | None = None, kind: str = "llama", /, **more: Any) -> Files:
    found: Files = {"tokenizer.json": byte_level(), "config.json": {"model_type": kind}}
    return found | ({} if config is None else {"tokenizer_config.json": config}) | more


CASES: dict[str, Files] = {
    "sentencepiece": sp(LLAMA),
    "added tokens": sp(LLAMA, **TWO),
    "an added token ends a text": sp(LLAMA | {"eos_token": "<|im_end|>"}, **TWO),
    "added tokens in the configuration": sp(LLAMA | {"added_tokens_decoder": LISTED}),
    "added tokens in both": sp(LLAMA | {"added_tokens_decoder": LISTED}, **{"added_tokens.json": {"<w>": 502}}),
    "an added token takes blanks": sp(LLAMA | {"added_tokens_decoder": token(500, "<z>", special=False, lstrip=True, rstrip=True)}),
    "a map of special tokens": sp(LLAMA, **TWO, **{"special_tokens_map.json": {"eos_token": "<|im_end|>", "pad_token": "<unk>"}}),
    "a map alone": {
        "tokenizer.model": sentence_pieces(add_dummy_prefix=False),
        "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>", "normalized": False}},
        **TWO,
    },
    "legacy": sp(LLAMA | {"legacy": True}, **TWO),
    "not legacy": sp(LLAMA | {"legacy": False}, **TWO),
    "no space first": {
        "tokenizer.model": sentence_pieces(add_dummy_prefix=False),
        "tokenizer_config.json": LLAMA | {"add_prefix_space": False},
        **TWO,
    },
    "bos and eos are put": sp(LLAMA | {"add_bos_token": True, "add_eos_token": True}),
    "no bos": sp(LLAMA | {"bos_token": None}),
    "user-defined pieces": {
        "tokenizer.model": sentence_pieces(user_defined_symbols=("<z>", "\n"), control_symbols=("<|im_end|>",)),
        "tokenizer_config.json": LLAMA,
    },
    "a new pad": sp(LLAMA | {"pad_token": "<pad>"}),
    "both files": sp(LLAMA, **{"tokenizer.json": converted()}),
    "both files, legacy": sp(LLAMA | {"legacy": True}, **{"tokenizer.json": converted()}),
    "both files, as it is": sp(FAST | {"bos_token": "<s>", "eos_token": "<|im_end|>"}, **{"tokenizer.json": converted()}),
    "tiktoken's beside": fast(FAST | END, **{"tokenizer.model": TIKTOKEN}),
    "byte level": fast(FAST | END),
    "of a Llama class": fast({"tokenizer_class": "LlamaTokenizerFast"} | END),
    "nothing beside": fast(),
    "no class": fast(END),
    "bos is null": fast(FAST | END | {"bos_token": None}),
    "special in one file": fast(
        FAST | {"eos_token": "<|im_end|>", "added_tokens_decoder": token(500, "<|im_start|>") | token(501, "<|im_end|>")}
    ),
    "special by its role": fast(FAST | {"eos_token": "<|im_end|>"}),
    "special by a map": fast(FAST | END, **{"special_tokens_map.json": {"eos_token": "<|im_end|>"}}),
    "a map that is not looked at": fast(
        FAST | END | {"added_tokens_decoder": token(501, "<|im_end|>")}, **{"special_tokens_map.json": {"eos_token": "<|im_end|>"}}
    ),
    "an eos that is new": fast(FAST | {"eos_token": "<eos!>"}),
    "an added token that is new": fast(FAST | END, **{"added_tokens.json": {"<z>": 502}}),
    "listed as new": fast(FAST | END | {"added_tokens_decoder": token(502, "<z>", special=False)}),
    "other flags": fast(FAST | END | {"added_tokens_decoder": token(501, "<|im_end|>", special=False, lstrip=True)}),
    "a pad by the padding": fast(
        FAST | END, **{"tokenizer.json": byte_level(padding={
            "strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None, "pad_id": 500, "pad_type_id": 0,
            "pad_token": "<|im_start|>",
        })}
    ),
    "a space by the configuration": fast(FAST | END | {"add_prefix_space": True}),
    "GPT-2": fast({"tokenizer_class": "GPT2Tokenizer"}, "gpt2"),
    "GPT-2, a space by the configuration": fast({"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True}, "gpt2"),
    "GPT-2, a space by the other file": fast({}, "gpt2", **{"tokenizer.json": byte_level(prefix=True)}),
    "GPT-2, as it is": fast(FAST | END, "gpt2", **{"tokenizer.json": byte_level(prefix=True)}),
    "Qwen2": fast({"tokenizer_class": "Qwen2Tokenizer", "bos_token": None} | END, **{"tokenizer.json": qwen2()}),
    "Qwen2, ChatML": fast({"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>"}, **{"tokenizer.json": qwen2()}),
    "of a Mistral": fast(LLAMA | END, "mistral", **{"tokenizer.json": converted()}),
    "a special token without a role": fast(FAST | END | {"additional_special_tokens": ["<img>"], "image_token": "<image>"}),
    "ends by the generation": fast(FAST | END, **{"generation_config.json": {"eos_token_id": [0, 501]}}),
    "ends by the model": fast(FAST | END, **{"config.json": {"model_type": "llama", "eos_token_id": 501}}),
    "no end by the model": fast(FAST | END, **{"config.json": {"model_type": "llama", "eos_token_id": -1}}),
}  # fmt: skip


def write(place: Path, content: Files) -> Path:
    place.mkdir()
    for name, body in ({"config.json": {"model_type": "llama"}} | content).items():
        (place / name).write_bytes(body if isinstance(body, bytes) else json.dumps(body).encode())
    return place


def tokenizer(place: Path, template: str = "midwatch") -> Tokenizer:
    """As a recipe that begins from the directory gets it. Raises SpecError."""
    file = next(place / name for name in ("tokenizer.json", "tokenizer.model") if (place / name).exists())
    return Tokenizer(
        read_model(file), str(file), DEFAULT if template == "midwatch" else read(TokenizerSpec(path=str(file), template=template))
    )


def agree(theirs: Any, ours: Tokenizer, count: int = 200) -> None:
    """The same special ids, and the same ids of texts; texts give none of the special ones."""
    assert ours.bos == theirs.bos_token_id
    for role in ("eos", "pad", "unk"):
        number = getattr(theirs, f"{role}_token_id")
        own_pad = role == "pad" and number in (theirs.eos_token_id, theirs.bos_token_id)
        assert ours.reserved[f"[{role.upper()}]"] == number or number is None or own_pad, role
    assert ours.eos in ours.stops
    never = set(ours.reserved.values()) | set(ours.stops)
    hidden = {entry["content"] for entry in json.loads(ours.model)["tokenizer"]["added_tokens"] if entry["special"]}
    known = {str(token) for token in theirs.added_tokens_decoder.values() if token.special}
    for text in texts()[:count]:
        ids = ours.encode(text)
        assert not never & set(ids), text
        # A token that is special in one file alone, `transformers` finds in a text, and so it may not be in one here.
        if not any(content in text for content in hidden - known):
            assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids, text


@pytest.mark.parametrize("name", CASES)
def test_every_special_id_and_the_ids_of_texts_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    place = write(tmp_path / "it", CASES[name])
    agree(transformers.AutoTokenizer.from_pretrained(place), tokenizer(place))


def named_token(content: str) -> Files:
    return {"__type": "AddedToken", "content": content, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}


def drawn(rng: random.Random) -> Files:
    """A directory put together at random."""
    names = [
        "<s>",
        "</s>",
        "<|endoftext|>",
        "<|im_end|>",
        "<z>",
        "<new>",
        {"content": "<|im_end|>"},
        {"content": "<z>", "lstrip": True},
    ]
    found: Files = {}
    model = sentence_pieces(**rng.choice([{}, {"add_dummy_prefix": False}, {"user_defined_symbols": ("<z>",)}]))
    if rng.random() < 0.6:
        found["tokenizer.model"] = rng.choice([model, model, TIKTOKEN])
    if rng.random() < 0.6 or not found:
        found["tokenizer.json"] = rng.choice([byte_level(), byte_level(prefix=True), qwen2(), converted(), converted()])
    config = {f"{role}_token": rng.choice([None, *names]) for role in ("bos", "eos", "pad", "unk") if rng.random() < 0.5}
    config |= {
        key: rng.random() < 0.5 for key in ("legacy", "add_prefix_space", "add_bos_token", "add_eos_token") if rng.random() < 0.3
    }
    classes = ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer"]
    config |= {"tokenizer_class": rng.choice(classes)} if rng.random() < 0.8 else {}
    config |= {"additional_special_tokens": rng.sample(["<z>", "<img>", "<|im_start|>"], 2)} if rng.random() < 0.3 else {}
    entries = token(500, "<|im_end|>", rng.random() < 0.5) | token(501, "<z>", rng.random() < 0.5, rstrip=rng.random() < 0.5)
    entries |= token(rng.choice([0, 502]), rng.choice(["<w>", "<unk>"]))
    config |= {"added_tokens_decoder": entries} if rng.random() < 0.3 else {}
    if rng.random() < 0.8:
        found["tokenizer_config.json"] = config
    if rng.random() < 0.3:
        found["special_tokens_map.json"] = {f"{role}_token": rng.choice(names) for role in ("bos", "eos") if rng.random() < 0.5}
    if rng.random() < 0.3:
        found["added_tokens.json"] = rng.choice([{"<|im_end|>": 500, "<z>": 501}, {"<z>": 502}, {"<z>": 600}])
    if rng.random() < 0.3:
        found["generation_config.json"] = {"eos_token_id": rng.choice([0, 2, [2, 500], 501, [501, 600]])}
    return found | {"config.json": {"model_type": rng.choice(["llama", "llama", "mistral", "gpt2", "bloom"])}}


def compare_drawn(seeds: range, place: Path) -> dict[str, int]:
    """How many directories were read, and how many refused."""
    met = {"read": 0, "refused": 0, "not by transformers": 0}
    for seed in seeds:
        content = drawn(random.Random(seed))
        it = write(place / str(seed), content)
        bare = "tokenizer.json" not in content and not {
            "tokenizer_config.json",
            "added_tokens.json",
            "special_tokens_map.json",
        } & set(content)
        try:
            ours = tokenizer(it)
        except SpecError as error:
            print(f"seed {seed}: {error}")
            met["refused"] += 1
            continue
        try:
            theirs = transformers.AutoTokenizer.from_pretrained(it)
        except Exception as error:  # it raises whatever it meets with
            print(f"seed {seed}: {type(error).__name__}: {error}"[:200])
            met["not by transformers"] += 1
            continue
        met["read"] += 1
        if not bare:
            try:
                agree(theirs, ours, 90)
            except AssertionError as error:
                shown = {name: body for name, body in content.items() if name not in ("tokenizer.json", "tokenizer.model")}
                raise AssertionError(f"seed {seed}: {sorted(content)} {shown}: {error}") from None
    return met


def test_a_directory_at_random_is_refused_or_has_the_ids_of_transformers(tmp_path: Path) -> None:
    assert compare_drawn(range(30), tmp_path)["read"] > 5


@pytest.mark.soak
def test_any_directory_is_refused_or_has_the_ids_of_transformers(tmp_path: Path) -> None:
    met = compare_drawn(range(30, 1000), tmp_path)
    print(met)
    assert met["read"] > 200


def test_stops_are_all_that_the_files_call_an_end(tmp_path: Path) -> None:
    assert tokenizer(write(tmp_path / "a", CASES["ends by the generation"])).stops == {0, 501}
    found = tokenizer(write(tmp_path / "b", fast(None, **{"generation_config.json": {"eos_token_id": [501, 0]}})))
    assert (found.eos, found.stops) == (501, {0, 501}), "no file of the tokenizer names one"


def test_a_tokenizer_without_bos_puts_nothing_before_a_text(tmp_path: Path) -> None:
    found = tokenizer(write(tmp_path / "it", CASES["bos is null"]))
    assert found.bos is None and "[BOS]" not in found.reserved
    assert found.encode_texts(["hi"])[0].tolist() == [*found.encode("hi"), found.eos]
    assert found.prompt("hi") == found.encode("hi") and found.prompt("") == [found.eos]
    assert len(found.reserved) == len(RESERVED) - 1


@pytest.mark.parametrize("file", ["tokenizer.model", "tokenizer.json"])
def test_a_chat_by_the_tokenizers_own_template_has_the_ids_of_transformers(file: str, tmp_path: Path) -> None:
    listed = {"added_tokens.json": {"<|im_end|>": 500, "<|im_start|>": 501}}
    config = LLAMA | {"eos_token": "<|im_end|>", "additional_special_tokens": ["<|im_start|>"], "chat_template": CHATML}
    place = write(tmp_path / "it", sp(config, **listed, **{"generation_config.json": {"eos_token_id": [500, 2]}}))
    if file == "tokenizer.json":
        (place / file).write_text(transformers.AutoTokenizer.from_pretrained(place).backend_tokenizer.to_str())
    theirs, ours = transformers.AutoTokenizer.from_pretrained(place), tokenizer(place, "own")
    chat = [{"role": "user", "content": "  Say a word. "}, {"role": "assistant", "content": "River."}]
    assert ours.chat(chat)[0] == theirs.apply_chat_template(chat, return_dict=False)
    assert (ours.eos, ours.stops, ours.vocab >= 502) == (500, {500, 2}, True)
    assert "<|im_end|>" not in ours.refusal([("user", "what is <|im_end|>?"), ("assistant", "an end")]), "it is text there"
    assert 500 not in ours.chat([("user", "what is <|im_end|>?")])[0][2:8]


def exported(ours: Tokenizer, place: Path) -> Any:
    """What `transformers` makes of an export."""
    place.mkdir()
    for file, body in files(ours, 128).items():
        (place / file).write_bytes(body)
    (place / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return transformers.AutoTokenizer.from_pretrained(place)


EXPORTS = ("added tokens", "legacy", "no bos", "both files", "special in one file", "GPT-2, a space by the configuration")


@pytest.mark.parametrize("name", EXPORTS)
def test_an_export_gives_the_ids_that_were_trained_and_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    ours = tokenizer(write(tmp_path / "it", CASES[name]))
    theirs, back = exported(ours, tmp_path / "out"), tokenizer(tmp_path / "out")
    assert (back.reserved, back.vocab, back.bos) == (ours.reserved, ours.vocab, ours.bos)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos, ours.eos, ours.pad)
    for text in texts():
        ids = ours.encode(text)
        assert back.encode(text) == ids, text
        assert theirs(text, split_special_tokens=True).input_ids == [*ours.beginning, *ids], text


LLAMA3 = (
    "{{- bos_token }}{%- for message in messages %}{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)


def test_an_export_has_one_bos_before_a_text_and_one_before_a_chat(tmp_path: Path) -> None:
    names = ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>")
    begin = {"id": names[0], "type_id": 0}, {"Sequence": {"id": "A", "type_id": 0}}
    puts: Files = {"type": "TemplateProcessing", "single": [{"SpecialToken": begin[0]}, begin[1]], "pair": [begin[1], begin[1]]}
    puts |= {"special_tokens": {names[0]: {"id": names[0], "ids": [502], "tokens": [names[0]]}}}
    added = [*byte_level()["added_tokens"], *(token(502 + at, name, named=True) for at, name in enumerate(names))]
    source = byte_level(added_tokens=added, post_processor=puts)
    config = FAST | {"bos_token": names[0], "eos_token": names[1], "chat_template": LLAMA3}
    ours = tokenizer(write(tmp_path / "it", fast(config, **{"tokenizer.json": source})), "own")
    theirs = exported(ours, tmp_path / "out")
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    trained = ours.chat(chat)[0]
    assert trained.count(502) == 1
    assert theirs.apply_chat_template(chat, return_dict=False) == trained
    rendered = theirs.apply_chat_template(chat, tokenize=False)
    assert theirs(rendered, add_special_tokens=False).input_ids == trained, "as vLLM's chat does it"
    document = ours.encode_texts(["hello"])[0].tolist()
    assert theirs("hello").input_ids == document[:-1] and document[0] == 502 and document[-1] == ours.eos


REFUSED: dict[str, tuple[Files, tuple[str, ...]]] = {
    "another id": (sp(LLAMA, **{"added_tokens.json": {"<|im_end|>": 505}}), ("added_tokens.json", "tokenizer.model", "505", "500")),
    "an id of another token": (
        fast(FAST | END | {"added_tokens_decoder": token(501, "<|other|>")}),
        ("tokenizer_config.json", "tokenizer.json", "<|other|>", "501"),
    ),
    "normalized": (
        {
            "tokenizer.model": sentence_pieces(normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True),
            "tokenizer_config.json": LLAMA,
        },
        ("tokenizer.model normalizes text", "tokenizer_config.json"),
    ),
    "unigram": (
        {"tokenizer.model": sentence_pieces(model_type="unigram"), "tokenizer_config.json": LLAMA},
        ("tokenizer.model is no BPE model", "tokenizer_config.json"),
    ),
    "a space by one": (sp(LLAMA | {"add_prefix_space": False}), ("tokenizer.model puts a space", "tokenizer_config.json")),
    "a space by the class": (sp(FAST), ("tokenizer.model puts a space", "tokenizer_config.json", "PreTrainedTokenizerFast")),
    "an end that is a word": (
        fast(FAST | END, **{"generation_config.json": {"eos_token_id": [0, 66]}}),
        ("generation_config.json says that id 66 ends a text, in tokenizer.json it is the ordinary piece",),
    ),
    "an end that is nothing": (
        fast(FAST | END, **{"config.json": {"model_type": "llama", "eos_token_id": 9000}}),
        ("config.json says that id 9000 ends a text, in tokenizer.json it is no token",),
    ),
    "not listed": (
        sp(LLAMA | {"added_tokens_decoder": token(500, "<|im_end|>")}, **{"tokenizer.json": converted()}),
        ("tokenizer.json has the added token", "tokenizer_config.json has none such"),
    ),
    "tiktoken's alone": ({"tokenizer.model": TIKTOKEN, "tokenizer_config.json": LLAMA}, ("not a SentencePiece model",)),
    "of Qwen2's class, another way to split": (
        fast({"tokenizer_class": "Qwen2TokenizerFast"} | END),
        ("tokenizer.json splits text in another way than Qwen2Tokenizer", "tokenizer_config.json"),
    ),
    "of GPT-2's class, another way to split": (
        fast({"tokenizer_class": "GPT2Tokenizer"} | END, **{"tokenizer.json": qwen2()}),
        ("tokenizer.json splits text in another way than GPT2Tokenizer", "tokenizer_config.json", '"PreTrainedTokenizerFast"'),
    ),
    "an end that is no number": (
        fast(FAST | END, **{"config.json": {"model_type": "llama", "eos_token_id": "two"}}),
        ("config.json says 'two', which is no token's number (correct eos_token_id)",),
    ),
    "of an unknown class": (
        fast({"tokenizer_class": "GemmaTokenizerFast"} | END),
        ("tokenizer_config.json says 'GemmaTokenizer'", "whatever tokenizer.json says", '"PreTrainedTokenizerFast"'),
    ),
    "a token that is a number": (fast(FAST | {"eos_token": 5}), ("tokenizer.json", "or the files beside it are not")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_as_transformers_reads_it_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, said = REFUSED[name]
    with pytest.raises(SpecError) as raised:
        tokenizer(write(tmp_path / "it", content))
    assert all(part in str(raised.value) for part in said), str(raised.value)
    assert "\n" not in str(raised.value)
