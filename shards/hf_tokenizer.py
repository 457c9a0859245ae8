"""Hugging Face tokenizers: one brought along as a `tokenizer.json` is read, one of SentencePiece is written as such.

What is kept of a `tokenizer.json` is a bundle, JSON again: {"tokenizer": its content, "special": {"bos": "<s>", ...}}, because
which of its tokens begins a text and which ends it is said in another file, `tokenizer_config.json`.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec

from shards.decoding import DecodeError, json_value
from shards.errors import SpecError

CONFIG = "tokenizer_config.json"
Id = Annotated[int, msgspec.Meta(ge=0, lt=2**31 - 1)]
FALLBACKS = {
    "bos": ("<s>", "<|begin_of_text|>", "[BOS]", "<bos>", "<|endoftext|>"),
    "eos": ("</s>", "<|end_of_text|>", "[EOS]", "<eos>", "<|endoftext|>"),
    "pad": ("[PAD]", "<pad>"),
}
"""Where no configuration says which token does it."""
BYTE_SCORE = -1e5
"""Of the pieces for bytes, so that text that looks like one's name is not taken for it."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
META_SPACE = "\u2581"


def bundle(path: Path) -> bytes:
    """The bundle of a tokenizer.json and what lies beside it. Raises SpecError."""
    tokenizer, beside = _object(path), path.parent / CONFIG
    config = _object(beside) if beside.exists() else {}
    try:
        ids_in(tokenizer)
        added = {token.content for token in added_tokens(tokenizer)}
    except ValueError as error:
        raise SpecError(f"tokenizer: {path}: is not a tokenizer.json: {error} (fetch it again)") from None
    special: dict[str, str] = {}
    for name in ("bos", "eos", "pad", "unk"):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        known = [token] if isinstance(token, str) else [t for t in FALLBACKS.get(name, ()) if t in added]
        if known:
            special[name] = known[0]
    if special.get("pad") == special.get("eos"):
        special.pop("pad", None)  # what fills up must not look like an end
    return json.dumps({"tokenizer": tokenizer, "special": special}, ensure_ascii=False, sort_keys=True).encode()


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json_value(path.read_bytes())
    except OSError as error:
        raise SpecError(f"tokenizer: {path}: {error.strerror} (correct the path)") from None
    except DecodeError as error:
        raise SpecError(f"tokenizer: {path}: is {error} (fetch it again)") from None
    if not isinstance(found, dict):
        raise SpecError(f"tokenizer: {path}: is not a {path.name} (fetch it again)")
    return found


class AddedToken(msgspec.Struct):
    """What counts here of an entry of `added_tokens`."""

    id: Id
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False


class _Vocabulary(msgspec.Struct):
    vocab: dict[str, Id] | list[Any]


def added_tokens(tokenizer: Mapping[str, Any]) -> list[AddedToken]:
    """Raises ValueError."""
    return msgspec.convert(tokenizer.get("added_tokens") or [], list[AddedToken])


def ids_in(tokenizer: Mapping[str, Any]) -> int:
    """One more than the highest id of a tokenizer.json. Raises ValueError."""
    vocab = msgspec.convert(tokenizer.get("model"), _Vocabulary).vocab
    highest = max(vocab.values(), default=-1) if isinstance(vocab, dict) else len(vocab) - 1
    return 1 + max([highest, *(token.id for token in added_tokens(tokenizer))])


class JsonModel:
    """A bundle, with the methods of `sentencepiece.SentencePieceProcessor` that are used here. Thread-safe."""

    def __init__(self, model: bytes, where: str) -> None:
        """Raises SpecError."""
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise SpecError(f"{where}: a tokenizer.json needs the package `tokenizers` (pip install 'midwatch[train]')") from None
        try:
            content = json_value(model)
            tokenizer, self.special = content["tokenizer"], dict(content["special"])
            self._size = ids_in(tokenizer)
            self._model: Any = Tokenizer.from_str(json.dumps(tokenizer))
        except Exception as error:  # what the library raises is a bare Exception
            raise SpecError(f"{where}: not a tokenizer.json that `tokenizers` can read: {error} (fetch it again)") from None
        self._model.no_truncation()
        self._model.no_padding()
        added = added_tokens(tokenizer)
        self._control = {token.id for token in added if token.special}
        self.added = {token.content: token.id for token in added}
        self.swallows = {token.content: (token.lstrip, token.rstrip) for token in added}
        control = next((token.content for token in added if token.special and not token.rstrip), "")
        alone, behind = self.encode("a"), self.encode(control + "a")
        self.spaces_each = behind[-len(alone) :] == alone
        """Whether a text behind a special token gets a space put before it like one that begins a document, if that does."""
        # Else text could forge a turn, or an end.
        self._model.encode_special_tokens = True

    def _id(self, name: str) -> int:
        return self.piece_to_id(self.special[name]) if name in self.special else -1

    def bos_id(self) -> int:
        return self._id("bos")

    def eos_id(self) -> int:
        return self._id("eos")

    def pad_id(self) -> int:
        return self._id("pad")

    def unk_id(self) -> int:
        return self._id("unk")

    def get_piece_size(self) -> int:
        return self._size

    def piece_to_id(self, piece: str) -> int:
        found = self._model.token_to_id(piece)
        return -1 if found is None else int(found)

    def id_to_piece(self, number: int) -> str:
        return str(self._model.id_to_token(number) or "")

    def is_control(self, number: int) -> bool:
        return number in self._control

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode(list(ids), skip_special_tokens=False))

    def normalize(self, text: str) -> str:
        """As if a space were put before each text: whether one is cannot be told, and so texts are never cut."""
        return META_SPACE + text


