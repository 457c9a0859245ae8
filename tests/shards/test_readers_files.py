"""Files: plain, compressed, damaged, huge and strange; nothing is lost silently, and memory is bounded whatever they hold."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard

from shards.build.build import build
from shards.build.marker import build_key
from shards.common.errors import ShardError, SpecError
from shards.readers.base import DAMAGED, NULS
from shards.readers.sources import ReadPosition, Rejected, broken, documents, fingerprint, read_unit, units
from shards.spec import Build, Data, Source, TokenizerSpec, check
from shards.tokenization.records import Document

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def source(place: Path | str, origin: str = "jsonl", **more: Any) -> Source:
    return Source(**{"name": "own", "kind": "text", "origin": origin, "path": str(place), **more})


def read(given: Source) -> tuple[list[Document], list[Rejected]]:
    records = [record for unit in units(given) for record in read_unit(given, unit)]
    return [each for each in records if isinstance(each, Document)], [each for each in records if isinstance(each, Rejected)]


def texts(given: Source) -> list[str]:
    found, rejected = read(given)
    assert rejected == []
    return [document.parts[0] for document in found]


def lines(count: int, start: int = 0) -> bytes:
    return b"".join(json.dumps({"text": f"Line {n} of {n * n}."}).encode() + b"\n" for n in range(start, start + count))


STRANGE = [
    "العربية תורה हिन्दी ไทย 中文 日本語 한국어 ქართული አማርኛ",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \U0001f9ff",
    "a\x01b\x1b[31m\x7f",
    "line\u2028paragraph\u2029\x85\x0b\x0c end\r\n",
    "\ufeffa mark within, \u202eright to left\u202c",
    " ",
]


def test_text_of_every_script_comes_back_as_it_is_from_lines_files_and_rows(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    strange = [text for text in STRANGE if text.strip()]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in strange))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in strange))
    pq.write_table(pa.table({"text": strange}), tmp_path / "c.parquet")
    assert texts(source(tmp_path)) == strange * 2
    assert texts(source(tmp_path, "parquet")) == strange
    for number, text in enumerate(strange):
        (tmp_path / f"{number}.txt").write_bytes(text.encode())
    found = texts(source(tmp_path, "text"))
    assert found == [text.removeprefix("\ufeff") for text in strange]  # a file's first mark says how it is written


@pytest.mark.parametrize("suffix", COMPRESS)
def test_concatenated_members_are_one_file(tmp_path: Path, suffix: str) -> None:
    pack = COMPRESS[suffix]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(pack(lines(300)) + pack(b"") + pack(lines(300, 300)))
    reading = ReadPosition()
    given = source(tmp_path)
    found = [record for unit in units(given) for record in read_unit(given, unit, reading)]
    assert [record.parts[0] for record in found if isinstance(record, Document)] == [f"Line {n} of {n * n}." for n in range(600)]
    assert reading.done == units(given)[0].size == (tmp_path / f"a.jsonl{suffix}").stat().st_size


@pytest.mark.parametrize("suffix", COMPRESS)
def test_every_cut_within_a_compressed_file_is_told(tmp_path: Path, suffix: str) -> None:
    """At the border of two members nothing is missing that could be known of."""
    first = COMPRESS[suffix](lines(40))
    whole = first + COMPRESS[suffix](lines(40, 40))
    path = tmp_path / f"a.jsonl{suffix}"
    for cut in range(1, len(whole)):
        path.write_bytes(whole[:cut])
        found, rejected = read(source(path))
        told = [(each.reason, each.rest) for each in rejected if each.reason != "not JSON"]  # a line that is cut is not either
        assert told == ([] if cut == len(first) else [(DAMAGED, True)]), cut
        assert len(found) <= 80 and [each.parts[0] for each in found] == [f"Line {n} of {n * n}." for n in range(len(found))]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("origin", ["jsonl", "text"])
def test_the_good_part_of_a_damaged_file_is_kept(tmp_path: Path, suffix: str, origin: str) -> None:
    pack = COMPRESS[suffix]
    good = pack(lines(200))
    other = bytearray(pack(lines(200, 200)))
    other[len(other) // 2] ^= 0x10
    path = tmp_path / f"a.{'jsonl' if origin == 'jsonl' else 'txt'}{suffix}"
    path.write_bytes(good + other)
    found, rejected = read(source(path, origin))
    said = "".join(document.parts[0] for document in found)
    assert "Line 0 of 0." in said and "Line 199 of" in said
    assert [(each.rest, each.where) for each in rejected if each.rest] == [(True, str(path))]


def test_zeros_after_a_member_are_padding_and_other_bytes_are_damage(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(3)) + bytes(512))
    assert len(texts(source(tmp_path))) == 3
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines(3)) + b"garbage")
    found, rejected = read(source(tmp_path))
    assert len(found) == 3 and [each.rest for each in rejected] == [True]


def test_frames_of_every_kind_are_followed_to_their_end(tmp_path: Path) -> None:
    """With and without checksum and size, with skippable frames between, in blocks of one byte repeated and stored as they are."""
    import random

    noise = random.Random(0).randbytes(300_000).hex().encode()
    pieces = [b"", b"x" * 1_000_000, noise, lines(5)]
    packed = b""
    for flags in ({"write_checksum": True}, {"write_content_size": False}, {"level": 1}, {"level": 19}):
        packer = zstandard.ZstdCompressor(**flags)
        for piece in pieces:
            packed += packer.compress(piece) + (0x184D2A5E).to_bytes(4, "little") + (5).to_bytes(4, "little") + b"hello"
    path = tmp_path / "a.txt.zst"
    path.write_bytes(packed)
    assert "".join(texts(source(path, "text"))).encode() == b"".join(pieces) * 4
    for cut in (len(packed) - 1, len(packed) - 6, len(packed) - 12, len(packed) // 2):
        path.write_bytes(packed[:cut])
        assert [each.rest for each in read(source(path, "text"))[1]] == [True], cut


def test_a_byte_order_mark_is_no_text_and_other_encodings_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(2))
    assert len(texts(source(tmp_path))) == 2
    (tmp_path / "a.jsonl").write_bytes(lines(2).decode().encode("utf-16"))
    (only,) = read(source(tmp_path))[1]
    assert only.reason == "not UTF-8 but UTF-16 (convert it with iconv)" and only.rest
    for encoding, name in (("utf-16", "UTF-16"), ("utf-32", "UTF-32")):
        (tmp_path / "t.txt").write_bytes("Ein Satz.".encode(encoding))
        assert [name in each.reason for each in read(source(tmp_path, "text"))[1]] == [True]


def test_broken_records_are_kept_with_place_and_reason(tmp_path: Path) -> None:
    broken_lines = [
        (b'{"text": "bad \xff utf-8"}', "not UTF-8"),
        (b'{"text": "\\ud800 alone"}', "a lone surrogate, which is no character"),
        (b'{"text": "cut', "not JSON"),
        (b"\x00\x00", NULS),
        (b'{"text": "a\\u0000b"}', NULS),
        (b"[1]", "not an object"),
        (b'{"text": ""}', "empty"),
        (b'{"text": 1}', 'field "text" is not a string'),
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n\n".join(line for line, _ in broken_lines) + b"\n" + lines(1))
    found, rejected = read(source(tmp_path))
    assert len(found) == 1
    assert [each.reason for each in rejected] == [reason for _, reason in broken_lines]
    assert [each.where for each in rejected] == [f"{tmp_path}/a.jsonl:{1 + 2 * n}" for n in range(len(broken_lines))]
    assert not any(each.rest for each in rejected) and "\\xff" in rejected[0].record


def test_empty_files_and_documents_are_told_of(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"  \n\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "c.txt").write_bytes(b"")
    found, rejected = read(source(tmp_path, "text"))
    assert not found and [each.reason for each in rejected] == ["empty"]  # in the others there is nothing to lose


PEAK = """
import json, sys
from shards.readers.sources import read_unit, units
from shards.tokenization.records import Document
from shards.spec import Source
given = Source(name="a", kind="text", origin=sys.argv[2], path=sys.argv[1])
unit, = units(given)
# Not by getrusage, which counts what the process that started this one held.
peak = lambda: int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) >> 10
before = peak()
count = size = 0
reasons = []
for record in read_unit(given, unit):
    if isinstance(record, Document):
        count, size = count + 1, size + sum(map(len, record.parts))
    else:
        reasons.append(record.reason)
    del record
