"""Hugging Face tokenizers: one brought along as a `tokenizer.json` is read, one of SentencePiece is written as such.

What is kept of such a tokenizer is a bundle, JSON again: {"tokenizer": a tokenizer.json, "special": {"bos": "<s>", ...}, "stops":
[2, ...]}, because the special tokens are named in other files. A null in "special" is a token that the tokenizer does not have.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.common.decoding import json_value
from shards.common.errors import SpecError
from shards.tokenization.huggingface_directory import CONFIG, read_tokenizer
from shards.tokenization.huggingface_tokens import added_tokens, ids_in
from shards.tokenization.sentencepiece_model import BYTE, CONTROL, META_SPACE, NORMAL, UNKNOWN, USER_DEFINED, parse

__all__ = [
    "BYTE",
    "CONFIG",
    "META_SPACE",
    "JsonModel",
    "added_tokens",
    "bundle",
    "from_sentencepiece",
    "ids_in",
    "parse",
    "with_reserved",
]

BYTE_SCORE = -1e5
"""Of the pieces for bytes and of control pieces, so that text that looks like one's name is not taken for it."""


def bundle(path: Path) -> bytes:
    """The bundle of a tokenizer.json, or of a SentencePiece model with settings beside it. Raises SpecError."""
    return json.dumps(read_tokenizer(path), ensure_ascii=False, sort_keys=True).encode()


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
            tokenizer, special = content["tokenizer"], dict(content["special"])
            self.special = {name: token for name, token in special.items() if token is not None}
            self.has_bos = special.get("bos", "") is not None
            self.stops = frozenset(content.get("stops", ()))
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
        for token in added:
            if token.special and token.id in self.encode(token.content):
                reason = f"{token.content!r} is a special token, and a text that says it would be encoded as that token"
                raise SpecError(f"{where}: {reason} (take its merges out of the tokenizer)")

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
        scores = [BYTE_SCORE if what in (BYTE, CONTROL) else score for _, score, what in pieces]
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


def with_reserved(tokenizer: Mapping[str, Any], reserved: Iterable[tuple[int, str]]) -> dict[str, Any]:
    """A tokenizer.json with the reserved tokens that it lacks."""
    have = {token.id for token in added_tokens(tokenizer)}
    added = [added_token(number, name) for number, name in sorted(reserved) if number not in have]
    return dict(tokenizer) | {"added_tokens": [*(tokenizer.get("added_tokens") or []), *added]}
