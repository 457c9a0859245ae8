"""A JSON record as a document: a text, a conversation, or a prompt with a better and a worse answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import msgspec
import xxhash

from shards.spec import Source
from shards.tokenization.record_fields import CUT_OFF, FINISHED, REASONING, UNDESIRED, ChatMessage, Turns, around, messages


class SampledAnswer(NamedTuple):
    """An answer as a model sampled it."""

    ids: tuple[int, ...]  # () where only the text is known; the id that ended it among them
    ended: bool  # false: it was cut off at a length, so that no end is to be learned


@dataclass(frozen=True, slots=True)
class Document:
    """One document. `parts`: (text,), or (prompt, response), or (prompt, chosen, rejected); or more, where there are `roles`."""

    key: str  # decides whether it is held out: documents of one key are always of one split
    parts: tuple[str, ...]
    roles: tuple[str, ...] = ()  # of a conversation: who says each part, but for the two last ones of a preference
    where: str = ""  # file and line
    label: str = ""  # if the source gives one: the programming language of a code file, the language of a book
    masked: tuple[int, ...] = ()  # of a conversation: places of the assistant's parts that are context, and not learned
    sampled: tuple[SampledAnswer, ...] = ()  # how a model sampled the last part, or the last two of a preference
    desirable: bool = True  # whether the last part is a good example, where the source says
    unread: tuple[str, ...] = ()  # fields of its record that were not read and may matter

    @property
    def notes(self) -> list[str]:
        """Notes on the document, to be counted."""
        return [f'field not read: "{name}"' for name in self.unread]

    def hashed(self, seed: int) -> int:
        """A 64-bit hash of the key, which decides whether the document is held out."""
        return xxhash.xxh3_64_intdigest(self.key.encode(), seed=seed)


def in_record(record: Mapping[str, Any], source: Source, where: str) -> Document | str:
    """The document in a record, or why it is rejected. A conversation ends with the last answer that is learned."""
    if source.kind == "text":
        text = record.get(source.text_field)
        if not isinstance(text, str):
            return _no(record, source.text_field)
        return Document(text, (text,), (), where) if text.strip() else "empty"
    if source.kind == "unpaired":
        return _labelled(record, source, where)
    return _preference(record, source, where) if source.kind == "preference" else _conversation(record, source, where)


def _labelled(record: Mapping[str, Any], source: Source, where: str) -> Document | str:
    """A conversation whose last answer is a good example or a bad one; the answers before it are context."""
    name = source.label_field
    label = record.get(name)
    if label is None:
        return f'no field "{name}"'
    if label not in (True, False):
        return f'field "{name}" is neither true nor false'
    rest = {key: value for key, value in record.items() if key != name}
    found = _conversation(rest, msgspec.structs.replace(source, response_field=source.completion_field), where, labelled=True)
    if isinstance(found, str):
        return found
    context = tuple(at for at, role in enumerate(found.roles[:-1]) if role == "assistant")
    return replace(found, masked=context, desirable=bool(label))


def _conversation(record: Mapping[str, Any], source: Source, where: str, labelled: bool = False) -> Document | str:
    """labelled: the last answer must be one that is learned."""
    unread: dict[str, None] = {}
    if record.get(source.response_field) is None and record.get(source.messages_field) is not None:
        known: tuple[str, ...] = (source.messages_field,)
        turns = _turns(record, source.messages_field, "user", unread)
    else:
        known = (source.prompt_field, source.response_field)
        prompt, response = (_turns(record, name, role, unread) for name, role in zip(known, ("user", "assistant"), strict=True))
        if isinstance(prompt, str) or isinstance(response, str):
            return prompt if isinstance(prompt, str) else str(response)
        turns = prompt + response
    if isinstance(turns, str):
        return turns
    turns = _whole(record, known, turns, unread)
    if isinstance(turns, str):
        return turns
    first = next((at for at, turn in enumerate(turns) if turn.role == "user"), len(turns))
    # An assistant's message before the first question answers nothing, so it is context.
    turns = [turn._replace(learned=turn.learned and turn.role == "assistant" and at > first) for at, turn in enumerate(turns)]
    last = max((at for at, turn in enumerate(turns) if turn.learned), default=None)
    if last is None:
        spoken = any(turn.role == "assistant" for turn in turns)
        return "no assistant turn that is to be learned" if spoken else "no assistant turn"
    turns, rest = turns[: last + 1], turns[last + 1 :]
    if labelled and any(turn.role == "assistant" for turn in rest):
        return "the last answer is not to be learned"
    sampled = _sampled(record, "")
    if isinstance(sampled, str):
        return sampled
    if any(turn.role == "assistant" for turn in rest):  # it belongs to another answer
        sampled = None
    masked = tuple(at for at, turn in enumerate(turns) if turn.role == "assistant" and not turn.learned)
    parts, roles = tuple(turn.content for turn in turns), tuple(turn.role for turn in turns)
    drawn = (sampled,) if sampled is not None else ()
    return Document(_key(turns), parts, roles, where, masked=masked, sampled=drawn, unread=tuple(sorted(unread)))


def _preference(record: Mapping[str, Any], source: Source, where: str) -> Document | str:
    """With the prompt in its own field, or, where both answers are whole conversations, in those."""
    unread: dict[str, None] = {}
    names = source.chosen_field, source.rejected_field
    found = [_turns(record, name, "assistant", unread) for name in names]
    implied = [_said(turns[:-1]) for turns in found if not isinstance(turns, str)]
    prompt: Turns | str
    if len(implied) == 2 and implied[0] and implied[0] == implied[1] and not isinstance(found[0], str):
        prompt = found[0][:-1]
    else:
        prompt = _turns(record, source.prompt_field, "user", unread)
    for turns in (prompt, *found):
        if isinstance(turns, str):
            return turns
    chosen, rejected = (turns for turns in found if not isinstance(turns, str))
    assert not isinstance(prompt, str)
    if prompt[-1].role == "assistant":
        return "the prompt ends with the assistant"
    for name, turns in zip(names, (chosen, rejected), strict=True):
        if turns[-1].role != "assistant" or _said(turns[:-1]) not in ([], _said(prompt)):
            return f'field "{name}" is not one answer of the assistant\'s'
        if not turns[-1].learned:
            return f'the answer in "{name}" is not to be learned'
    if chosen[-1].content == rejected[-1].content:
        return "both answers are the same"
    allowed = (*REASONING, *UNDESIRED)  # mostly the reasons and scores of a judge
    prompt = _whole(record, (source.prompt_field, *names), prompt, unread, allowed)
    if isinstance(prompt, str):
        return prompt
    drawn = []
    for name in ("chosen_", "rejected_"):
        sampled = _sampled(record, name)
        if isinstance(sampled, str):
            return sampled
        drawn.append(sampled or SampledAnswer((), True))
    both = tuple(drawn) if any(each.ids or not each.ended for each in drawn) else ()
    parts = (*(turn.content for turn in prompt), chosen[-1].content, rejected[-1].content)
    roles = tuple(turn.role for turn in prompt)
    return Document(_key(prompt), parts, roles, where, sampled=both, unread=tuple(sorted(unread)))


def _sampled(record: Mapping[str, Any], prefix: str) -> SampledAnswer | str | None:
    """How an answer was drawn, where the record says so: `finish_reason` as in OpenAI's responses, and the ids."""
    reason, ids = record.get(f"{prefix}finish_reason") or None, record.get(f"{prefix or 'response_'}ids")
    if reason is None and ids is None:
        return None
    if reason not in (None, *FINISHED, *CUT_OFF):
        return f'"{prefix}finish_reason" is none of {", ".join((*FINISHED, *CUT_OFF))}'
    if ids is not None and not (isinstance(ids, list) and all(isinstance(id, int) and not isinstance(id, bool) for id in ids)):
        return f'"{prefix or "response_"}ids" is not a list of ids'
    return SampledAnswer(tuple(ids or ()), reason not in CUT_OFF)


