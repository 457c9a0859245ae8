"""Sources at URLs: listed, streamed, taken up again where a connection was lost, and told from others by their tags."""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shards.common.errors import SpecError
from shards.readers import remote
from shards.readers.base import DAMAGED
from shards.readers.sources import ReadPosition, Rejected, describe, fingerprint, read_unit, units
from shards.spec import Source
from shards.tokenization.records import Document


def source(path: str, origin: str = "jsonl", **more: Any) -> Source:
    return Source(**{"name": "own", "kind": "text", "origin": origin, "path": path, **more})


def read(given: Source, reading: ReadPosition | None = None) -> tuple[list[str], list[Rejected]]:
    records = [record for unit in units(given) for record in read_unit(given, unit, reading)]
    texts = [each.parts[0] for each in records if isinstance(each, Document)]
    return texts, [each for each in records if isinstance(each, Rejected)]


def lines(count: int, start: int = 0) -> bytes:
    return b"".join(
        json.dumps({"text": f"Line {n} of {n * 7919 % 1009}." * 9}).encode() + b"\n" for n in range(start, start + count)
    )


def texts(count: int, start: int = 0) -> list[str]:
    return [f"Line {n} of {n * 7919 % 1009}." * 9 for n in range(start, start + count)]


class Server(ThreadingHTTPServer):
    """A web server of the test's files, which can lose connections, refuse ranges, and count what it is asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}
        self.losses = 0  # bodies of which only a part is still to be sent
        self.ranges = True
        self.gets = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.server.gets += 1
        self.answer(with_body=True)

    def answer(self, *, with_body: bool) -> None:
        name = self.path.partition("?")[0]
        if name.endswith("/"):
            links = "".join(f'<a href="{file.rpartition("/")[2]}">x</a>' for file in self.server.files if file.startswith(name))
            self.send(200, links.encode(), {"Content-Type": "text/html"}, with_body)
        elif name not in self.server.files:
            self.send(404, b"", {}, with_body)
        else:
            body = self.server.files[name]
            headers = {"ETag": self.server.tags.get(name, '"1"'), "Accept-Ranges": "bytes" if self.server.ranges else "none"}
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if asked and self.server.ranges:
                start, stop = int(asked[1]), min(int(asked[2] or len(body)) + 1, len(body))
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(body)}"
                self.send(206, body[start:stop], headers, with_body)
            else:
                self.send(200, body, headers, with_body)

    def send(self, status: int, body: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if not with_body:
            return
        if self.server.losses and len(body) > 1000:
            self.server.losses -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            self.connection.close()
        else:
            self.wfile.write(body)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    fsspec.filesystem("http").clear_instance_cache()
    made = Server()
    thread = threading.Thread(target=made.serve_forever, name="test-web")
    thread.start()
    yield made
    made.shutdown()
    made.server_close()
    thread.join()


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def test_files_of_a_web_server_are_read_by_address_and_by_directory(server: Server) -> None:
    server.files = {"/d/b.jsonl": lines(50, 100), "/d/a.jsonl.gz": gzip.compress(lines(100)), "/d/no.csv": b"x"}
    reading = ReadPosition()
    assert read(source(f"{server.url}/d/a.jsonl.gz"), reading) == (texts(100), [])
    assert reading.done == len(server.files["/d/a.jsonl.gz"])
    assert read(source(f"{server.url}/d/")) == (texts(150), [])
    assert read(source(f"{server.url}/d/*.jsonl")) == (texts(50, 100), [])
    assert read(source(f"{server.url}/d/b.jsonl?version=2")) == (texts(50, 100), [])
    assert [unit.size for unit in units(source(f"{server.url}/d/"))] == [
        len(server.files[f"/d/{n}"]) for n in ("a.jsonl.gz", "b.jsonl")
    ]
    assert "2 files" in describe(source(f"{server.url}/d/"))


@pytest.mark.parametrize("ranges", [True, False])
def test_a_lost_connection_is_taken_up_where_it_was_lost(server: Server, ranges: bool) -> None:
    server.files = {"/a.jsonl": lines(3000)}
    server.ranges = ranges
    given = source(f"{server.url}/a.jsonl")
    (unit,) = units(given)
    server.losses = 2
    records = [record for record in read_unit(given, unit) if not isinstance(record, Rejected)]
    assert [record.parts[0] for record in records] == texts(3000) and server.losses == 0


def test_a_connection_that_is_lost_again_and_again_is_a_broken_file(server: Server) -> None:
    server.files = {"/a.jsonl": lines(3000)}
    given = source(f"{server.url}/a.jsonl")
    (unit,) = units(given)
    server.losses = 1000
    (only,) = read_unit(given, unit)
    assert isinstance(only, Rejected) and only.rest and only.reason == DAMAGED and "4 times" in only.record
    assert 1000 - server.losses <= 2 * remote.TRIES


def test_a_changed_file_is_known_by_its_tag(server: Server) -> None:
    server.files = {"/a.jsonl": lines(3)}
    before = fingerprint(source(f"{server.url}/a.jsonl"))
    assert fingerprint(source(f"{server.url}/a.jsonl")) == before
    server.tags["/a.jsonl"] = '"2"'
    assert fingerprint(source(f"{server.url}/a.jsonl")) != before


def test_parquet_is_read_by_ranges(server: Server, tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": texts(5000)}), tmp_path / "a.parquet", row_group_size=1000)
    server.files = {"/a.parquet": (tmp_path / "a.parquet").read_bytes()}
    server.losses = 1
    assert read(source(f"{server.url}/a.parquet", "parquet")) == (texts(5000), [])


def test_a_store_is_listed_globbed_and_read(memory: Any) -> None:
    memory.pipe(
        {"/bucket/in/a.jsonl": lines(5), "/bucket/in/deep/b.jsonl.gz": gzip.compress(lines(5, 5)), "/bucket/in/c.txt": b"c"}
    )
    assert read(source("memory://bucket/in")) == (texts(10), [])
    assert read(source("memory://bucket/in/**/*.jsonl*")) == (texts(10), [])
    assert read(source("memory://bucket/in/c.txt", "text")) == (["c"], [])
    (first, second) = units(source("memory://bucket/in"))
    assert first.name == "memory:///bucket/in/a.jsonl" and second.size == len(gzip.compress(lines(5, 5)))
    before = fingerprint(source("memory://bucket/in"))
    memory.pipe("/bucket/in/a.jsonl", lines(5))
    assert fingerprint(source("memory://bucket/in")) != before


def test_repositories_in_a_store_are_told_by_their_directories(memory: Any) -> None:
    memory.pipe({"/code/one/a.py": b"a = 1\n", "/code/one/README.md": b"# One\n", "/code/two/b.py": b"b = 2\n"})
    given = source("memory://code", "code", repository=True)
    assert read(given)[0] == ["# File: one/README.md\n# One\n\n# File: one/a.py\na = 1\n", "# File: two/b.py\nb = 2\n"]


def test_a_file_url_is_read_like_any_other(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines(3))
    assert read(source(f"file://{tmp_path}")) == (texts(3), [])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nope://x/y", "Protocol not known: nope"),
        ("s3://bucket/x", "s3fs.*pip install"),
        ("memory://nothing/here.jsonl", "not found"),
        ("http://127.0.0.1:9/a.jsonl", "can be reached"),
    ],
)
def test_what_cannot_be_reached_is_said_before_a_build_begins(path: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE", 0.01)
    with pytest.raises(SpecError, match=message):
        fingerprint(source(path))


def test_a_page_that_is_not_there_and_a_directory_without_files_are_said(server: Server, memory: Any) -> None:
    with pytest.raises(SpecError, match="not found"):
        units(source(f"{server.url}/missing.jsonl"))
    memory.pipe("/d/a.csv", b"x")
    with pytest.raises(SpecError, match=r"no files ending in \.jsonl"):
        units(source("memory://d"))


def repeated(first: bytes, again: bytes, pause: float) -> Callable[[socket.socket], None]:
    def say(line: socket.socket) -> None:
        line.sendall(first)
        while True:
            line.sendall(again)
            time.sleep(pause)

    return say


@pytest.mark.parametrize(
    "say",
    [
        repeated(b"HTTP/1.1 200 OK\r\na", b"a", 0.02),
        repeated(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001),
        repeated(b"HTTP/1.1 200 OK\r\n\r\n", b"<a href=x>" * 1000, 0.0),
    ],
    ids=["drips headers", "continues", "lists without end"],
)
def test_a_server_that_goes_on_for_ever_is_given_up(monkeypatch: pytest.MonkeyPatch, say: Callable[[socket.socket], None]) -> None:
    for name, value in {"REQUEST": 1.0, "LARGEST": 1 << 20}.items():
        monkeypatch.setattr(remote, name, value)
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    line, _ = listening.accept()
                    with line, contextlib.suppress(OSError):
                        say(line)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        began = time.monotonic()
        with pytest.raises(SpecError, match="see that it can be reached and read"):
            units(source(f"http://127.0.0.1:{listening.getsockname()[1]}/d/"))
        assert time.monotonic() - began < 15
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(5)
