"""Every reader on files whose bytes were changed: a record is text or is told of, nothing is raised, and it is the same twice."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from warcio.warcwriter import WARCWriter

from shards.build.build import build
from shards.format.corpus import Corpus
from shards.format.manifest import verify
from shards.readers.sources import Rejected, read_unit, units
from shards.spec import Build, Data, Source, TokenizerSpec
from shards.tokenization.records import Document

TEXT = "The river rises in the mountains, 日本 and Zürich, and flows north. " * 5


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"text": [f"{n} {TEXT}" for n in range(40)]}), out, row_group_size=10, write_page_checksum=True)
    return out.getvalue()


def warc() -> bytes:
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=False)
    for n in range(4):
        html = f"<html><body><article><h1>{n}</h1><p>{TEXT}</p><p>{TEXT}</p></article></body></html>"
        payload = io.BytesIO(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n" + html.encode())
        writer.write_record(writer.create_warc_record(f"http://a/{n}", "response", payload=payload))
    return out.getvalue()


def paper() -> bytes:
    out = io.BytesIO()
    body = rf"\begin{{document}}\section{{A}} $\R x$ {TEXT} \end{{document}}"
    raw = (r"\documentclass{article}\newcommand{\R}[1]{R_{#1}}" + body).encode()
    with tarfile.open(fileobj=out, mode="w") as tar:
        member = tarfile.TarInfo("m.tex")
        member.size = len(raw)
        tar.addfile(member, io.BytesIO(raw))
    return out.getvalue()


WIKI = "".join(
    f"<page><title>T{n}</title><ns>0</ns><revision><text>{{{{a}}}} [[b|c]] {TEXT} == H == {{| x |}}</text></revision></page>"
    for n in range(9)
)
POSTS = "".join(
    f'<row Id="{2 * n + 1}" PostTypeId="1" Score="1" Title="T" Body="&lt;p&gt;{TEXT}&lt;/p&gt;" />'
    f'<row Id="{2 * n + 2}" PostTypeId="2" ParentId="{2 * n + 1}" Score="{n}" Body="&lt;b&gt;A" />'
    for n in range(9)
)
LINES = "".join(json.dumps({"text": f"{n} {TEXT}"}) + "\n" for n in range(30)).encode()
MARK = "OF THE PROJECT GUTENBERG EBOOK A ***"
BOOK = f"The Project Gutenberg EBook\nTitle: A\n*** START {MARK}\n{TEXT}\n*** END {MARK}\n"
FILES: dict[str, tuple[str, str, Callable[[], bytes]]] = {
    "jsonl": ("jsonl", "a.jsonl", lambda: LINES),
    "jsonl.gz": ("jsonl", "a.jsonl.gz", lambda: gzip.compress(LINES[:3000]) + gzip.compress(LINES[3000:])),
    "jsonl.zst": ("jsonl", "a.jsonl.zst", lambda: zstandard.ZstdCompressor(write_checksum=True).compress(LINES)),
    "text": ("text", "a.txt", lambda: TEXT.encode()),
    "parquet": ("parquet", "a.parquet", parquet),
    "code": ("code", "a.py", lambda: f"def a():\n    return '''{TEXT}'''\n".encode()),
    "warc": ("warc", "a.warc", warc),
    "warc.gz": ("warc", "a.warc.gz", lambda: gzip.compress(warc())),
    "wikipedia": ("wikipedia", "a.xml", lambda: f"<mediawiki>{WIKI}</mediawiki>".encode()),
    "wikipedia.bz2": ("wikipedia", "a.xml.bz2", lambda: bz2.compress(f"<mediawiki>{WIKI}</mediawiki>".encode())),
    "stackexchange": ("stackexchange", "Posts.xml", lambda: f"<posts>{POSTS}</posts>".encode()),
    "latex": ("latex", "2401.00001.tar", paper),
    "gutenberg": ("gutenberg", "a.txt", lambda: BOOK.encode()),
}


def mutated(raw: bytes, rng: random.Random) -> bytes:
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 3, 20))):
        at = rng.randrange(len(data))
        match rng.randrange(5):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + rng.randrange(1, 50)]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 20))
            case 3:
                data[at:at] = rng.choice((b"\xff", b"\0", b"{{", b"<", b"\\", b"{", b'"', b"\n", b"\xed\xa0\x80", b"&#0;"))
            case _:
                data = data[: max(1, at)]
        if not data:
            return b"x"
    return bytes(data)


@pytest.mark.parametrize("name", FILES)
def test_changed_bytes_are_text_or_told_of_and_never_raised(tmp_path: Path, name: str) -> None:
    origin, file, make = FILES[name]
    source = Source(name="own", kind="text", origin=origin, path=str(tmp_path / file))  # type: ignore[arg-type]
    whole, rng = make(), random.Random(name)

    def records() -> list[Document | Rejected]:
        return [record for unit in units(source) for record in read_unit(source, unit)]

    (tmp_path / file).write_bytes(whole)
    assert all(isinstance(record, Document) for record in records())
    for _ in range(40 if name.startswith("warc") else 150):
        (tmp_path / file).write_bytes(mutated(whole, rng))
        found = records()
        assert found == records()
        for record in found:
            said = "".join(record.parts) + record.key if isinstance(record, Document) else record.reason + record.record
            said.encode()  # no lone surrogates


def test_sources_of_many_kinds_are_built_and_come_back(tmp_path: Path) -> None:
    for origin, file, make in FILES.values():
        (tmp_path / origin).mkdir(exist_ok=True)
        (tmp_path / origin / file).write_bytes(make())
    origins = sorted({origin for origin, _, _ in FILES.values()})
    sources = tuple(Source(name=each, kind="text", origin=each, path=str(tmp_path / each)) for each in origins)  # type: ignore[arg-type]
    spec = Build(
        data=Data(source=sources, held_out=0), tokenizer=TokenizerSpec(vocab=360, sample_bytes=50_000), out=str(tmp_path / "o")
    )
    out = build(spec, workers=0)
    for each in origins:
        assert list(verify(out / each / "train")) == [] and Corpus(out, each, "train").documents >= 1