def _whole(
    record: Mapping[str, Any], known: Collection[str], turns: Turns, unread: dict[str, None], allowed: Collection[str] = ()
) -> Turns | str:
    """A record's turns with what its other fields put before them; or why it is rejected."""
    found = around(record, known, allowed)
    if isinstance(found, str):
        return found
    unread |= dict.fromkeys(found.unread)
    if not found.before:
        return turns
    if turns[0].role == "system":
        if found.before[0].role != "system":
            return [turns[0], *found.before, *turns[1:]]
        if found.before[0].content.strip() != turns[0].content.strip():
            return "has two system messages that differ"
        turns = turns[1:]
    return [*found.before, *turns]


def _said(turns: Turns) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in turns]


def _key(turns: Turns) -> str:
    """The first question: a conversation and a preference that begin with the same one are held out together."""
    return next((turn.content for turn in turns if turn.role == "user"), turns[0].content)


def _no(record: Mapping[str, Any], name: str) -> str:
    return f'field "{name}" is not a string' if name in record else f'no field "{name}"'


def _turns(record: Mapping[str, Any], name: str, role: str, unread: dict[str, None]) -> Turns | str:
    """A field: a list of messages, or one text of the role's; or why it is neither."""
    value = record.get(name)
    if isinstance(value, str):
        return [ChatMessage(role, value)] if value.strip() else "empty"
    return messages(value, name, unread) if isinstance(value, list) else _no(record, name)
