"""Text to token ids and back, by SentencePiece or a tokenizer.json, with reserved ids that no text can produce.

A tokenizer trained here gives the reserved ids fixed numbers (`RESERVED`), falls back to bytes for what it never saw, and
changes nothing: `decode(encode(text)) == text` for every text, spaces, tabs and line ends included. A model brought along
keeps its own ids for what it has as control pieces, and gets new ids past its end for the rest.

Conversations are told by a chat template. The default one, one line: `<|system|>S<|user|>U<|assistant|>A[EOS]<|user|>U...`, with
nothing between the parts. Others bring special tokens of their own, which are reserved ids too.
"""

from __future__ import annotations

import io
import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import sentencepiece
import xxhash

from shards.common.decoding import json_value
from shards.common.errors import ShardError, SpecError
from shards.spec import TokenizerSpec as TokenizerSpec
from shards.tokenization.chat import Chat, Markers, Message, trained
from shards.tokenization.huggingface import JsonModel, bundle, ids_in
from shards.tokenization.huggingface_directory import FAST, MODEL, has_settings
from shards.tokenization.jinja import Renderer
from shards.tokenization.templates import DEFAULT, Template, kept, read
from shards.tokenization.word_cache import WordEncoder, separable

PAD, BOS, EOS, UNK, MASK = "[PAD]", "[BOS]", "[EOS]", "[UNK]", "[MASK]"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
RESERVED = (PAD, BOS, EOS, UNK, MASK, SYSTEM, USER, ASSISTANT)  # in the order of their ids, from 0
FILE_NAME = "tokenizer.model"

META_SPACE = "\u2581"  # how SentencePiece writes a space inside pieces
LONG = 1 << 16  # characters encoded at once: its memory grows with the text, and no piece crosses a line end
THREADS = 4  # fixed, because unigram training sums in an order that depends on it
OURS = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
"""What a template calls the reserved ids, and what they are called in a tokenizer trained here."""


def train(texts: Iterable[str], *, vocab: int, kind: Literal["bpe", "unigram"] = "bpe", template: Template = DEFAULT) -> bytes:
    """A SentencePiece model of exactly `vocab` ids trained on `texts`; the same texts give the same bytes.

    The template's special pieces are reserved ids, behind the others. Raises SpecError.
    """
    symbols = [] if template.is_default else trained(template, OURS, RESERVED)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type=kind,
            vocab_size=vocab,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=PAD,
            bos_piece=BOS,
            eos_piece=EOS,
            unk_piece=UNK,
            # Control symbols, unlike user-defined ones, are never found in text: a document cannot forge a turn.
            control_symbols=[MASK, SYSTEM, USER, ASSISTANT, *symbols],
            user_defined_symbols=["\n"],
            num_threads=THREADS,
            minloglevel=3,
        )
    except RuntimeError as error:
        raise SpecError(_training_failed(str(error), vocab)) from None
    return model.getvalue()


def _training_failed(message: str, vocab: int) -> str:
    if "sentences_.empty()" in message:
        return "tokenizer: there is no text to train on (check the sources' paths and limits)"
    if "too high" in message:
        most = message.rsplit("<=", 1)[-1].strip(" .\n")
        return f"tokenizer: the sample is too small for a vocabulary of {vocab} (set vocab to {most} or less, or give more text)"
    least = re.search(r"smaller than required_chars\. \d+ vs (\d+)", message)
    if least:
        return f"tokenizer: a vocabulary of {vocab} has no room for the sample's characters (set vocab to {least[1]} or more)"
    return f"tokenizer: training failed: {message}"


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), 4096):
                yield line[start : start + 4096]


