"""Instruction data in the layouts that data sets are published in, as records for `shards.tokenization.records`.

plain      the source's own fields: text; prompt and response, or messages; prompt, chosen and rejected
messages   messages: [{role, content}], as chat models' data sets have it
alpaca     instruction, input, output (Taori et al. 2023, Stanford Alpaca)
sharegpt   conversations: [{from: human | gpt | system, value}] (Vicuna's)
dolly      instruction, context, response, category (Databricks, 2023)
oasst      OpenAssistant's message trees, or its flat messages with parent_id (Köpf et al. 2023)
lima       conversations: [text, text, ...], user and assistant in turn (Zhou et al. 2023)
flan       inputs, targets (Longpre et al. 2023)
hh         chosen, rejected: whole texts of "\\n\\nHuman: ..." and "\\n\\nAssistant: ..." (Bai et al. 2022)
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from shards.readers.base import Record, Rejected, shown
from shards.readers.oasst import conversations
from shards.spec import Source
from shards.tokenization.records import Document, in_record

Fields = Mapping[str, Any]
Placed = tuple[str, Fields] | Rejected  # (where, record)

ROLE_NAMES = {
    **dict.fromkeys(("human", "user", "prompter"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "system": "system",
}
CONTEXT = "{}\n\n{}"  # how an instruction and what it is about are put together
_SAID = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")


def documents(records: Iterator[Placed], source: Source) -> Iterator[Record]:
    """The documents in a file's records, and what is rejected."""
    if source.kind == "text":
        yield from _plain(records, source)
        return
    layout: str = source.layout
    if layout == "auto":
        early: list[Placed] = []
        for record in records:
            early.append(record)
            if not isinstance(record, Rejected):
                layout = told(record[1], source)
                break
        records = itertools.chain(early, records)
    if layout == "oasst":
        yield from conversations(records, source)
    elif layout in CONVERTERS:
        yield from _converted(records, source, *CONVERTERS[layout])
    else:
        yield from _plain(records, _messages(source) if layout == "messages" else source)


def told(record: Fields, source: Source) -> str:
    """The layout that a record is in; "plain" where it has the source's own fields, or none that are known."""
    has = record.keys()
    said = record.get("conversations")
    first = said[0] if isinstance(said, list) and said else None
    if source.kind == "unpaired":
        return "plain"  # other layouts have no label
    if source.kind == "preference":
        if source.prompt_field not in has and isinstance(text := record.get("chosen"), str) and _SAID.match(text):
            return "hh"
        return "oasst" if _is_oasst(record) else "plain"
    if (source.response_field in has and source.prompt_field in has) or source.messages_field in has:
        return "plain"
    if isinstance(first, dict):
        return "sharegpt"
    if isinstance(first, str):
        return "lima"
    for layout, fields in (
        ("dolly", {"instruction", "context", "response"}),
        ("alpaca", {"instruction", "output"}),
        ("flan", {"inputs", "targets"}),
    ):
        if fields <= has:
            return layout
    return "oasst" if _is_oasst(record) else "plain"


def _is_oasst(record: Fields) -> bool:
    return "message_tree_id" in record or ("prompt" in record and isinstance(record["prompt"], dict))


def _messages(source: Source) -> Source:
    """With no field of a response, the messages are what is read."""
    return msgspec.structs.replace(source, response_field="\0")


def _plain(records: Iterator[Placed], source: Source) -> Iterator[Record]:
    for record in records:
        if isinstance(record, Rejected):
            yield record
        else:
            found = in_record(record[1], source, record[0])
            yield found if isinstance(found, Document) else _rejected(record, found)


def _rejected(record: tuple[str, Fields], reason: str) -> Rejected:
    return Rejected(record[0], reason, shown(msgspec.json.encode(record[1], enc_hook=str)))


STANDARD = Source(name="layout", kind="sft", origin="jsonl", path="", response_field="\0")


def _converted(
    records: Iterator[Placed], source: Source, convert: Callable[[Fields], Fields | str], read: frozenset[str]
) -> Iterator[Record]:
    """read: the fields that `convert` reads; the others of a record say the same in every layout."""
    standard = msgspec.structs.replace(STANDARD, kind=source.kind)
    for record in records:
        if isinstance(record, Rejected):
            yield record
            continue
        fields = convert(record[1])
        others = {name: value for name, value in record[1].items() if name not in read}
        found = fields if isinstance(fields, str) else in_record({**others, **fields}, standard, record[0])
        yield found if isinstance(found, Document) else _rejected(record, found)


def _pair(prompt: str, response: str, context: str = "") -> Callable[[Fields], Fields | str]:
    def convert(record: Fields) -> Fields | str:
        for name in (prompt, response):
            if not isinstance(record.get(name), str):
                return f'field "{name}" is not a string' if name in record else f'no field "{name}"'
        asked, about = record[prompt], record.get(context) or ""
        if not isinstance(about, str):
            return f'field "{context}" is not a string'
        if about.strip():
            asked = CONTEXT.format(asked, about)
        return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": record[response]}]}

    return convert


def _sharegpt(record: Fields) -> Fields | str:
    said = record.get("conversations")
    if not isinstance(said, list):
        return 'no field "conversations" that is a list'
    messages = []
    for turn in said:
        if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str | list):
            return 'field "conversations" is not a list of turns with from and value'
        role = ROLE_NAMES.get(turn["from"])
        if role is None:
            return f"a turn from {turn['from'][:40]!r}, who is neither human, gpt nor system"
        messages.append({**{name: value for name, value in turn.items() if name not in ("from", "value")}, "role": role})
        messages[-1]["content"] = turn["value"]
    # Many published conversations begin with an answer whose question was cut off.
    first = next((at for at, turn in enumerate(messages) if turn["role"] == "user"), len(messages))
    messages = [turn for at, turn in enumerate(messages) if at > first or turn["role"] != "assistant"]
    return {"messages": messages} if any(turn["role"] == "user" for turn in messages) else "no question"


def _lima(record: Fields) -> Fields | str:
    said = record.get("conversations")
    if not isinstance(said, list) or not all(isinstance(text, str) for text in said):
        return 'field "conversations" is not a list of texts'
    roles = itertools.cycle(("user", "assistant"))
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, said, strict=False)]}


def _hh(record: Fields) -> Fields | str:
    found = {}
    for name in ("chosen", "rejected"):
        text = record.get(name)
        if not isinstance(text, str):
            return f'field "{name}" is not a string' if name in record else f'no field "{name}"'
        pieces = _SAID.split(text.replace("\r\n", "\n"))
        if pieces[0].strip() or len(pieces) < 5:
            return f'field "{name}" is not "Human: ..." and "Assistant: ..." in turn'
        turns = zip(pieces[1::2], pieces[2::2], strict=True)
        found[name] = [{"role": ROLE_NAMES[who.lower()], "content": said.strip()} for who, said in turns]
    return found


CONVERTERS: dict[str, tuple[Callable[[Fields], Fields | str], frozenset[str]]] = {
    "alpaca": (_pair("instruction", "output", "input"), frozenset({"instruction", "output", "input", "text"})),
    "dolly": (_pair("instruction", "response", "context"), frozenset({"instruction", "response", "context"})),
    "flan": (_pair("inputs", "targets"), frozenset({"inputs", "targets"})),
    "sharegpt": (_sharegpt, frozenset({"conversations"})),
    "lima": (_lima, frozenset({"conversations"})),
    "hh": (_hh, frozenset({"chosen", "rejected"})),
}
"""How a layout's records become records of messages, and the fields that it reads. Alpaca's `text` is the whole record again."""
