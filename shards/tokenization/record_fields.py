"""Which fields of a conversation's record are read, which forbid its use, and which are only counted as not read.

A field that changes what the conversation means is honoured, or its record is rejected with a reason that names the field. Any
other field that is neither read nor mere metadata is counted, so that nothing is lost in silence. An empty value (null, "", [], {},
false) is no field: Parquet gives every row every field.

Loss weights of turns follow the formats that have them: OpenAI's fine-tuning (`weight`, 0 or 1), axolotl (`train`, `training`),
ms-swift (`loss`). `system` and `history` follow LLaMA-Factory's alpaca and ShareGPT formats.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from shards.tokenization.templates import ROLES


class ChatMessage(NamedTuple):
    """One message. learned: false for an assistant's that is context only."""

    role: str
    content: str
    learned: bool = True


Turns = list[ChatMessage]

WEIGHTS = ("weight", "train", "training", "loss")
"""Of a turn: whether it is learned, as 0 or 1, or false or true."""
SYSTEMS = ("system", "system_prompt")
_NO_TOOLS, _NO_IMAGES = "tool calls are not learned", "text alone is learned"
_NO_REASONING = "reasoning apart from the content is not learned: put it into the content"
_NOT_GIVEN = "templates are not given it"
REASONING = ("reasoning_content", "reasoning", "thinking")
FORBIDDEN = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call"), _NO_TOOLS),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _NO_IMAGES),
    **dict.fromkeys(("documents", "chat_template_kwargs"), _NOT_GIVEN),
    **dict.fromkeys(REASONING, _NO_REASONING),
    "mask": "it is not honoured",
}
"""Fields of a record that change what its conversation means, and why the record is rejected."""
FORBIDDEN_IN_TURNS = {
    **FORBIDDEN,
    "tool_call_id": _NO_TOOLS,
    **dict.fromkeys(("name", "recipient", "channel", "prefix"), _NOT_GIVEN),
    **dict.fromkeys(("train_detail", "refusal"), "it is not honoured"),
}
"""The same of a turn."""
FINISHED, CUT_OFF = ("stop", "eos", "end_turn"), ("length", "max_tokens", "aborted")
"""Why a model's answer is over: it came to its end, or not."""
UNDESIRED = ("label", "kto_tag", "desirable")
"""Where one of these is false, a response is an example of what not to say (the format of KTO's data)."""
METADATA = frozenset({
    "id", "idx", "index", "uuid", "hash", "source", "origin", "dataset", "subset", "split", "category", "task", "task_type",
    "topic", "tags", "lang", "language", "url", "license", "author", "annotator", "model", "model_name", "generator", "created",
    "created_at", "timestamp", "time", "date", "version", "revision", "turns", "num_turns", "tokens", "n_tokens", "token_count",
    "length", "score", "scores", "reward", "rating", "rank", "quality", "meta", "metadata", "extra", "info",
    # What the run's own stages and `midwatch prefer` write beside an answer.
    "checkpoints", "decision", "pair", "of", "original", "principle", "critique", "probability", "chosen_reward", "rejected_reward",
    "response_ids", "chosen_ids", "rejected_ids", "finish_reason", "chosen_finish_reason", "rejected_finish_reason",
})  # fmt: skip
"""Fields that say something about a conversation, and nothing in it."""


class Around(NamedTuple):
    """What a record says beside its own turns."""

    before: Turns
    unread: tuple[str, ...]


def is_empty(value: Any) -> bool:
    """Whether a field's value is as good as none."""
    return value is None or value is False or (isinstance(value, str | list | tuple | dict) and not value)


def _is_flag(name: str, value: Any) -> bool:
    """Whether a field says that an answer reasons, or does not, instead of what: NVIDIA's Nemotron data have "on" and "off".

    Where it is on, the reasoning is in the content.
    """
    return name in REASONING and (value is True or (isinstance(value, str) and value.strip().lower() in ("on", "off")))


