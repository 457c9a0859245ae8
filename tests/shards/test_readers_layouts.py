"""Instruction data and preferences in the layouts that they are published in, from lines and from Parquet alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.readers.base import DAMAGED
from shards.readers.sources import Rejected, read_unit, units
from shards.spec import Source
from shards.tokenization.records import Document

USER_ASSISTANT = ("user", "assistant")


def read(path: Path, origin: str = "jsonl", kind: str = "sft", **more: Any) -> tuple[list[Document], list[Rejected]]:
    source = Source(**{"name": "own", "kind": kind, "origin": origin, "path": str(path), **more})
    records = [record for unit in units(source) for record in read_unit(source, unit)]
    return [each for each in records if isinstance(each, Document)], [each for each in records if isinstance(each, Rejected)]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


LAYOUTS: dict[str, tuple[list[dict[str, Any]], list[tuple[str, ...]], list[str]]] = {
    "plain": ([{"prompt": "Hi?", "response": "Hello."}], [("Hi?", "Hello.")], []),
    "messages": (
        [
            {
                "messages": [
                    {"role": "system", "content": "Be kind."},
                    {"role": "user", "content": "Hi?"},
                    {"role": "assistant", "content": "Yes."},
                ]
            }
        ],
        [("Be kind.", "Hi?", "Yes.")],
        [],
    ),
    "alpaca": (
        [
            {"instruction": "Add.", "input": "1 + 2", "output": "3"},
            {"instruction": "Greet.", "input": "", "output": "Hello."},
            {"instruction": "Say nothing.", "input": "", "output": ""},
        ],
        [("Add.\n\n1 + 2", "3"), ("Greet.", "Hello.")],
        ["empty"],
    ),
    "sharegpt": (
        [
            {
                "id": "a",
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Ho"},
                    {"from": "human", "value": "Bye"},
                ],
            },
            {
                "id": "b",
                "conversations": [{"from": "gpt", "value": "cut"}, {"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
            },
            {"id": "c", "conversations": [{"from": "tool", "value": "x"}]},
        ],
        [("Hi", "Ho"), ("Q", "A")],
        ["a turn from 'tool', who is neither human, gpt nor system"],
    ),
    "dolly": (
        [{"instruction": "Who?", "context": "Ann wrote it.", "response": "Ann.", "category": "closed_qa"}],
        [("Who?\n\nAnn wrote it.", "Ann.")],
        [],
    ),
    "lima": (
        [{"conversations": ["Why?", "Because."], "source": "wikihow"}, {"conversations": ["Alone"], "source": "x"}],
        [("Why?", "Because.")],
        ["no assistant turn"],
    ),
    "flan": ([{"inputs": "Translate: Haus", "targets": "house", "task": "t"}], [("Translate: Haus", "house")], []),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("origin", ["jsonl", "parquet"])
@pytest.mark.parametrize("told", [True, False])
def test_each_published_layout_is_read_and_recognised(tmp_path: Path, layout: str, origin: str, told: bool) -> None:
    records, conversations, reasons = LAYOUTS[layout]
    path = tmp_path / f"a.{origin}"
    if origin == "jsonl":
        write(path, records)
    else:
        pq.write_table(pa.Table.from_pylist(records), path)
    found, rejected = read(path, origin, layout=layout if told else "auto")
    assert [each.parts for each in found] == conversations
    assert [each.reason for each in rejected] == reasons
    assert all(each.roles[-2:] == USER_ASSISTANT and len(each.roles) == len(each.parts) for each in found)


def message(number: str, parent: str | None, role: str, text: str, rank: int | None = None, **more: Any) -> dict[str, Any]:
    return {
        "message_id": number,
        "parent_id": parent,
        "message_tree_id": number[0],
        "role": role,
        "text": text,
        "rank": rank,
        "deleted": False,
        **more,
    }


FLAT = [
    message("a", None, "prompter", "Q?"),
    message("a1", "a", "assistant", "worse", 1),
    message("a2", "a", "assistant", "best", 0),
    message("a21", "a2", "prompter", "And?"),
    message("a211", "a21", "assistant", "more"),
    message("a3", "a", "assistant", "worst", 2),
    message("a4", "a", "assistant", "bad", None, deleted=True),
    message("b", None, "prompter", "Alone?"),
]


def tree(messages: list[dict[str, Any]], root: str) -> dict[str, Any]:
    told = {each["message_id"]: {**each, "replies": []} for each in messages}
    for each in messages:
        if each["parent_id"] in told:
            told[each["parent_id"]]["replies"].append(told[each["message_id"]])
    return {"message_tree_id": root, "tree_state": "ready_for_export", "prompt": told[root]}


@pytest.mark.parametrize("form", ["flat", "trees", "parquet"])
def test_openassistants_trees_give_the_best_path_and_ranked_pairs(tmp_path: Path, form: str) -> None:
    if form == "parquet":
        pq.write_table(pa.Table.from_pylist(FLAT), tmp_path / "a.parquet")
    else:
        write(tmp_path / "a.jsonl", FLAT if form == "flat" else [tree(FLAT, "a"), tree(FLAT, "b")])
    origin = "parquet" if form == "parquet" else "jsonl"
    found, rejected = read(tmp_path, origin)
    assert [(each.parts, each.roles) for each in found] == [(("Q?", "best", "And?", "more"), USER_ASSISTANT * 2)]
    assert sorted(each.reason for each in rejected) == ["deleted", "no assistant turn"]
    pairs, rejected = read(tmp_path, origin, "preference")
    assert [(each.parts, each.roles) for each in pairs] == [
        (("Q?", "best", "worse"), ("user",)),
        (("Q?", "best", "worst"), ("user",)),
    ]
    assert sorted(each.reason for each in rejected) == ["deleted", "no ranked answers to choose from"]
    assert {each.key for each in pairs} == {each.key for each in found}


def test_a_message_whose_parent_is_missing_is_told_of(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [*FLAT[:3], message("ax", "zz", "assistant", "lost")])
    assert [each.reason for each in read(tmp_path)[1]] == ["its parent is not beside it"]


HH = {
    "chosen": "\n\nHuman: How?\n\nAssistant: Which one?\n\nHuman: The: first\n\nAssistant: So.",
    "rejected": "\n\nHuman: How?\n\nAssistant: Which one?\n\nHuman: The: first\n\nAssistant: No.",
}


@pytest.mark.parametrize("layout", ["auto", "hh"])
def test_whole_conversations_of_human_and_assistant_are_preferences(tmp_path: Path, layout: str) -> None:
    write(tmp_path / "a.jsonl", [HH, {**HH, "rejected": "something else"}, {**HH, "rejected": HH["chosen"]}])
    found, rejected = read(tmp_path, kind="preference", layout=layout)
    assert [(each.parts, each.roles) for each in found] == [
        (("How?", "Which one?", "The: first", "So.", "No."), ("user", "assistant", "user"))
    ]
    assert [each.reason for each in rejected] == [
        'field "rejected" is not "Human: ..." and "Assistant: ..." in turn',
        "both answers are the same",
    ]


def test_the_sources_own_fields_come_before_any_layout(tmp_path: Path) -> None:
    record = {"prompt": "own", "response": "fields", "instruction": "alpaca's", "output": "fields"}
    assert read(write(tmp_path / "a.jsonl", [record]))[0][0].parts == ("own", "fields")
    pair = {"prompt": "p", "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "c"}
    assert read(write(tmp_path / "a.jsonl", [pair]), kind="preference")[0][0].parts[0] == "p"


def test_alpaca_is_put_together_as_its_publishers_inputs_are(tmp_path: Path) -> None:
    """Their data card: `input` is context for `instruction`, empty in some 60 % of records."""
    given = {"instruction": "Identify the odd one out.", "input": "Twitter, Instagram, Telegram", "output": "Telegram", "text": "x"}
    found, _ = read(write(tmp_path / "a.jsonl", [given]))
    assert found[0].parts == ("Identify the odd one out.\n\nTwitter, Instagram, Telegram", "Telegram")


def test_parquet_streams_row_groups_of_the_column_that_is_needed(tmp_path: Path) -> None:
    texts = [f"Row {number} 日本 " * 50 for number in range(3000)]
    table = pa.table({"text": pa.array(texts, pa.large_string()), "id": range(3000), "blob": [b"x" * 500] * 3000})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=700, compression="zstd")
    found, rejected = read(tmp_path, "parquet", "text")
    assert [each.parts[0] for each in found] == texts and rejected == []
    assert found[1500].where == f"{tmp_path}/a.parquet:1501"


def test_parquet_that_is_damaged_or_lacks_the_column_is_broken(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"body": ["a"] * 10}), path)
    (only,) = read(path, "parquet", "text")[1]
    assert only.rest and only.reason == 'no column "text"' and "body" in only.record
    pq.write_table(pa.table({"text": [f"{n} " * 3000 for n in range(64)]}), path, row_group_size=16, write_page_checksum=True)
    raw = bytearray(path.read_bytes())
    whole = pq.ParquetFile(path).metadata.row_group(2).column(0)
    raw[whole.data_page_offset + whole.total_compressed_size // 2] ^= 4
    path.write_bytes(raw)
    found, rejected = read(path, "parquet", "text")
    assert 32 <= len(found) < 64 and [(each.reason, each.rest) for each in rejected] == [(DAMAGED, True)]
    path.write_bytes(raw[:-7])
    found, rejected = read(path, "parquet", "text")
    assert not found and [(each.reason, each.rest) for each in rejected] == [(DAMAGED, True)]


def test_rows_of_parquet_that_are_not_utf8_null_or_too_long_are_kept_if_written(tmp_path: Path) -> None:
    raw = pa.array([b"good", b"bad \xff", None, b"a" * (65 << 20), b"fine"], pa.binary())
    pq.write_table(pa.table({"text": raw.view(pa.string())}), tmp_path / "a.parquet")
    found, rejected = read(tmp_path, "parquet", "text")
    assert [each.parts[0] for each in found] == ["good", "fine"]
    assert [each.reason for each in rejected] == ["not UTF-8", 'field "text" is not a string', "longer than 64 MiB"]
    assert "\\xff" in rejected[0].record


def test_jsonl_and_parquet_give_what_datatroves_readers_give(tmp_path: Path) -> None:
    from datatrove.pipeline.readers import JsonlReader, ParquetReader

    records = [{"text": f"Text {n} — ünïcode 日本", "id": str(n), "n": n} for n in range(500)]
    write(tmp_path / "a.jsonl", records)
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "b.parquet")
    theirs = [each.text for each in JsonlReader(str(tmp_path), glob_pattern="*.jsonl", file_progress=False)()]
    assert [each.parts[0] for each in read(tmp_path, kind="text")[0]] == theirs
    theirs = [each.text for each in ParquetReader(str(tmp_path), glob_pattern="*.parquet", file_progress=False)()]
    assert [each.parts[0] for each in read(tmp_path, "parquet", "text")[0]] == theirs
