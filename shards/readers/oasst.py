"""OpenAssistant's message trees: the best-ranked path as a conversation, ranked siblings as preferences (Köpf et al. 2023).

Read are trees ({"prompt": {text, role, rank, replies: [...]}}) and flat messages (message_id, parent_id, message_tree_id,
text, role, rank), whose trees follow one another, as in the published files. Rank 0 is the best.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from shards.readers.base import Record, Rejected, shown
from shards.spec import Source
from shards.tokenization.records import Document

LARGEST_TREE = 100_000  # messages
ROLES = {"prompter": "user", "assistant": "assistant"}
Path = list["Message"]


@dataclass(slots=True)
class Message:
    """One message and what was said to it."""

    role: str
    text: str
    rank: float  # infinite where it has none
    replies: list[Message] = field(default_factory=list)


def conversations(records: Iterator[Any], source: Source) -> Iterator[Record]:
    """The documents of all trees in a file's records."""
    flat: list[tuple[str, Mapping[str, Any]]] = []
    for record in records:
        if isinstance(record, Rejected):
            yield record
            continue
        where, fields = record
        if isinstance(fields.get("prompt"), dict):
            yield from _of_tree(where, fields, source)
            continue
        if flat and (fields.get("message_tree_id") != flat[0][1].get("message_tree_id") or len(flat) >= LARGEST_TREE):
            yield from _of_messages(flat, source)
            flat = []
        flat.append((where, fields))
    if flat:
        yield from _of_messages(flat, source)


def _of_tree(where: str, fields: Mapping[str, Any], source: Source) -> Iterator[Record]:
    root = _message(fields["prompt"])
    if isinstance(root, str):
        yield Rejected(where, root, shown(msgspec.json.encode(fields)))
        return
    waiting: list[tuple[Message, Any]] = [(root, fields["prompt"])]
    while waiting:
        parent, told = waiting.pop()
        replies = told.get("replies") or ()
        for reply in replies if isinstance(replies, list | tuple) else ():
            message = _message(reply)
            if isinstance(message, str):
                yield Rejected(where, message, shown(msgspec.json.encode(reply)))
                continue
            parent.replies.append(message)
            waiting.append((message, reply))
    yield from _documents(root, where, source)


def _of_messages(flat: list[tuple[str, Mapping[str, Any]]], source: Source) -> Iterator[Record]:
    """Of one tree's messages, in any order among themselves."""
    known: dict[Any, Message] = {}
    for where, fields in flat:
        message = _message(fields)
        if isinstance(message, str):
            yield Rejected(where, message, shown(msgspec.json.encode(fields, enc_hook=str)))
        else:
            known[fields.get("message_id")] = message
    roots = []
    for where, fields in flat:
        own, parent = fields.get("message_id"), fields.get("parent_id")
        if own not in known:
            continue
        if parent is None:
            roots.append((where, known[own]))
        elif parent in known and parent != own:
            known[parent].replies.append(known[own])
        else:
            yield Rejected(where, "its parent message is missing", shown(msgspec.json.encode(fields, enc_hook=str)))
    for where, root in roots:
        yield from _documents(root, where, source)


def _message(fields: Any) -> Message | str:
    """A message, or why it is none."""
    if not isinstance(fields, Mapping) or not isinstance(fields.get("text"), str):
        return 'a message without "text"'
    if fields.get("deleted"):
        return "deleted"
    role = ROLES.get(str(fields.get("role")))
    if role is None:
        return "a role that is neither prompter nor assistant"
    if not fields["text"].strip():
        return "empty"
    rank = fields.get("rank")
    return Message(role, fields["text"], float(rank) if isinstance(rank, int | float) else float("inf"))


def _documents(root: Message, where: str, source: Source) -> Iterator[Record]:
    if root.role != "user":
        yield Rejected(where, "the tree begins with the assistant", shown(root.text))
    elif source.kind == "sft":
        yield _best(root, where)
    else:
        yield from _pairs(root, where)


def _ranked(message: Message) -> list[Message]:
    return sorted(message.replies, key=lambda reply: reply.rank)  # stable: as stored, where ranks are equal


def _best(root: Message, where: str) -> Record:
    path = [root]
    while path[-1].replies:
        path.append(_ranked(path[-1])[0])
    while path and path[-1].role != "assistant":
        path.pop()
    return _document(path, where) if path else Rejected(where, "no assistant turn", shown(root.text))


def _pairs(root: Message, where: str) -> Iterator[Record]:
    """At each of the user's messages, the best answer beside each that is ranked lower."""
    found = False
    waiting: list[Path] = [[root]]
    while waiting:
        path = waiting.pop(0)
        ranked = _ranked(path[-1])
        if path[-1].role == "user":
            answers = [reply for reply in ranked if reply.role == "assistant" and reply.rank != float("inf")]
            for worse in answers[1:]:
                if worse.rank > answers[0].rank and worse.text != answers[0].text:
                    found = True
                    yield _document([*path, answers[0], worse], where, answers=2)
        waiting += [[*path, reply] for reply in ranked]
    if not found:
        yield Rejected(where, "no ranked answers to choose from", shown(root.text))


def _document(path: Path, where: str, answers: int = 0) -> Document:
    roles = tuple(message.role for message in path)
    return Document(path[0].text, tuple(message.text for message in path), roles[: len(roles) - answers], where)
