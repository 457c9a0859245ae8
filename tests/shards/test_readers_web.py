"""Crawled pages and code: what is text or code stays, what is not is counted by its reason."""

from __future__ import annotations

import gzip
import io
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import brotli
import pytest
import zstandard
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from shards.common.errors import SpecError
from shards.readers.base import DAMAGED
from shards.readers.code import language, of_path, of_text
from shards.readers.sources import Rejected, read_unit, units
from shards.spec import Source
from shards.tokenization.records import Document


def read(path: Path, origin: str, **more: Any) -> tuple[list[Document], list[Rejected]]:
    source = Source(**{"name": "own", "kind": "text", "origin": origin, "path": str(path), **more})
    records = [record for unit in units(source) for record in read_unit(source, unit)]
    return [each for each in records if isinstance(each, Document)], [each for each in records if isinstance(each, Rejected)]


SENTENCES = [
    "The river rises in the mountains and flows north through three lakes before it reaches the plain.",
    "Its water drives eleven power stations, the oldest of which was built more than a century ago.",
    "In spring, when the snow melts, the level can rise by two metres within a single night.",
]
PAGE = f"""<!DOCTYPE html><html lang="en"><head><title>Rivers — a guide</title><script>var tracking = 1;</script></head>
<body><nav><a href="/">Home</a> <a href="/about">About us</a></nav>
<article><h1>The river</h1>{"".join(f"<p>{sentence}</p>" for sentence in SENTENCES)}</article>
<footer>Copyright notice and <a href="/legal">legal text</a></footer></body></html>"""


def warc(pages: list[tuple[str, str, str, bytes]], *, packed: bool = True) -> bytes:
    """By warcio's own writer: (URL, status, content type, body)."""
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=packed)
    writer.write_record(writer.create_warcinfo_record("x.warc.gz", {"software": "test"}))
    for url, status, kind, body in pages:
        headers = [("Content-Type", kind)] if kind else []
        http = StatusAndHeaders(status, headers, protocol="HTTP/1.1")
        record = writer.create_warc_record(url, "response", payload=io.BytesIO(body), http_headers=http)
        request = StatusAndHeaders("GET / HTTP/1.1", [("Host", "x")], is_http_request=True)
        writer.write_request_response_pair(writer.create_warc_record(url, "request", http_headers=request), record)
    return out.getvalue()


PAGES = [
    ("https://a.example/river", "200 OK", "text/html; charset=utf-8", PAGE.encode()),
    ("https://a.example/gone", "404 Not Found", "text/html", PAGE.encode()),
    ("https://a.example/cat.png", "200 OK", "image/png", b"\x89PNG\r\n"),
    ("https://a.example/latin", "200 OK", "text/html", PAGE.replace("—", "é").replace("utf-8", "").encode("latin-1")),
    ("https://a.example/untold", "200 OK", "", PAGE.encode()),
    ("https://a.example/menu", "200 OK", "text/html", b"<html><body></body></html>"),
]


@pytest.mark.parametrize("suffix", [".gz", "", ".zst"])
def test_pages_give_their_main_text_by_their_address(tmp_path: Path, suffix: str) -> None:
    raw = warc(PAGES, packed=suffix == ".gz")
    (tmp_path / f"x.warc{suffix}").write_bytes(zstandard.compress(raw) if suffix == ".zst" else raw)
    found, rejected = read(tmp_path, "warc")
    assert [each.key for each in found] == [f"https://a.example/{name}" for name in ("river", "latin", "untold")]
    for document in found:
        text = document.parts[0]
        assert text.split("\n")[-3:] == SENTENCES and "tracking" not in text and "About us" not in text
    assert [each.reason for each in rejected] == ["status 404", "not HTML", "no main text"]
    assert rejected[0].where == f"{tmp_path}/x.warc{suffix}: https://a.example/gone"


def coded(coding: str, body: bytes, *, chunked: bool = False) -> bytes:
    """A page with a content coding, in a WARC file."""
    out = io.BytesIO()
    writer = WARCWriter(out, gzip=False)
    headers = [("Content-Type", "text/html"), ("Content-Encoding", coding)] + (
        [("Transfer-Encoding", "chunked")] if chunked else []
    )
    body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    http = StatusAndHeaders("200 OK", headers, protocol="HTTP/1.1")
    writer.write_record(writer.create_warc_record("https://a.example/", "response", payload=io.BytesIO(body), http_headers=http))
    return out.getvalue()