def added_token(number: int, content: str, special: bool = True) -> dict[str, Any]:
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": number, "content": content, **plain, "special": special}


def from_sentencepiece(model: bytes, reserved: Mapping[int, str]) -> dict[str, Any]:
    """A tokenizer.json that gives the same ids as a SentencePiece model; `reserved` are ids and names of its special tokens.

    Pieces have real spaces, where SentencePiece writes U+2581: so that character is not taken for a space, as it is not here.
    Raises SpecError for what SentencePiece can do and `tokenizers` cannot.
    """
    pieces, kind, normalizer = parse(model)
    if kind not in (1, 2):
        raise SpecError("tokenizer: a SentencePiece model of words or characters has no counterpart (use bpe or unigram)")
    names = [piece.replace(META_SPACE, " ") for piece, _, _ in pieces]
    kinds = [what for _, _, what in pieces]
    unknown = kinds.index(UNKNOWN)
    vocab = {name: number for number, name in enumerate(names)}
    if len(vocab) != len(names):
        raise SpecError("tokenizer: two pieces of the SentencePiece model differ only in U+2581 and a space")
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if normalizer["dummy_prefix"]:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    if kind == 2:
        body: dict[str, Any] = {
            "type": "BPE",
            "dropout": None,
            "unk_token": names[unknown],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": BYTE in kinds,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": list(_merges(names, [score for _, score, _ in pieces], kinds)),
        }
    else:
        scores = [BYTE_SCORE if what == BYTE else score for _, score, what in pieces]
        listed = [[name, score] for name, score in zip(names, scores, strict=True)]
        body = {"type": "Unigram", "unk_id": unknown, "vocab": listed, "byte_fallback": BYTE in kinds}
    user = {number: name for number, (name, what) in enumerate(zip(names, kinds, strict=True)) if what == USER_DEFINED}
    added = [added_token(number, name, special=False) for number, name in user.items() if number not in reserved]
    added += [added_token(number, name) for number, name in reserved.items()]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: int(token["id"])),
        "normalizer": _normalizer(normalizer),
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": body,
    }


def _merges(names: Sequence[str], scores: Sequence[float], kinds: Sequence[int]) -> Iterator[tuple[str, str]]:
    """Every way to put a piece together from two others, the pieces by their score, which is SentencePiece's order."""
    known = {name: number for number, (name, kind) in enumerate(zip(names, kinds, strict=True)) if kind == NORMAL}
    for name, _ in sorted(known.items(), key=lambda item: -scores[item[1]]):
        ways = [(name[:cut], name[cut:]) for cut in range(1, len(name))]
        yield from sorted((way for way in ways if way[0] in known and way[1] in known), key=lambda w: (known[w[0]], known[w[1]]))


def _normalizer(spec: Mapping[str, Any]) -> dict[str, Any] | None:
    import base64

    steps: list[dict[str, Any]] = []
    if spec["charsmap"]:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(spec["charsmap"]).decode()})
    if spec["extra_whitespaces"]:
        steps += [{"type": "Strip", "strip_left": True, "strip_right": True}]
        steps += [{"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}]
    if spec["dummy_prefix"]:
        steps.append({"type": "Prepend", "prepend": " "})
    return {"type": "Sequence", "normalizers": steps} if steps else None


def parse(model: bytes) -> tuple[list[tuple[str, float, int]], int, dict[str, Any]]:
    """(piece, score, kind) of each id, the kind of the model, and its normalizer: sentencepiece_model.proto. Raises SpecError."""
    try:
        return _parse(model)
    except (LookupError, ValueError, TypeError, struct.error) as error:
        raise SpecError(f"tokenizer: not a SentencePiece model: {type(error).__name__}: {error} (give a .model file)") from None


def _parse(model: bytes) -> tuple[list[tuple[str, float, int]], int, dict[str, Any]]:
    pieces: list[tuple[str, float, int]] = []
    kind, spec = 1, {"charsmap": b"", "dummy_prefix": True, "extra_whitespaces": True}
    for field, value in _fields(model):
        if field == 1:
            inner = dict(_fields(value))
            pieces.append((inner[1].decode(), struct.unpack("<f", inner.get(2, bytes(4)))[0], inner.get(3, NORMAL)))
        elif field == 2:
            kind = dict(_fields(value)).get(3, 1)
        elif field == 3:
            inner = dict(_fields(value))
            spec = {
                "charsmap": inner.get(2, b""),
                "dummy_prefix": bool(inner.get(3, 1)),
                "extra_whitespaces": bool(inner.get(4, 1)),
            }
    return pieces, kind, spec


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol buffers message: https://protobuf.dev/programming-guides/encoding."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(message):
        tag = varint()
        number, wire = tag >> 3, tag & 7
        if wire == 0:
            yield number, varint()
            continue
        length = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        yield number, message[at : at + length]
        at += length


def with_reserved(tokenizer: Mapping[str, Any], reserved: Iterable[tuple[int, str]]) -> dict[str, Any]:
    """A tokenizer.json with the reserved tokens that it lacks."""
    have = {token.id for token in added_tokens(tokenizer)}
    added = [added_token(number, name) for number, name in sorted(reserved) if number not in have]
    return dict(tokenizer) | {"added_tokens": [*(tokenizer.get("added_tokens") or []), *added]}
