"""The tokenizer of a Hugging Face directory, read as `transformers` 5 does: from `tokenizer.json` or `tokenizer.model`, and more.

Which token begins a text, which one ends it and which ones are special is spread over `tokenizer_config.json`,
`special_tokens_map.json`, `added_tokens.json`, `config.json` and `generation_config.json`. They are put together in the order in
which `transformers` does it (`PreTrainedTokenizerBase._from_pretrained`, `TokenizersBackend.__init__`). Where two of them
contradict each other in a way that would change ids, the directory is refused and both are named.

One rule is stricter here: a token that is special in any of the files, or that ends a response, is never found in a text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from shards.common.decoding import DecodeError, json_value, shown
from shards.common.errors import SpecError
from shards.tokenization.huggingface_tokens import Id, Token, added_tokens, as_token, ids_in, token_entries, vocabulary_of
from shards.tokenization.sentencepiece_model import BYTE, CONTROL, USER_DEFINED, parse

FAST, MODEL = "tokenizer.json", "tokenizer.model"
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
MODEL_CONFIG, GENERATION = "config.json", "generation_config.json"
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
"""In the order in which `transformers` adds tokens that the tokenizer does not have yet."""
BACKEND = "TokenizersBackend"
"""The class that takes a tokenizer.json as it is."""
OTHER_NAMES = (BACKEND, "PreTrainedTokenizer", "BloomTokenizer")
"""Its names in `tokenizer_config.json`, without "Fast"."""
DEFAULTS = {
    "LlamaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "GPT2Tokenizer": dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>"),
    "Qwen2Tokenizer": dict.fromkeys(("eos", "unk", "pad"), "<|endoftext|>"),
}
"""Special tokens of the classes that build a tokenizer of their own from the file's vocabulary."""

QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Where that class cuts a text."""
_TAG = re.compile(r"<[^<>\s]+>|\[[A-Z]+\]")
"""What a special token looks like that a file has among its ordinary pieces."""


def has_settings(model: Path) -> bool:
    """Whether there are files beside a SentencePiece model that add to what it says."""
    return any(model.with_name(name).is_file() for name in (CONFIG, MAP, ADDED))


def read_tokenizer(path: Path) -> dict[str, Any]:
    """`tokenizer`, `special` and `stops` of a bundle, from a tokenizer.json or a SentencePiece model. Raises SpecError."""
    try:
        return _Reader(path).bundle()
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        said = f"{type(error).__name__}: {error}" if isinstance(error, (AttributeError, KeyError)) else error
        raise SpecError(
            f"tokenizer: {path}: is not a {path.name}, or the files beside it are not: {said} (fetch it again)"
        ) from None


class _Named(NamedTuple):
    token: Token | None
    where: str
    """The file that names it."""


class _Reader:
    """One directory's files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fast = None if path.suffix == ".model" else _object(path)
        self._config, self._model_config, self._generation = (
            _object(file) if (file := path.with_name(name)).is_file() else {} for name in (CONFIG, MODEL_CONFIG, GENERATION)
        )
        self._class = self._class_name()

    def _class_name(self) -> str:
        """As `AutoTokenizer` finds the class."""
        kind, named = self._model_config.get("model_type"), self._config.get("tokenizer_class")
        named = named or self._model_config.get("tokenizer_class")
        if not isinstance(named, str):
            return "GPT2Tokenizer" if kind == "gpt2" else BACKEND
        named = named.removesuffix("Fast")
        bytes_wise = self._fast is not None and "ByteLevel" in _types(self._fast)
        if kind == "mistral" or (named == "LlamaTokenizer" and bytes_wise):
            return BACKEND
        if named not in DEFAULTS and named not in OTHER_NAMES:
            says = f"says {shown(named)}, a class that builds a tokenizer in its own way, which is not known here"
            way = 'if tokenizer.json is right as it is, set tokenizer_class to "PreTrainedTokenizerFast"'
            raise SpecError(f"tokenizer: {self._path.parent}: {CONFIG} {says}, whatever {FAST} says ({way})")
        return named if named in DEFAULTS else BACKEND

    def bundle(self) -> dict[str, Any]:
        named, listed = self._tokens()
        tokenizer = self._base()
        self._add(tokenizer, named, listed)
        special = {role: token.content if token else None for role in ("bos", "eos", "pad", "unk") for token in [named[role].token]}
        stops = self._stops(tokenizer)
        if special["eos"] is None:
            special["eos"] = next((token.content for token in added_tokens(tokenizer) if token.id in stops[:1]), None)
        # What fills rows up must not look like the end or the beginning of a text: it gets an id of its own.
        kept = {role: token for role, token in special.items() if token is not None or role == "bos"}
        if kept.get("pad") in (kept.get("eos"), kept.get("bos")):
            kept.pop("pad", None)
        return {"tokenizer": tokenizer, "special": kept, "stops": stops}

    def _base(self) -> dict[str, Any]:
        """The tokenizer.json of the class, without tokens that other files add."""
        if self._fast is None:
            return self._from_model()
        ids_in(self._fast)
        if self._class == BACKEND:
            return self._fast
        model, vocab = self._fast["model"], vocabulary_of(self._fast)
        if model.get("type", "BPE") != "BPE":
            raise self._conflict(
                FAST, f"has a model of type {shown(model.get('type'))}", CONFIG, f"says {self._class}, which is BPE"
            )
        if self._class == "LlamaTokenizer":
            return _llama(vocab, model.get("merges") or [], self._prefix())
        add_prefix_space = bool(self._config.get("add_prefix_space", False))
        split: dict[str, Any] = self._fast.get("pre_tokenizer") or {}
        parts: list[dict[str, Any]] = []
        if self._class == "Qwen2Tokenizer" and split.get("type") == "Sequence":
            parts = split.get("pretokenizers") or []
        last = parts[-1] if parts else split
        found = [each.get("pattern") for each in parts[:-1]], (self._fast.get("normalizer") or {}).get("type")
        wanted = ([{"Regex": QWEN2_SPLIT}], "NFC") if self._class == "Qwen2Tokenizer" else ([], None)
        if found != wanted or last.get("type") != "ByteLevel" or last.get("use_regex", True) != (not parts):
            way = f'if {FAST} is right as it is, set tokenizer_class to "PreTrainedTokenizerFast"'
            raise self._conflict(FAST, f"splits text in another way than {self._class}", CONFIG, "says that class", way)
        last = last | {"add_prefix_space": add_prefix_space}
        pre = split | {"pretokenizers": [*parts[:-1], last]} if parts else last
        return self._fast | {"pre_tokenizer": pre, "added_tokens": []}

    def _prefix(self) -> str:
        """Where a Llama's tokenizer puts a space: before the first part of a text, before each, or nowhere."""
        if self._config.get("add_prefix_space") is False:
            return "never"
        return "always" if self._config.get("legacy", False) else "first"

    def _from_model(self) -> dict[str, Any]:
        pieces, kind, normalizer = parse(self._path.read_bytes())
        names, kinds = [name for name, _, _ in pieces], [what for _, _, what in pieces]
        here = self._path.name
        if self._class in ("GPT2Tokenizer", "Qwen2Tokenizer"):
            raise self._conflict(here, "is SentencePiece's", CONFIG, f"says {self._class}, which reads bytes")
        if kind != 2:
            raise self._conflict(here, "is no BPE model", CONFIG, "is read by transformers as one of BPE")
        if normalizer["charsmap"] or normalizer["extra_whitespaces"]:
            raise self._conflict(here, "normalizes text", CONFIG, "has transformers read it without")
        if BYTE not in kinds:
            raise self._conflict(here, "has no pieces for bytes", CONFIG, "has transformers read it as if it had")
        prefix = self._prefix() if self._class == "LlamaTokenizer" else "never"
        if normalizer["dummy_prefix"] != (prefix != "never"):
            puts, other = ("a space", "none") if normalizer["dummy_prefix"] else ("no space", "one")
            settings = {"tokenizer_class": self._config.get("tokenizer_class"), "model_type": self._model_config.get("model_type")}
            settings |= {key: self._config[key] for key in ("add_prefix_space",) if key in self._config}
            said = ", ".join(f"{key} {shown(value)}" for key, value in settings.items())
            raise self._conflict(here, f"puts {puts} before a text", CONFIG, f"has transformers put {other}, by {said}")
        vocab = {name: number for number, name in enumerate(names)}
        return _llama(vocab, _merges(vocab), prefix)

    def _conflict(self, one: str, says: str, other: str, says_too: str, way: str = "") -> SpecError:
        way = way or "save it again with transformers, as a tokenizer.json"
        return SpecError(f"tokenizer: {self._path.parent}: {one} {says}, and {other} {says_too} ({way})")

    def _tokens(self) -> tuple[dict[str, _Named], dict[int, _Named]]:
        """The named tokens by role, and those with an id by that."""
        given = {role: _Named(as_token(self._config[f"{role}_token"]), CONFIG) for role in ROLES if f"{role}_token" in self._config}
        listed: dict[int, _Named] = {}
        if isinstance(self._config.get("added_tokens_decoder"), dict):
            for number, value in self._config["added_tokens_decoder"].items():
                listed[msgspec.convert(number, Id, strict=False)] = _Named(as_token(value), CONFIG)
        else:
            self._legacy(given, listed)
        found = {role: _Named(None, CONFIG) for role in ROLES}
        if self._class in DEFAULTS:
            found |= {role: _Named(as_token(name), f"{CONFIG}'s {self._class}") for role, name in DEFAULTS[self._class].items()}
        elif self._fast is None:
            found |= {role: _Named(as_token(name), self._path.name) for role, name in _ends(self._path).items()}
        padding = (self._fast or {}).get("padding")
        if isinstance(padding, dict) and "pad" not in given:
            found["pad"] = _Named(as_token(padding.get("pad_token")), FAST)
        return found | given, dict(sorted(listed.items()))

    def _legacy(self, given: dict[str, _Named], listed: dict[int, _Named]) -> None:
        """Files that `transformers` looks at only where tokenizer_config.json lists no added tokens."""
        if (file := self._path.with_name(MAP)).is_file():
            for key, value in _object(file).items():
                if key.removesuffix("_token") in ROLES:
                    given[key.removesuffix("_token")] = _Named(as_token(value), MAP)
        extra = {token.content for token in self._extra()}
        if (file := self._path.with_name(ADDED)).is_file():
            special = {token.content for token, _ in given.values() if token} | extra
            for content, number in msgspec.convert(_object(file), dict[str, Id]).items():
                listed[number] = _Named(Token(content, special=content in special), ADDED)
        if self._fast is not None:
            for entry in self._fast.get("added_tokens") or []:
                listed[msgspec.convert(entry["id"], Id)] = _Named(as_token(entry), FAST)

    def _extra(self) -> list[Token]:
        """Special tokens without a role."""
        files = [self._config]
        if "added_tokens_decoder" not in self._config and (file := self._path.with_name(MAP)).is_file():
            files.append(_object(file))
        found: list[Token] = []
        for given in files:
            for key in ("extra_special_tokens", "additional_special_tokens"):
                value = given.get(key) or []
                found += [token for each in (value.values() if isinstance(value, dict) else value) if (token := as_token(each))]
            for key, value in given.items():
                if key.endswith("_token") and key.removesuffix("_token") not in ROLES and isinstance(value, str):
                    found.append(Token(value))
        return found

    def _add(self, tokenizer: dict[str, Any], named: Mapping[str, _Named], listed: Mapping[int, _Named]) -> None:
        """Puts the tokens of the other files into the tokenizer, with the ids that `transformers` gives them."""
        vocab = vocabulary_of(tokenizer)
        entries = {token.content: dict(entry) for token, entry in token_entries(tokenizer)}
        numbers = vocab | {name: entry["id"] for name, entry in entries.items()}
        size = 1 + max(numbers.values(), default=-1)

        def put(token: Token, where: str, wanted: int | None = None) -> None:
            nonlocal size
            number = numbers.get(token.content, size)
            if wanted is not None and number != wanted:
                source = self._path.name if self._fast is None or where != FAST else CONFIG
                says = f"says that {shown(token.content)} is id {wanted}"
                raise self._conflict(where, says, source, f"gives it {number}")
            entries[token.content] = token.entry(number)
            numbers[token.content] = number
            size = max(size, number + 1)

        for number, (token, where) in listed.items():
            if token is not None:
                put(token, where, number)
        for token, where in named.values():
            if token is not None and token.content not in entries:
                put(Token(token.content, token.lstrip, token.rstrip, token.single_word, token.normalized, True), where)
        extra = [*self._extra(), *self._pieces()]
        for token in extra:
            if token.content not in entries:
                put(token, CONFIG)
        if self._fast is not None:
            kept = {token.content for token, _ in token_entries(self._fast)} - set(entries)
            if kept:
                raise self._conflict(
                    FAST, f"has the added token {shown(min(kept))}", CONFIG, "has none such among added_tokens_decoder"
                )
        special = {token.content for token, _ in named.values() if token} | {token.content for token in self._extra()}
        special |= {token.content for token, _ in token_entries(self._fast or {}) if token.special}
        for content in special & set(entries):
            entries[content]["special"] = True
        tokenizer["added_tokens"] = sorted(entries.values(), key=lambda entry: int(entry["id"]))

    def _pieces(self) -> list[Token]:
        """Those of a SentencePiece model that are no ordinary ones."""
        if self._fast is not None:
            return []
        pieces, _, _ = parse(self._path.read_bytes())
        return [
            Token(name, normalized=False, special=kind == CONTROL) for name, _, kind in pieces if kind in (CONTROL, USER_DEFINED)
        ]

    def _stops(self, tokenizer: dict[str, Any]) -> list[int]:
        """Ids that end a response by the model's own configuration; each is a token that no text has."""
        file, given = (GENERATION, self._generation) if "eos_token_id" in self._generation else (MODEL_CONFIG, self._model_config)
        value = given.get("eos_token_id")
        many = value if isinstance(value, list) else [] if value is None else [value]
        try:
            # A negative number is none: some configurations say -1 where a model has no such token.
            found = [id for id in msgspec.convert(many, list[int]) if id >= 0]
        except msgspec.ValidationError:
            says = f"says {shown(value)}, which is no token's number"
            raise SpecError(f"tokenizer: {self._path.parent}: {file} {says} (correct eos_token_id)") from None
        names = {number: name for name, number in vocabulary_of(tokenizer).items()}
        for number in found:
            entries = {entry["id"]: entry for _, entry in token_entries(tokenizer)}
            if number not in entries and _TAG.fullmatch(names.get(number, "")):
                tokenizer["added_tokens"].append(Token(names[number], special=True).entry(number))
            elif number not in entries:
                what = f"the ordinary piece {shown(names[number])}" if number in names else "no token"
                says = f"says that id {number} ends a text"
                way = "correct eos_token_id"
                raise SpecError(f"tokenizer: {self._path.parent}: {file} {says}, in {self._path.name} it is {what} ({way})")
            else:
                entries[number]["special"] = True
        return found