print(json.dumps([count, size, reasons, peak() - before]))
"""


def peak(path: Path, origin: str) -> tuple[int, int, list[str], int]:
    """Documents, characters, reasons, and MiB of memory over what importing takes."""
    done = subprocess.run([sys.executable, "-c", PEAK, str(path), origin], capture_output=True, text=True, check=True)
    count, size, reasons, memory = json.loads(done.stdout)
    return count, size, reasons, memory


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_bomb_takes_no_more_memory_than_a_long_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bomb.jsonl{suffix}"
    member = COMPRESS[suffix](b"0" * (100 << 20))
    path.write_bytes(member * 6 + COMPRESS[suffix](b"\n" + lines(1)))
    count, _, reasons, memory = peak(path, "jsonl")
    assert path.stat().st_size < 1 << 20
    assert (count, reasons) == (1, ["longer than 64 MiB"]) and memory < 200


def test_a_line_of_100_mb_is_read_as_text_and_told_of_as_a_record(tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_bytes("Grüße ".encode() * (100_000_000 // 8))
    count, size, reasons, memory = peak(path, "text")
    assert (count, size, reasons) == (2, 6 * 12_500_000, []) and memory < 400
    jsonl = tmp_path / "long.jsonl"
    with jsonl.open("wb") as file:
        file.write(b'{"text": "' + b"a" * 100_000_000 + b'"}\n' + lines(2))
    count, _, reasons, memory = peak(jsonl, "jsonl")
    assert (count, reasons) == (2, ["longer than 64 MiB"]) and memory < 250


def test_a_build_stops_at_more_broken_files_than_its_share_and_names_them(tmp_path: Path) -> None:
    for number in range(10):
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(lines(5, 5 * number)))
    for number in (3, 7):
        path = tmp_path / f"{number}.jsonl.gz"
        path.write_bytes(path.read_bytes()[:-9])
    given = source(tmp_path, broken_files=0.1)
    spec = Build(data=Data(source=(given,)), tokenizer=TokenizerSpec(vocab=330), out=str(tmp_path / "o"))
    with pytest.raises(ShardError, match=r"2 of 10 files are broken.*3\.jsonl\.gz, .*7\.jsonl\.gz \(fetch them again"):
        build(spec, workers=0)
    enough = [*documents(source(tmp_path, broken_files=0.2), ReadPosition(), lambda key: False, lambda key: True)]
    assert sum(isinstance(record, Rejected) and record.rest for record in enough) == 2
    broken(given, ["a"], 10)
    with pytest.raises(ShardError, match=r"6 of 50 .* and 1 more"):
        broken(given, [f"f{n}" for n in range(6)], 50)


def test_units_come_in_order_can_be_sent_to_workers_and_change_with_their_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.zst", "deep/c.ndjson", "no.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = units(source(tmp_path))
    assert [Path(unit.name).name for unit in found] == ["a.jsonl.zst", "b.jsonl", "c.ndjson"]
    assert pickle.loads(pickle.dumps(found)) == found and [unit.size for unit in found] == [1, 1, 1]
    before = fingerprint(source(tmp_path))
    (tmp_path / "b.jsonl").write_bytes(b"xy")
    assert fingerprint(source(tmp_path)) != before
    assert [Path(unit.name).name for unit in units(source(tmp_path, suffixes=(".csv",)))] == ["no.csv"]
    with pytest.raises(SpecError, match=r"no files ending in \.parquet"):
        units(source(tmp_path, "parquet"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"origin": "text", "layout": "alpaca"}, "layout is for origin jsonl, parquet"),
        ({"layout": "alpaca"}, 'layout "alpaca" is of kind sft, not text'),
        ({"repository": True}, "repository is for origin code"),
        ({"origin": "latex", "suffixes": (".tex",)}, "suffixes is for origin"),
        ({"suffixes": ("",)}, "use endings of names"),
        ({"origin": "wikipedia", "kind": "sft"}, 'of kind "text"'),
        ({"origin": "warc", "path": None}, "needs a path"),
        ({"broken_files": 1.5}, "use a share from 0 to 1"),
        ({"broken_files": float("nan")}, "use a share from 0 to 1"),
        ({"score_margin": 3}, "score_margin is for origin stackexchange"),
        ({"origin": "stackexchange", "kind": "preference", "score_margin": 0}, "at least 1"),
    ],
)
def test_keys_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        check(Build(data=Data(source=(source("x", **change),)), out="o"))


def test_keys_that_are_not_used_do_not_change_what_is_built() -> None:
    """The first is what this spec is called since files are read as they are now (shards.build.marker.READING)."""
    assert build_key(Build(data=Data(source=(source("x", name="a"),)), out="o")) == "cf684e2a6b7d960e110f37785c405401"
    keys = {
        build_key(Build(data=Data(source=(source("x", **more),)), out="o"))
        for more in ({}, {"broken_files": 0.5}, {"layout": "plain"})
    }
    assert len(keys) == 3


ENGLISH = "The keeper of the light climbed the stairs.\nHe lit the lamp.\n"


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-16", "utf-32-le", "utf-32-be", "utf-32"])
@pytest.mark.parametrize("text", [ENGLISH, "Käse und Brot, naïve Straße.\n", "Привет, мир: the ship\n"])
def test_utf_16_and_32_are_refused_by_name_with_and_without_a_mark(tmp_path: Path, encoding: str, text: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "b.jsonl").write_bytes((json.dumps({"text": text}) + "\n").encode(encoding))
    named = f"not UTF-8 but {encoding[:6].upper()} (convert it with iconv)"
    for origin in ("text", "jsonl"):
        found, rejected = read(source(tmp_path, origin))
        assert found == [] and [(each.reason, each.rest) for each in rejected] == [(named, origin == "jsonl")]


def test_text_with_nuls_is_refused_wherever_it_comes_from(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(ENGLISH.encode() + b"\0" + ENGLISH.encode())
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "a\0b"}) + "\n" + json.dumps({"text": "whole"}) + "\n")
    assert [each.reason for each in read(source(tmp_path, "text"))[1]] == [NULS]
    found, rejected = read(source(tmp_path))
    assert [each.parts[0] for each in found] == ["whole"] and [each.reason for each in rejected] == [NULS]


HIDDEN = (
    ".ipynb_checkpoints/a-checkpoint.jsonl", "._a.jsonl", ".hidden.jsonl", "__MACOSX/a.jsonl", "x/__MACOSX/a.jsonl",
    "x/.deep/y/a.jsonl", "_delta_log/00.jsonl", "_temporary/0/a.jsonl",
)  # fmt: skip


@pytest.mark.parametrize("form", ["directory", "deep glob", "glob", "url", "url glob"])
def test_hidden_files_are_read_only_where_they_are_named(tmp_path: Path, form: str) -> None:
    root = tmp_path / ".cache" / "data"  # what the user names may itself be hidden
    for name in (*HIDDEN, "a.jsonl", "x/_intro.jsonl"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps({"text": name}) + "\n")
    path, wanted = {
        "directory": (str(root), ["a.jsonl", "x/_intro.jsonl"]),
        "deep glob": (f"{root}/**/*.jsonl", ["a.jsonl", "x/_intro.jsonl"]),
        "glob": (f"{root}/*/*.jsonl", ["x/_intro.jsonl"]),
        "url": (f"file://{root}", ["a.jsonl", "x/_intro.jsonl"]),
        "url glob": (f"file://{root}/*/*.jsonl", ["x/_intro.jsonl"]),
    }[form]
    assert texts(source(path)) == wanted
    for name in HIDDEN:
        assert texts(source(root / name)) == [name], "a file that is named is read"
    assert texts(source(root / "__MACOSX")) == ["__MACOSX/a.jsonl"]
    assert texts(source(root / ".h*.jsonl")) == [".hidden.jsonl"]


def test_of_code_dotfiles_are_read_but_not_copies_that_programs_leave(tmp_path: Path) -> None:
    for name in (".eslintrc.js", "._a.js", ".ipynb_checkpoints/b.py", ".github/c.py", "d.py", "__MACOSX/d.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"x = '{name}'\n")
    assert texts(source(tmp_path, "code")) == [f"x = '{name}'\n" for name in (".eslintrc.js", ".github/c.py", "d.py")]


def test_a_directory_of_hidden_files_alone_says_so(tmp_path: Path) -> None:
    (tmp_path / "._a.jsonl").write_text("{}")
    with pytest.raises(SpecError, match=r"no files ending in .*hidden ones are not read"):
        read(source(tmp_path))


def test_a_nul_in_the_first_record_rejects_that_record_alone(tmp_path: Path) -> None:
    (tmp_path / "it.jsonl").write_bytes(b'{"text":"a"}\0\n{"text":"one"}\n{"text":"two"}\n')
    read = Source(name="it", kind="text", origin="jsonl", path=str(tmp_path / "it.jsonl"))
    found = [each for unit in units(read) for each in read_unit(read, unit)]
    assert [each.parts for each in found if isinstance(each, Document)] == [("one",), ("two",)]
    (rejected,) = (each for each in found if isinstance(each, Rejected))
    assert not rejected.rest
