"""What a tokenizer.json holds, as far as it counts here: its vocabulary, and the tokens that were added to that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

Id = Annotated[int, msgspec.Meta(ge=0, lt=2**31 - 1)]


class AddedToken(msgspec.Struct):
    """The fields of an entry of `added_tokens` that are used here."""

    id: Id
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False


class _Vocabulary(msgspec.Struct):
    vocab: dict[str, Id] | list[Any]


class Token(msgspec.Struct):
    """A token as any of the files writes it."""

    content: str
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool | None = None
    """As for a token that is not special, where it is left out."""
    special: bool = False

    def entry(self, number: int) -> dict[str, Any]:
        """As a tokenizer.json has it."""
        normalized = not self.special if self.normalized is None else self.normalized
        return {"id": number, **msgspec.structs.asdict(self), "normalized": normalized}


def added_tokens(tokenizer: Mapping[str, Any]) -> list[AddedToken]:
    """Raises ValueError."""
    return msgspec.convert(tokenizer.get("added_tokens") or [], list[AddedToken])


def ids_in(tokenizer: Mapping[str, Any]) -> int:
    """One more than the highest id of a tokenizer.json. Raises ValueError."""
    highest = max(vocabulary_of(tokenizer).values(), default=-1)
    return 1 + max([highest, *(token.id for token in added_tokens(tokenizer))])


def vocabulary_of(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    """Ids by piece, without added tokens. Raises ValueError."""
    vocab = msgspec.convert(tokenizer.get("model"), _Vocabulary).vocab
    if isinstance(vocab, dict):
        return vocab
    names = [entry[0] if isinstance(entry, list) and entry and isinstance(entry[0], str) else "" for entry in vocab]
    return {name: number for number, name in enumerate(names)} | ({"": len(names) - 1} if "" in names else {})


def token_entries(tokenizer: Mapping[str, Any]) -> list[tuple[AddedToken, dict[str, Any]]]:
    """Each added token, and what the file has for it. Raises ValueError."""
    return list(zip(added_tokens(tokenizer), tokenizer.get("added_tokens") or [], strict=True))


def as_token(value: Any) -> Token | None:
    """A token given as its text, as an object, or as null. Raises ValueError."""
    if value is None or value == "":
        return None
    return Token(value) if isinstance(value, str) else msgspec.convert(value, Token)
