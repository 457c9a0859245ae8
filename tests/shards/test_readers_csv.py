"""CSV and TSV, against pandas where both read, and by name where it is not clear what was written."""

from __future__ import annotations

import csv
import gzip
import io
import random
from pathlib import Path
from typing import Any

import pytest

from shards.common.errors import SpecError
from shards.readers.base import Rejected
from shards.readers.sources import read_unit, units
from shards.spec import Build, Data, Source, TokenizerSpec, check
from shards.tokenization.records import Document


def records(path: Path, **more: Any) -> list[Document | Rejected]:
    source = Source(**({"name": "s", "kind": "text", "origin": "csv", "path": str(path)} | more))
    return [record for unit in units(source) for record in read_unit(source, unit)]


def texts(path: Path, **more: Any) -> list[str]:
    return ["|".join(each.parts) for each in records(path, **more) if isinstance(each, Document)]


def reasons(path: Path, **more: Any) -> list[str]:
    return [each.reason for each in records(path, **more) if isinstance(each, Rejected)]


def test_fields_are_those_that_were_written(tmp_path: Path) -> None:
    """Quotes, delimiters, line ends and every script within fields; what Python's csv writes is read back."""
    dice = random.Random(3)
    alphabet = ['"', ",", "\n", "\r\n", "\t", " ", "ä", "日本", "😀", "word", ";"]
    rows = [("".join(dice.choices(alphabet, k=dice.randint(1, 30))) + "x", str(number)) for number in range(300)]
    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t"), ("b.csv.gz", ",")):
        text = io.StringIO()
        writer = csv.writer(text, delimiter=delimiter)
        writer.writerows([("text", "number"), *rows])
        data = text.getvalue().encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        assert texts(tmp_path / name) == [row[0] for row in rows], name


def test_conversations_and_pairs_by_their_fields(tmp_path: Path) -> None:
    (tmp_path / "sft.csv").write_text('prompt,response\n"What, now?","Then."\nWho?,Me.\n')
    assert texts(tmp_path / "sft.csv", kind="sft") == ["What, now?|Then.", "Who?|Me."]
    (tmp_path / "pairs.tsv").write_text("prompt\tchosen\trejected\nq\tyes\tno\n")
    assert len(texts(tmp_path / "pairs.tsv", kind="preference")) == 1
    (tmp_path / "alpaca.csv").write_text("instruction,input,output\nSay it.,,It.\n")
    assert texts(tmp_path / "alpaca.csv", kind="sft") == ["Say it.|It."]


def test_a_mark_at_the_beginning_is_no_part_of_the_first_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,n\r\nhello,1\r\n")
    assert texts(tmp_path / "a.csv") == ["hello"]


@pytest.mark.parametrize(
    ("content", "reason", "kept"),
    [
        (b"text,n\na,1\nb\nc,2,3\nd,4\n", "1 fields where the header has 2", ["a", "d"]),
        (b"text,n\na,1\n\xff\xfe!,2\nd,4\n", "not UTF-8", ["a", "d"]),
        (b'text,n\na,1\n"b,2\nc,3\n', "not CSV: unexpected end of data", ["a"]),
        (b'text,n\na,1\n"b"c,2\nd,3\n', "not CSV: ',' expected after '\"'", ["a"]),
        (b"text;n\na;1\n", "a header of one field that has semicolons in it", []),
        (b"text\tn\na\t1\n", "a header of one field that has tabs in it", []),
        (b"text,text\na,b\n", 'two fields are named "text"', []),
        ("text\nä\n".encode("utf-16"), "not UTF-8 but UTF-16", []),
    ],
)
def test_what_is_not_clear_is_left_out_by_name(tmp_path: Path, content: bytes, reason: str, kept: list[str]) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    assert any(each.startswith(reason) for each in reasons(tmp_path / "a.csv")), reasons(tmp_path / "a.csv")
    assert texts(tmp_path / "a.csv") == kept


def test_a_record_says_on_which_line_it_ends(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('text,n\n"two\nlines",1\nb\n')
    (rejected,) = [each for each in records(tmp_path / "a.csv") if isinstance(each, Rejected)]
    assert rejected.where.endswith("a.csv:4")


def test_a_quote_that_is_not_closed_takes_no_more_than_a_records_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.readers.csv.LONGEST_RECORD", 1000)
    (tmp_path / "a.csv").write_text('text,n\na,1\n"' + "b,2\n" * 1000)
    assert texts(tmp_path / "a.csv") == ["a"]
    assert reasons(tmp_path / "a.csv") == ["not CSV: field larger than field limit (1000)"]
    (tmp_path / "a.csv").write_text("text,n\na,1\n" + "b" * 5000)
    assert reasons(tmp_path / "a.csv")[0].startswith("not CSV: longer than")


def test_a_source_of_csv_takes_the_keys_that_records_take(tmp_path: Path) -> None:
    def of(**more: Any) -> Build:
        source = Source(**({"name": "s", "kind": "sft", "origin": "csv", "path": "a.csv"} | more))
        return Build(data=Data(source=(source,)), tokenizer=TokenizerSpec(), out=str(tmp_path))

    check(of(layout="alpaca", suffixes=(".txt",)))
    with pytest.raises(SpecError, match="repository is for origin code"):
        check(of(repository=True))
    with pytest.raises(SpecError, match=r"origin must be one of stdlib-code, .*, csv, .*, but it is 'xlsx'"):
        check(of(origin="xlsx"))