class Tokenizer:
    """A loaded tokenizer. Thread-safe.

    vocab: the number of ids, reserved ones included; hash: xxh3_128 of the model file, and of the template where it is not the
    default one, hex; reserved: id by name, the template's markers included; model: the bytes of that file.
    """

    def __init__(self, model: bytes, where: str = "tokenizer", template: Template = DEFAULT) -> None:
        """Raises SpecError for what is no model, or a template that cannot be used with it."""
        self.model = model
        self.template = template
        self._model: Any = _loaded(model, where)
        self.hash = xxhash.xxh3_128_hexdigest(model if template.is_default else model + template.encoded())
        own = {BOS: self._model.bos_id(), EOS: self._model.eos_id(), PAD: self._model.pad_id(), UNK: self._model.unk_id()}
        self.vocab: int = self._model.get_piece_size()
        self.reserved: dict[str, int] = {}
        for name in RESERVED:
            found = own.get(name, -1)
            if name != BOS or getattr(self._model, "has_bos", True):
                self.reserved[name] = found if found >= 0 else self._control(name)
        self.pad, self.eos = self.reserved[PAD], self.reserved[EOS]
        self.bos: int | None = self.reserved.get(BOS)
        """None for a tokenizer brought along that has none: its texts begin with nothing."""
        # A model that puts a space before everything would put one before each part of a long text.
        self._splits = not self._model.normalize("a").startswith(META_SPACE)
        byte_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in META_SPACE.encode()]
        self._meta_space = [] if own[UNK] in byte_ids or isinstance(self._model, JsonModel) else byte_ids
        called = {name: self.own_name(number) or name for name, number in self.reserved.items()}
        self.called = {token: called[name] for token, name in OURS.items() if name in called}
        """What the template's `bos_token` and so on are."""
        self.special = {called[name]: number for name, number in self.reserved.items()}
        self.swallows: dict[str, tuple[bool, bool]] = {}
        if isinstance(self._model, JsonModel):
            self.special = self._model.added | self.special
            self.swallows = self._model.swallows
        if not template.is_default:
            self.special |= getattr(self._model, "added", {})
            for name in self._markers.special:
                if name not in self.special:
                    self.special[name] = self.reserved[name] = self._control(name)
                elif name not in self.called.values():
                    self.reserved[name] = self.special[name]
            self.stops = self._chat.ends | {self.eos}
        else:
            self.stops = frozenset({self.eos})
        self.stops |= getattr(self._model, "stops", frozenset())
        """What ends a response: EOS, what ends the assistant's turn, and what a tokenizer brought along says that does."""
        self._names = {number: name for name, number in self.reserved.items()}

    def _control(self, name: str) -> int:
        """The id of a control piece, past the model's end where it has none."""
        found: int = self._model.piece_to_id(name)
        if not self._model.is_control(found):
            found = self.vocab
            self.vocab += 1
        return found

    @cached_property
    def turn_end(self) -> int:
        """What ends an assistant's turn in what is learned: the template's own token, or EOS."""
        ids, mask = self.chat([("user", "a"), ("assistant", "b")])
        last = ids[len(mask) - 1 - mask[::-1].index(1)]
        return last if last in self.stops else self.eos

    @cached_property
    def _markers(self) -> Markers:
        size = 0 if isinstance(self._model, JsonModel) else self._model.get_piece_size()
        control = [self._model.id_to_piece(number) for number in range(size) if self._model.is_control(number)]
        return Markers(self.template, self.called, {*control, *self.special})

    @cached_property
    def _chat(self) -> Chat:
        return Chat(self, self._markers)

    @classmethod
    def load(cls, path: Path) -> Tokenizer:
        """From a file that a build has written, and the template beside it; ShardError if it cannot be read."""
        try:
            return cls(path.read_bytes(), str(path), kept(path))
        except OSError as error:
            raise ShardError(f"{path}: {error.strerror} (restore the tokenizer, or build the shards again)") from None

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without BOS or EOS. Never a reserved id, whatever the text says."""
        if self._meta_space and META_SPACE in text:
            # SentencePiece would give this character back as a space; its bytes come back as themselves.
            ids: list[int] = []
            for number, part in enumerate(text.split(META_SPACE)):
                ids += (self._meta_space if number else []) + self.encode(part)
            return ids
        if len(text) <= LONG or not self._splits:
            encoded: list[int] = self._model.encode(text)
            return encoded
        return [number for part in _cut(text) for number in self._model.encode(part)]

    def encode_texts(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], list[int]]:
        """The ids of texts, one after the other, each between BOS, where there is one, and EOS, and how many each has."""
        dtype = token_dtype(self.vocab)
        if self._words is not None and not any(META_SPACE in text for text in texts):
            return self._words.encode([list(_cut(text)) for text in texts])
        found = [[*self.beginning, *self.encode(text), self.eos] for text in texts]
        return np.array(list(chain.from_iterable(found)), dtype), list(map(len, found))

    @property
    def beginning(self) -> list[int]:
        """What is put before the ids of a text: BOS, or nothing."""
        return [] if self.bos is None else [self.bos]

    def prompt(self, text: str) -> list[int]:
        """The ids of a text that is to be continued. Never empty: without BOS, an empty text begins where another one ended."""
        return [*self.beginning, *self.encode(text)] or [self.eos]

    @cached_property
    def _words(self) -> WordEncoder | None:
        """For models whose words can be encoded one by one."""
        if is_json(self.model) or not self._splits or not separable(self.model):
            return None
        assert self.bos is not None
        return WordEncoder(self._model, token_dtype(self.vocab), self.bos, self.eos)

    def decode(self, ids: Iterable[int], *, reserved: bool = False) -> str:
        """The text of ids; `reserved` shows the reserved ones by name instead of leaving them out."""
        text: list[str] = []
        plain: list[int] = []
        for number in map(int, ids):
            if number in self._names:
                text.append(self._model.decode(plain))
                text.append(self._names[number] if reserved else "")
                plain = []
            elif 0 <= number < self._model.get_piece_size():
                plain.append(number)
        text.append(self._model.decode(plain))
        return "".join(text)

    def piece(self, number: int) -> str:
        """One id as text for the screen: a reserved name, or what it decodes to, bytes as `<0x0A>`."""
        if number in self._names:
            return self._names[number]
        shown: str = self._model.id_to_piece(number).replace(META_SPACE, " ")
        return shown

    def own_name(self, number: int) -> str:
        """What the model itself calls a reserved id; empty for one that was added past its end."""
        if number >= self._model.get_piece_size():
            return ""
        name: str = self._model.id_to_piece(number)
        return name

    def chat(self, messages: Sequence[Message], masked: Collection[int] = (), *, ended: bool = True) -> tuple[list[int], list[int]]:
        """The ids of a conversation, and the mask: 1 for what an assistant says and the token after it that ends its turn, else 0.

        Messages are (role, content) or {"role": ..., "content": ...}. One that does not end with the assistant is a
        prompt: the template opens the assistant's turn at its end, for a response to follow. masked: numbers of messages that are
        not learned; ended: false where the last one was cut off, so that nothing follows it. Raises ChatError, a ValueError.
        """
        return self._chat.encode(messages, masked, ended=ended)

    def notes(self, messages: Sequence[Message]) -> list[str]:
        """What is to be counted of a conversation that is learned from. Raises ChatError."""
        return self._chat.notes(messages)

    def refusal(self, messages: Sequence[Message]) -> str:
        """Why a document with these messages must be left out: what it says would forge a turn, or the template cannot tell it."""
        return self._chat.refusal(messages)

    def follow(self, text: str, after_special: bool) -> list[int]:
        """The ids of a text that does not begin a document, but follows a special token or the ids of other text."""
        if self._splits or (after_special and getattr(self._model, "spaces_each", True)):
            return self.encode(text)
        # What would put a space before it is put behind something that it does not merge with, which is then taken away again.
        for something in "\n", "0", "|":
            before, both = self.encode(something), self.encode(something + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self.encode(text)


def _loaded(model: bytes, where: str) -> Any:
    if is_json(model):
        return JsonModel(model, where)
    try:
        found = sentencepiece.SentencePieceProcessor(model_proto=model)
        size = found.get_piece_size()
        found.id_to_piece(list(range(size)))  # pieces that are not UTF-8 are not found out before they are used
        whole = 0 <= found.unk_id() < size
    except (RuntimeError, ValueError, IndexError):
        whole = False
    if not whole:
        raise SpecError(f"{where}: not a SentencePiece model (give one, or a tokenizer.json, or leave path out)")
    return found


def is_json(model: bytes) -> bool:
    """Whether these are the bytes of a tokenizer.json's bundle, not of a SentencePiece model."""
    return model.startswith(b"{")