def _ends(model: Path) -> dict[str, str]:
    """The special tokens that a SentencePiece model names itself, by role."""
    import sentencepiece

    found: Any = sentencepiece.SentencePieceProcessor(model_file=str(model))
    ids = {"bos": found.bos_id(), "eos": found.eos_id(), "unk": found.unk_id()}
    return {role: found.id_to_piece(number) for role, number in ids.items() if number >= 0}


def _types(tokenizer: Mapping[str, Any]) -> set[str]:
    """The types of a tokenizer's pre-tokenizers and decoders."""
    found: set[str] = set()
    for key, inner in (("pre_tokenizer", "pretokenizers"), ("decoder", "decoders")):
        part = tokenizer.get(key) or {}
        found |= {str(each.get("type")) for each in [part, *(part.get(inner) or [])]}
    return found


def _llama(vocab: dict[str, int], merges: Any, prefix: str) -> dict[str, Any]:
    """As `transformers`' LlamaTokenizer builds it."""
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix != "never":
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": prefix, "split": False},
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges,
        },
    }


def _merges(vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, as `transformers`' `generate_merges` orders them."""
    found = [
        (number, name[:cut], name[cut:])
        for name, number in vocab.items()
        for cut in range(1, len(name))
        if name[:cut] in vocab and name[cut:] in vocab
    ]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])))
    return [(left, right) for _, left, right in found]


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