def _holds_nothing(value: Any) -> bool:
    """The same of a list that is padded, or written as JSON."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    return is_empty(value) or (isinstance(value, list | tuple) and all(each is None for each in value))


def around(record: Mapping[str, Any], known: Collection[str], allowed: Collection[str] = ()) -> Around | str:
    """The system message and the history of a record whose own turns are in the fields `known`; or why it is rejected.

    allowed: fields that are not forbidden here, but counted as not read.
    """
    before: Turns = []
    unread = []
    for name, value in record.items():
        if name in known:
            continue
        if name in UNDESIRED and name not in allowed and (value is False or (name != "label" and value == 0)):
            return f'"{name}" is false: an example of what not to say'
        if is_empty(value) or _is_flag(name, value) or name in METADATA or name.endswith("_id"):
            continue
        if name in SYSTEMS:
            if not isinstance(value, str):
                return f'field "{name}" is not text'
            if value.strip():
                before.insert(0, ChatMessage("system", value))
        elif name == "history":
            turns = _history(value)
            if isinstance(turns, str):
                return turns
            before += turns
        elif name in FORBIDDEN and _holds_nothing(value):
            continue
        elif name in FORBIDDEN and name not in allowed:
            return f'has "{name}": {FORBIDDEN[name]}'
        elif name == "weight":
            if value != 1:
                return f'"{name}" of a record is not honoured (leave it out, or 1)'
        else:
            unread.append(name)
    if sum(turn.role == "system" for turn in before) > 1:
        return f"both {' and '.join(SYSTEMS)} are there"
    return Around(before, tuple(unread))


def _history(value: Any) -> Turns | str:
    """Earlier questions and their answers, learned as LLaMA-Factory learns them."""
    turns: Turns = []
    for pair in value if isinstance(value, list | tuple) else [value]:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            return 'field "history" is not a list of questions with their answers'
        if not all(text.strip() for text in pair):
            return "empty"
        turns += [ChatMessage("user", pair[0]), ChatMessage("assistant", pair[1])]
    return turns


def messages(value: Sequence[Any], name: str, unread: dict[str, None]) -> Turns | str:
    """The turns of a list of messages with role and content, without empty system messages; or why they are rejected.

    unread: gets the names of fields that are not read.
    """
    turns: Turns = []
    for message in value:
        if not isinstance(message, Mapping):
            return f'field "{name}" is not a list of messages with role and content'
        if message.get("role") == "system" and is_empty(message.get("content")):
            continue
        given = {field: message[field] for field in message if not _is_flag(field, message[field])}
        forbidden = next((field for field in FORBIDDEN_IN_TURNS if not _holds_nothing(given.get(field))), None)
        if forbidden is not None:
            return f'a turn has "{forbidden}": {FORBIDDEN_IN_TURNS[forbidden]}'
        role, content = message.get("role"), _content(message.get("content"))
        if not isinstance(role, str) or content is None:
            return f'field "{name}" is not a list of messages with role and content'
        if isinstance(content, _Part):
            return f'a part of the content is of type "{content.type}": text alone is learned'
        if role not in ROLES:
            return f"a role that is none of {', '.join(ROLES)}"
        if not content.strip():
            if role == "system":
                continue
            return "empty"
        if message.get("finish_reason") in CUT_OFF:
            return 'a turn has a "finish_reason" that says it was cut off (say so beside the messages, of the last answer)'
        learned = _learned(message, role)
        if isinstance(learned, str):
            return learned
        turns.append(ChatMessage(role, content, learned))
        for field in given.keys() - METADATA - {"role", "content", *WEIGHTS}:
            if not is_empty(message[field]) and not field.endswith("_id"):
                unread[f"{field} of a turn"] = None
    return turns or "empty"


class _Part(NamedTuple):
    """A part of a message's content that is no text."""

    type: str


def _content(value: Any) -> str | _Part | None:
    """A text; or a list of parts, those of text put together as multimodal templates do."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list | tuple) or not value:
        return None
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str):
            return None
        if kind not in ("text", "input_text", "output_text"):
            return _Part(kind[:40])
        if not isinstance(part.get("text"), str):
            return None
        texts.append(part["text"])
    return "".join(texts)


def _learned(message: Mapping[str, Any], role: str) -> bool | str:
    """Whether an assistant's turn is learned, by its weights; or why that cannot be done."""
    given = {name: message[name] for name in WEIGHTS if message.get(name) is not None}
    for name, value in given.items():
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            return f'"{name}" of a turn is neither 0 nor 1: it is not honoured'
        if value and role != "assistant":
            return f'"{name}" of a turn by the {role}: the assistant\'s alone are learned'
    return all(given.values())