def token_dtype(vocab: int) -> str:
    """uint16 up to 65,536 ids, else uint32."""
    return "uint16" if vocab <= 1 << 16 else "uint32"


def read_model(path: Path) -> bytes:
    """A tokenizer that is brought along, as it is kept: a .model file's bytes, or a Hugging Face tokenizer's bundle.

    As `transformers` does, a tokenizer.json is taken instead of the tokenizer.model that it lies beside. A .model file with
    settings beside it has the tokens that they add. Raises SpecError.
    """
    if path.suffix == ".json":
        return bundle(path)
    if path.name == MODEL and path.with_name(FAST).is_file():
        return bundle(path.with_name(FAST))
    if has_settings(path) and path.is_file():
        _loaded(path.read_bytes(), str(path))
        return bundle(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise SpecError(f"tokenizer: {path}: {error.strerror} (correct the path)") from None


def check_template(spec: TokenizerSpec) -> None:
    """Raise SpecError for a template that cannot be used, as far as shows without the tokenizer that it is for."""
    template = read(spec)
    if spec.path is None and not template.is_default:
        trained(template, OURS, RESERVED)
    elif not template.is_named:
        Renderer(template, OURS)


def piece_count(path: Path) -> int:
    """Ids of a tokenizer that is brought along, without the reserved ones that it lacks. Raises SpecError."""
    model = read_model(path)
    if is_json(model):
        return ids_in(json_value(model)["tokenizer"])
    count: int = _loaded(model, str(path)).get_piece_size()
    return count


def _cut(text: str) -> Iterator[str]:
    """A long text in parts, cut after a line end, else before a space, else anywhere."""
    start = 0
    while len(text) - start > LONG:
        end = text.rfind("\n", start, start + LONG) + 1
        if end <= start:
            end = text.rfind(" ", start + LONG // 2, start + LONG)
        if end <= start:
            end = start + LONG
        yield text[start:end]
        start = end
    yield text[start:]
