"""A JSON record as a document: a text, a conversation, or a prompt with a better and a worse answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import xxhash

from shards.spec import Source
from shards.templates import ROLES


@dataclass(frozen=True, slots=True)
class Document:
    """One document. `parts`: (text,), or (prompt, response), or (prompt, chosen, rejected); or more, where there are `roles`."""

    key: str  # decides whether it is held out: documents of one key are always of one split
    parts: tuple[str, ...]
    roles: tuple[str, ...] = ()  # of a conversation: who says each part, but for the two last ones of a preference
    where: str = ""  # file and line
    label: str = ""  # what it is, where the source tells: the language of a code file, the language of a book

    def hashed(self, seed: int) -> int:
        """64 bits of the key, by which it is held out or not."""
        return xxhash.xxh3_64_intdigest(self.key.encode(), seed=seed)


Turns = list[tuple[str, str]]  # (role, content)


def in_record(record: Mapping[str, Any], source: Source, where: str) -> Document | str:
    """The document in a record, or why it is rejected. Of a conversation it is all up to the assistant's last word."""
    if source.kind == "text":
        told = _turns(record, source.text_field, "text")
        return told if isinstance(told, str) else Document(told[0][1], (told[0][1],), (), where)
    if source.kind == "preference":
        return _preference(record, source, where)
    if source.response_field not in record and source.messages_field in record:
        turns = _turns(record, source.messages_field, "user")
    else:
        prompt, response = _turns(record, source.prompt_field, "user"), _turns(record, source.response_field, "assistant")
        if isinstance(prompt, str) or isinstance(response, str):
            return prompt if isinstance(prompt, str) else str(response)
        turns = prompt + response
    if isinstance(turns, str):
        return turns
    while turns and turns[-1][0] != "assistant":
        turns.pop()
    return _document(turns, where) if turns else "no assistant turn"


def _preference(record: Mapping[str, Any], source: Source, where: str) -> Document | str:
    """With the prompt in its own field, or, where both answers are whole conversations, in those."""
    found = [_turns(record, source.chosen_field, "assistant"), _turns(record, source.rejected_field, "assistant")]
    implied = [turns[:-1] for turns in found if not isinstance(turns, str)]
    prompt: Turns | str
    if len(implied) == 2 and implied[0] and implied[0] == implied[1]:
        prompt = implied[0]
    else:
        prompt = _turns(record, source.prompt_field, "user")
    for turns in (prompt, *found):
        if isinstance(turns, str):
            return turns
    chosen, rejected = (turns for turns in found if not isinstance(turns, str))
    assert not isinstance(prompt, str)
    if prompt[-1][0] == "assistant":
        return "the prompt ends with the assistant"
    for name, turns in ((source.chosen_field, chosen), (source.rejected_field, rejected)):
        if turns[-1][0] != "assistant" or turns[:-1] not in ([], prompt):
            return f'field "{name}" is not one answer of the assistant\'s'
    if chosen[-1][1] == rejected[-1][1]:
        return "both answers are the same"
    parts = (*(content for _, content in prompt), chosen[-1][1], rejected[-1][1])
    return Document(_key(prompt), parts, tuple(role for role, _ in prompt), where)


def _document(turns: Turns, where: str) -> Document:
    return Document(_key(turns), tuple(content for _, content in turns), tuple(role for role, _ in turns), where)


def _key(turns: Turns) -> str:
    """The first question: a conversation and a preference that begin with the same one are held out together."""
    return next((content for role, content in turns if role == "user"), turns[0][1])


def _turns(record: Mapping[str, Any], name: str, role: str) -> Turns | str:
    """A field: a list of messages, or one text of the role's; or why it is neither."""
    if name not in record:
        return f'no field "{name}"'
    value = record[name]
    if isinstance(value, str):
        return [(role, value)] if value.strip() else "empty"
    if not isinstance(value, list) or role == "text":
        return f'field "{name}" is not a string'
    turns = []
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            return f'field "{name}" is not a list of messages with role and content'
        if message["role"] not in ROLES:
            return f"a role that is none of {', '.join(ROLES)}"
        if not message["content"].strip():
            return "empty"
        turns.append((message["role"], message["content"]))
    return turns or "empty"
