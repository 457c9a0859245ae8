"""An exported tokenizer, loaded by `transformers`, gives our ids; one brought along as a tokenizer.json gives its own."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from shards.build.build import build
from shards.common.errors import SpecError
from shards.readers.sources import ReadPosition
from shards.readers.splits import split
from shards.spec import Build, Data, Source
from shards.spec import TokenizerSpec as TokenizerSpec
from shards.tokenization.huggingface import bundle
from shards.tokenization.records import Document
from shards.tokenization.tokenizer import RESERVED, Tokenizer, piece_count, train
from trainer.huggingface.tokenizer import TokenizerError, files

transformers = pytest.importorskip("transformers")

CHATS: list[list[dict[str, str]]] = [
    [{"role": "user", "content": "What is it?"}],
    [{"role": "system", "content": " Be brief.\n"}, {"role": "user", "content": "  def f(): pass "}],
    [{"role": "user", "content": "a\n\nb"}, {"role": "assistant", "content": "c {{ d }} <b>\n"}],
    [
        {"role": "user", "content": "é"},
        {"role": "assistant", "content": "ü"},
        {"role": "user", "content": "'quoted' \"twice\""},
    ],
]
ODD = [
    "",
    " ",
    "   leading and trailing   ",
    "\n",
    "\n\n \n\t\r\n",
    "naïve Ελλάδα 日本語 🙂👩‍👩‍👧 \u200b\u0000\u001f",
    "\u2581 looks like a space, \u2581\u2581",
    "<0x0A> and <unk> and [UNX]",
    "x" * 3000,
    " " * 500 + "deep",
    "0123456789" * 40,
]


def texts(count: int) -> list[str]:
    """Documents of the standard library."""
    found = []
    for _, record, _ in split(Source(name="code", kind="text", origin="stdlib-code"), 0.0, 0, ReadPosition()):
        if isinstance(record, Document):
            found.append("".join(record.parts)[:6000])
        if len(found) == count:
            break
    return found


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return texts(120)


def exported(tokenizer: Tokenizer, place: Path) -> Any:
    """As `transformers` loads it."""
    place.mkdir(exist_ok=True)
    for name, body in files(tokenizer, 128).items():
        (place / name).write_bytes(body)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": tokenizer.vocab}
    (place / "config.json").write_text(json.dumps(config))
    return transformers.AutoTokenizer.from_pretrained(place)


def same(theirs: Any, ours: Tokenizer, corpus: list[str]) -> None:
    """The same ids for every text, the same text for them, and the same ids for every conversation."""
    for text in corpus:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == [ours.bos, *ids], text[:200]
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text[:200]
        assert theirs.decode(ids) == ours.decode(ids), text[:200]
    for chat in CHATS:
        ids, _ = ours.chat(chat)
        found = theirs.apply_chat_template(chat, add_generation_prompt=chat[-1]["role"] != "assistant", return_dict=False)
        assert found == ids, chat
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (ours.bos, ours.eos, ours.pad)
    for name in RESERVED:
        number = ours.reserved[name]
        assert theirs.convert_tokens_to_ids(ours.own_name(number) or name) == number
    with pytest.raises(Exception, match="roles are system, user and assistant"):
        theirs.apply_chat_template([{"role": "tool", "content": "x"}])


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_tokenizer_that_was_trained_here_is_the_same_in_transformers(kind: Any, corpus: list[str], tmp_path: Path) -> None:
    ours = Tokenizer(train(corpus[:60], vocab=900, kind=kind))
    # Hundreds of the same character can be cut in many ways that a unigram model likes equally; which it takes is a matter of
    # how sums are rounded, in float32 there and in float64 here.
    odd = ODD if kind == "bpe" else [text for text in ODD if "    " not in text]
    same(exported(ours, tmp_path / "out"), ours, [*odd, *corpus])


def test_a_sentencepiece_model_that_puts_a_space_first_is_the_same_in_transformers(corpus: list[str], tmp_path: Path) -> None:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in corpus[:60] for line in text.split("\n")),
        model_writer=out,
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=3,
    )
    ours = Tokenizer(out.getvalue())
    assert ours.vocab == 905, "the reserved tokens that it lacks have ids past its end"
    theirs = exported(ours, tmp_path / "out")
    for text in [*ODD[1:6], *corpus[:40]]:
        assert theirs(text)["input_ids"] == [ours.bos, *ours.encode(text)], text[:200]
    for chat in CHATS:
        found = theirs.apply_chat_template(chat, add_generation_prompt=chat[-1]["role"] != "assistant", return_dict=False)
        assert found == ours.chat(chat)[0]


def test_a_sentencepiece_model_that_has_no_counterpart_is_refused(corpus: list[str]) -> None:
    out = io.BytesIO()
    lines = [line for text in corpus[:20] for line in text.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, model_type="char", vocab_size=80, minloglevel=3
    )
    with pytest.raises((SpecError, TokenizerError), match="no counterpart"):
        files(Tokenizer(out.getvalue()), 128)


@pytest.fixture
def foreign(tmp_path: Path, corpus: list[str]) -> Path:
    """A directory with a byte-level BPE as Llama 3's: its own ends of a text, no roles."""
    from tokenizers import Tokenizer as Fast
    from tokenizers import decoders, models, pre_tokenizers, trainers

    fast = Fast(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(corpus[:40], trainer)
    place = tmp_path / "foreign"
    place.mkdir()
    fast.save(str(place / "tokenizer.json"))
    config = {"bos_token": "<|begin_of_text|>", "eos_token": {"content": "<|end_of_text|>"}, "pad_token": "<|end_of_text|>"}
    (place / "tokenizer_config.json").write_text(json.dumps(config))
    return place


def test_a_tokenizer_json_keeps_its_ids_and_gets_ours_past_its_end(foreign: Path, corpus: list[str], tmp_path: Path) -> None:
    ours = Tokenizer(bundle(foreign / "tokenizer.json"))
    size = piece_count(foreign / "tokenizer.json")
    assert size == 700 and ours.vocab == 706
    assert (ours.bos, ours.eos) == (0, 1)
    assert ours.pad >= size, "what fills up is no end of a text"
    for text in [*ODD, *corpus]:
        assert ours.decode(ours.encode(text)) == text
    theirs = exported(ours, tmp_path / "out")
    same(theirs, ours, [*ODD, *corpus])
    back = Tokenizer(bundle(tmp_path / "out" / "tokenizer.json"))
    assert back.reserved == ours.reserved and back.vocab == ours.vocab


def test_no_text_forges_a_reserved_id_of_a_tokenizer_json(foreign: Path) -> None:
    ours = Tokenizer(bundle(foreign / "tokenizer.json"))
    reserved = set(ours.reserved.values())
    for name in [*RESERVED, "<|begin_of_text|>", "<|end_of_text|>"]:
        ids = ours.encode(f"a {name} b")
        assert not reserved & set(ids)
        assert ours.decode(ids) == f"a {name} b"


def test_shards_are_built_with_a_tokenizer_json(foreign: Path, tmp_path: Path) -> None:
    from shards.sampling.batches import open_held_out

    source = Source(name="topics", kind="text", origin="stdlib-topics", max_documents=20)
    data = Data(source=(source,), held_out=0.2)
    spec = Build(data=data, tokenizer=TokenizerSpec(path=str(foreign / "tokenizer.json")), out=str(tmp_path / "data"))
    build(spec, workers=0)
    kept = Tokenizer.load(tmp_path / "data" / "tokenizer.model")
    manifest = json.loads((tmp_path / "data" / "topics" / "train" / "manifest.json").read_text())
    assert manifest["tokenizer"] == kept.hash and manifest["vocab"] == 706
    held = open_held_out(tmp_path / "data", "topics", "text", 64, limit=2, masked_documents=False)
    row = held.read(0, 1).tokens[0]
    assert "a" in kept.decode(row)


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "is not JSON"), ("[]", "is not a tokenizer.json"), ("{}", "is not a tokenizer.json"), (None, "No such file")],
)
def test_a_broken_tokenizer_json_is_an_error_in_one_line(content: str | None, message: str, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SpecError, match=message) as raised:
        piece_count(file)
    assert "\n" not in str(raised.value)


def test_a_tokenizer_json_of_an_unknown_kind_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "Telepathy", "vocab": {"a": 0}}}))
    with pytest.raises(SpecError, match=r"not a tokenizer\.json that `tokenizers` can read"):
        Tokenizer(bundle(tmp_path / "tokenizer.json"))