BODY = PAGE.encode()
BOMB = b"<html>" + bytes(1 << 26)


def inflated_raw(body: bytes) -> bytes:
    """As some servers send `deflate`: without zlib's header."""
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "body", "reason"),
    [
        ("gzip", gzip.compress(BODY), ""),
        ("X-GZip", gzip.compress(BODY) + b"what browsers ignore", ""),
        ("gzip", gzip.compress(BODY)[:-100], "content-encoding gzip is damaged"),
        ("gzip", b"no tag, <p>and no gzip</p>" + BODY, ""),
        ("deflate", zlib.compress(BODY), ""),
        ("deflate", inflated_raw(BODY), ""),
        ("deflate", zlib.compress(BODY)[:-100], "content-encoding deflate is damaged"),
        ("zstd", zstandard.compress(BODY), ""),
        ("ZSTD", zstandard.ZstdCompressor(write_content_size=False).compress(BODY), ""),
        ("zstd", zstandard.compress(BODY)[:-100], "content-encoding zstd is damaged"),
        ("zstd", b"\x28\xb5\x2f\xfd broken", "content-encoding zstd is damaged"),
        ("compress", b"\x1f\x9d\x90" + bytes(range(128, 256)), "content-encoding compress not read"),
        ("br", brotli.compress(BODY), ""),
        ("br", brotli.compress(BODY)[:-100], "content-encoding br is damaged"),
        ("br", bytes(range(128, 256)), "content-encoding br is damaged"),
        ("br", BODY, ""),  # the crawler has decoded it, and left the header
        ("br, gzip", gzip.compress(brotli.compress(BODY)), ""),  # in the order in which they were applied
        ("identity", BODY, ""),
        ("utf-8", BODY, ""),  # no coding at all, but servers send it
        ("br", b"", "no main text"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_pages_content_coding_is_decoded_or_named(tmp_path: Path, coding: str, body: bytes, reason: str, chunked: bool) -> None:
    (tmp_path / "x.warc").write_bytes(coded(coding, body, chunked=chunked))
    found, rejected = read(tmp_path, "warc")
    assert [each.reason for each in rejected] == ([reason] if reason else [])
    assert not reason or not found
    assert reason or found[0].parts[0].split("\n")[-3:] == SENTENCES


@pytest.mark.parametrize(
    ("coding", "body"),
    [
        ("br", brotli.compress(BOMB, quality=5)),
        ("gzip", gzip.compress(BOMB)),
        ("deflate", zlib.compress(BOMB)),
        ("zstd", zstandard.compress(BOMB)),
        ("gzip, br", brotli.compress(gzip.compress(BOMB))),
    ],
    ids=["br", "gzip", "deflate", "zstd", "both"],
)
@pytest.mark.parametrize("chunked", [False, True])
def test_a_page_that_expands_without_end_takes_little_memory(tmp_path: Path, coding: str, body: bytes, chunked: bool) -> None:
    (tmp_path / "x.warc").write_bytes(coded(coding, body, chunked=chunked))
    read(tmp_path, "warc")  # what is loaded and compiled the first time
    tracemalloc.start()
    found, rejected = read(tmp_path, "warc")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not found and [each.reason for each in rejected] == ["longer than 8 MiB"]
    assert most < 40 << 20


def test_one_chunk_of_any_length_takes_little_memory(tmp_path: Path) -> None:
    """WARC files are compressed, so a page in one chunk of 64 MiB costs a small file."""
    (tmp_path / "x.warc.gz").write_bytes(gzip.compress(coded("identity", BOMB, chunked=True)))
    tracemalloc.start()
    found, rejected = read(tmp_path, "warc")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not found and [each.reason for each in rejected] == ["longer than 8 MiB"]
    assert most < 40 << 20


def test_what_follows_the_last_chunk_is_no_damage(tmp_path: Path) -> None:
    raw = coded("identity", BODY, chunked=True)
    length = b"Content-Length: %d" % (len(raw.partition(b"\r\n\r\n")[2]) - 4)
    assert length in raw
    longer = raw.replace(length, b"Content-Length: %d" % (int(length[16:]) + 4))[:-4] + b"junk\r\n\r\n"
    (tmp_path / "x.warc").write_bytes(longer + raw)
    found, rejected = read(tmp_path, "warc")
    assert len(found) == 2 and not rejected


def test_a_warc_that_was_cut_off_gives_what_it_has(tmp_path: Path) -> None:
    raw = warc(PAGES[:1] * 3)
    (tmp_path / "x.warc.gz").write_bytes(raw[: len(raw) * 4 // 5])
    found, rejected = read(tmp_path, "warc")
    assert len(found) == 2 and [(each.reason, each.rest) for each in rejected][-1] == (DAMAGED, True)
    (tmp_path / "x.warc.gz").unlink()
    raw = warc(PAGES[:1] * 3, packed=False)
    (tmp_path / "x.warc").write_bytes(raw[: len(raw) * 4 // 5])
    found, rejected = read(tmp_path, "warc")
    assert len(found) == 2 and [(each.reason, each.rest) for each in rejected] == [(DAMAGED, True)]
    (tmp_path / "x.warc").unlink()
    (tmp_path / "x.warc.gz").write_bytes(gzip.compress(b"this is no WARC\r\n" * 20))
    found, rejected = read(tmp_path, "warc")
    assert not found and rejected[0].rest


def wet(texts: dict[str, bytes]) -> bytes:
    """As Common Crawl writes them."""
    date = "WARC-Date: 2024-01-01T00:00:00Z"
    first = f"WARC/1.0\r\nWARC-Type: warcinfo\r\n{date}\r\nWARC-Record-ID: <urn:uuid:0>\r\nContent-Length: 2\r\n\r\nab\r\n\r\n"
    packed = gzip.compress(first.encode())
    for number, (url, text) in enumerate(texts.items(), 1):
        head = (
            f"WARC/1.0\r\nWARC-Type: conversion\r\nWARC-Target-URI: {url}\r\n{date}\r\n"
            f"WARC-Record-ID: <urn:uuid:{number}>\r\nContent-Type: text/plain\r\nContent-Length: {len(text)}\r\n\r\n"
        )
        packed += gzip.compress(head.encode() + text + b"\r\n\r\n")
    return packed


def test_wet_files_give_common_crawls_text_as_it_is(tmp_path: Path) -> None:
    texts = {"https://a.example/1": "Zürich\n日本\n".encode(), "https://a.example/2": b"bad \xff", "https://a.example/3": b"  "}
    (tmp_path / "CC-MAIN-1.warc.wet.gz").write_bytes(wet(texts))
    found, rejected = read(tmp_path, "wet")
    assert [(each.key, each.parts) for each in found] == [("https://a.example/1", ("Zürich\n日本\n",))]
    assert [each.reason for each in rejected] == ["not UTF-8", "empty"]


GOOD = "def area(radius):\n    return 3.14159 * radius**2\n"


def test_code_of_a_tree_is_labelled_and_what_nobody_wrote_is_counted(tmp_path: Path) -> None:
    files = {
        "app/main.py": GOOD,
        "app/win.c": "int main(void) {\r\n  return 0;\r\n}\r\n",
        "Makefile": "all:\n\techo hi\n",
        "notes.csv": "a,b",
        "node_modules/x/index.js": "x()",
        "app/vendor/lib.go": "package lib",
        "app/schema_pb2.py": "DESCRIPTOR = None",
        "web/jquery.min.js": "!function(){}",
        "package-lock.json": "{}",
        "app/gen.go": "// Code generated by protoc-gen-go. DO NOT EDIT.\npackage x\n",
        "app/table.c": "int t[] = {" + "0x12, " * 4000 + "};\n",
        "app/long.js": "var a = 1;" * 2000,
        "app/blob.rb": "DATA = <<X\n" + "\n".join(["A" * 90 + "b/+"] * 3) + "\nX\n",
        "app/wrapped.py": "KEY = '''\n" + "Q" * 3000 + "'''\n" + "x = 1\n" * 60,
        "app/bin.py": "x\x00y",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, newline="")
    (tmp_path / "app/latin.py").write_bytes("# é\n".encode("latin-1"))
    found, rejected = read(tmp_path, "code")
    told = {each.where.removeprefix(f"{tmp_path}/"): (each.label, each.parts[0]) for each in found}
    assert told == {
        "Makefile": ("makefile", "all:\n\techo hi\n"),
        "app/blob.rb": ("ruby", files["app/blob.rb"]),
        "app/main.py": ("python", GOOD),
        "app/win.c": ("c", "int main(void) {\n  return 0;\n}\n"),
    }
    assert {each.where.removeprefix(f"{tmp_path}/"): each.reason for each in rejected} == {
        "app/bin.py": "binary",
        "app/gen.go": "generated",
        "app/latin.py": "not UTF-8",
        "app/long.js": "lines too long on average",
        "app/schema_pb2.py": "generated",
        "app/table.c": "lines too long on average",
        "app/vendor/lib.go": "vendored",
        "app/wrapped.py": "data",
        "node_modules/x/index.js": "vendored",
        "web/jquery.min.js": "minified",
    }


def test_the_users_own_path_may_lie_in_a_directory_called_vendor(tmp_path: Path) -> None:
    (tmp_path / "vendor").mkdir()
    (tmp_path / "vendor/a.py").write_text(GOOD)
    assert len(read(tmp_path / "vendor", "code")[0]) == 1
    assert len(read(tmp_path / "vendor/a.py", "code")[0]) == 1


def test_a_repository_is_one_document_readme_first(tmp_path: Path) -> None:
    for name, text in {
        "one/src/b.py": "b = 2\n",
        "one/a.py": "a = 1\n",
        "one/README.md": "# One\n",
        "one/docs/README.md": "# Docs\n",
        "one/node_modules/z.js": "z()\n",
        "two/main.rs": "fn main() {}\n",
        "loose.py": "not in a repository\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found, rejected = read(tmp_path, "code", repository=True)
    assert [(each.key, each.label) for each in found] == [("one", "markdown"), ("two", "rust")]
    assert found[0].parts[0] == (
        "# File: one/README.md\n# One\n\n# File: one/a.py\na = 1\n\n"
        "# File: one/docs/README.md\n# Docs\n\n# File: one/src/b.py\nb = 2\n"
    )
    assert [each.reason for each in rejected] == ["vendored"]
    with pytest.raises(SpecError, match="holds no directories with code"):
        read(tmp_path / "one/src", "code", repository=True)


def test_suffixes_choose_other_files(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(GOOD)
    (tmp_path / "b.xyz").write_text("own language\n")
    assert [each.parts[0] for each in read(tmp_path, "code", suffixes=(".xyz",))[0]] == ["own language\n"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x.PY", "python"),
        ("a/b/Dockerfile", "dockerfile"),
        ("x.tsx", "typescript"),
        ("x.py.gz", "python"),
        ("x.unknown", ""),
        ("x", ""),
    ],
)
def test_languages_by_name(name: str, expected: str) -> None:
    assert language(name) == expected


def test_the_standard_library_is_nearly_all_code_that_somebody_wrote() -> None:
    """False positives, on real code: what is left out is generated or data indeed."""
    from shards.readers import stdlib

    texts = [(key, path.read_text(encoding="utf-8", errors="replace")) for key, path in stdlib.files()]
    out = {key: of_path(key) or of_text(text) for key, text in texts if of_path(key) or of_text(text)}
    assert len(out) < 0.02 * len(texts), out


def test_warc_and_wet_give_what_datatroves_reader_gives(tmp_path: Path) -> None:
    """Its reader gives a page's HTML, whatever the status; its extractor then finds the text, with the settings that we have."""
    from datatrove.pipeline.extractors import Trafilatura
    from datatrove.pipeline.readers import WarcReader

    ours = [page for page in PAGES if page[1] == "200 OK" and page[2] and "latin" not in page[0]]
    (tmp_path / "a.warc.gz").write_bytes(warc(ours))
    (tmp_path / "b.warc.wet.gz").write_bytes(wet({"https://a.example/1": "Zürich\n日本\n".encode(), "https://a.example/2": b"two"}))
    extractor = Trafilatura(deduplicate=False)
    html = WarcReader(str(tmp_path), glob_pattern="a.warc.gz", file_progress=False)()
    theirs = [(each.metadata["url"], text) for each in html if (text := extractor.extract(each.text))]
    assert [(each.key, each.parts[0]) for each in read(tmp_path / "a.warc.gz", "warc")[0]] == theirs
    plain = WarcReader(str(tmp_path), glob_pattern="b.warc.wet.gz", file_progress=False)()
    theirs = [(each.metadata["url"], each.text) for each in plain]
    assert [(each.key, each.parts[0]) for each in read(tmp_path / "b.warc.wet.gz", "wet")[0]] == theirs
