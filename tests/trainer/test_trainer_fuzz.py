"""What the trainer reads of checkpoints and of a server: bounded in time and size, and only its own errors come out."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
import xxhash

from midwatch.checkpoint_format import manifest
from tests.fuzzing import COUNT, Subject, holds, scratch
from trainer.generate.request import Request
from trainer.generate.vllm_client import ConnectionPool, Server, ServerError

REPLY = {
    "id": "cmpl-1",
    "choices": [
        {
            "index": 0, "text": "", "finish_reason": "length", "token_ids": [3, 4],
            "logprobs": {"token_logprobs": [-0.5, -1.5], "tokens": ["token_id:3", "token_id:4"]},
            "prompt_token_ids": [1, 2],
        }
    ],
    "object": "list", "data": [{"id": "policy", "max_model_len": 96}],
}  # fmt: skip
"""Of both endpoints that are asked: each passes over what is the other's."""


def reply(body: bytes, status: str = "200 OK") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@contextlib.contextmanager
def answering(say: Callable[[socket.socket], None]) -> Iterator[str]:
    """The URL of a server that reads a request and then does whatever it is made to."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            while True:
                try:
                    line, _ = listening.accept()
                except OSError:
                    return
                with line, contextlib.suppress(OSError):
                    line.recv(1 << 16)
                    say(line)

        thread = threading.Thread(target=serve, name="hostile server", daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            listening.shutdown(socket.SHUT_RDWR)
    thread.join()


def ask(url: str, timeout: float = 5.0) -> None:
    server = Server(url, None, timeout, 96, 100, "/weights")
    server.meet(ConnectionPool())
    server.respond(ConnectionPool(), Request(prompt=(1, 2), limit=2, temperature=1.0, seed=1, stops=frozenset()), 1)


def fuzz_manifest(place: Path) -> Subject:
    content = bytes(4000)
    digest = xxhash.xxh3_128_hexdigest(content)
    (place / "rank-0.bin").write_bytes(content)
    chunk = {"offsets": [0, 0], "sizes": [10, 100], "file": "rank-0.bin", "start": 0, "bytes": 4000, "xxh3": digest}
    said = {
        "format": 3, "id": "a", "generation": 1, "world": 1, "files": {"rank-0.bin": {"bytes": 4000, "xxh3": digest}},
        "tensors": {"w": {"shape": [10, 100], "dtype": "float32", "chunks": [chunk]}}, "state": {"step": 1, "stage": {"name": "x"}},
    }  # fmt: skip

    def load(raw: bytes) -> None:
        (place / manifest.FILE_NAME).write_bytes(raw)
        assert all(str(place) in message for message in manifest.verify(place))
        found, _ = manifest.read(place)
        for entry in found.tensors.values():
            for each in entry.chunks:
                manifest.read_chunk(place, each, memoryview(bytearray(each.bytes)))

    return Subject("manifest", [msgspec.msgpack.encode(said)], load, (manifest.CheckpointError,), "msgpack", names=str(place))


def fuzz_server(place: Path, whole: bool) -> Subject:
    """One answer to every request. whole: its head is mutated too."""

    def load(raw: bytes) -> None:
        with answering(lambda line: line.sendall(raw if whole else reply(raw))) as url:
            ask(url)

    body = json.dumps(REPLY).encode()
    seed = reply(body) if whole else body
    return Subject("server", [seed], load, (ServerError,), "bytes" if whole else "json", names="http://127.0.0.1")


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "manifest": fuzz_manifest,
    "reply": lambda place: fuzz_server(place, whole=False),
    "answer": lambda place: fuzz_server(place, whole=True),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_damaged_or_hostile_input_loads_or_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with scratch(tmp_path) as place:
        holds(SUBJECTS[name](place))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SUBJECTS)
def test_thousands_of_damaged_or_hostile_inputs_load_or_are_refused_by_name(tmp_path: Path, name: str, seed: int) -> None:
    with scratch(tmp_path) as place:
        holds(SUBJECTS[name](place), COUNT, seed)


def repeated(*parts: bytes, pause: float = 0.0) -> Callable[[socket.socket], None]:
    """Sends the first parts, and the last again and again."""

    def say(line: socket.socket) -> None:
        for part in parts[:-1]:
            line.sendall(part)
        while True:
            line.sendall(parts[-1])
            time.sleep(pause)

    return say


OK = b"HTTP/1.1 200 OK\r\n"
SERVERS: dict[str, tuple[Callable[[socket.socket], None], str]] = {
    "says nothing": (lambda line: time.sleep(1), "did not answer within 0.5 s"),
    "drips its first line": (repeated(b"H", pause=0.02), "did not answer within 0.5 s"),
    "drips its headers": (repeated(OK, b"a", pause=0.02), "did not answer within 0.5 s"),
    "says 100 Continue without end": (repeated(b"HTTP/1.1 100 Continue\r\n\r\n", pause=0.001), "did not answer within 0.5 s"),
    "floods 100 Continue": (repeated(b"HTTP/1.1 100 Continue\r\n\r\n" * 500), "did not answer within 0.5 s"),
    "has headers without end": (repeated(OK, b"a: b\r\n"), "cannot be asked"),
    "has one header without end": (repeated(OK + b"a: ", b"b" * 4096), "cannot be asked"),
    "drips its body": (repeated(OK + b"Content-Length: 1000\r\n\r\n", b" ", pause=0.02), "did not answer within 0.5 s"),
    "has a body without end": (repeated(OK + b"\r\n", b" " * 65536), "did not answer within 0.5 s|does not come to an end"),
    "names a length beyond all": (lambda line: line.sendall(OK + b"Content-Length: %d\r\n\r\n{}" % 10**18), "IncompleteRead"),
    "names a chunk beyond all": (
        lambda line: line.sendall(OK + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffff\r\n{}"),
        "IncompleteRead",
    ),
    "sends elsewhere": (lambda line: line.sendall(b"HTTP/1.1 302 Found\r\nLocation: /v1/models\r\n\r\n"), "refuses: 302"),
}


@pytest.mark.parametrize("what", SERVERS)
def test_a_server_that_goes_on_for_ever_is_left_in_time(what: str) -> None:
    say, says = SERVERS[what]
    with answering(say) as url:
        began = time.monotonic()
        with pytest.raises(ServerError, match=says):
            ask(url, timeout=0.5)
        assert time.monotonic() - began < 5


def test_a_body_is_bounded_in_size_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.generate.vllm_client._LARGEST", 1 << 20)
    with (
        answering(repeated(OK + b"\r\n", b" " * 65536)) as url,
        pytest.raises(ServerError, match="does not come to an end"),
    ):
        ask(url)
