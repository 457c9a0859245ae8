"""Files on object stores and web servers, through fsspec: listed, opened as streams, and gone on with after a lost connection."""

from __future__ import annotations

import functools
import io
import re
import time
from collections.abc import Callable
from typing import Any

from shards.common.errors import SpecError
from shards.common.optional import need
from shards.readers.base import SPECIAL
from shards.readers.hidden import is_hidden, is_hidden_match

TRIES = 4  # of one read, and of a listing
PAUSE = 0.2  # seconds before the second try; doubled before each further one
REQUEST, CONNECT, SILENCE = 300.0, 30.0, 60.0  # seconds of one request to a web server, of its connecting, and between bytes
LARGEST = 1 << 26  # bytes of an answer that is held in memory
STAMPS = ("ETag", "etag", "LastModified", "last_modified", "mtime", "updated", "created", "Last-Modified", "Content-MD5")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")


class RemoteFileTooLargeError(Exception):
    """Not an OSError, which fsspec takes for an empty directory."""


def is_remote(path: str) -> bool:
    """Whether a path is a URL."""
    return _SCHEME.match(path) is not None


def filesystem(path: str, where: str) -> tuple[Any, str]:
    """fsspec's file system and the path within it. Raises SpecError."""
    core = need("fsspec.core", f"{where}: {path}")
    options: dict[str, Any] = {}
    if path.startswith(("http://", "https://")):
        # Of a whole request, so that a server that drips is given up too; a file is gone on with from where it broke off.
        aiohttp = need("aiohttp", f"{where}: {path}")
        timeout = aiohttp.ClientTimeout(total=REQUEST, sock_connect=CONNECT, sock_read=SILENCE)
        options["client_kwargs"] = {"timeout": timeout, "response_class": _bounded_response(aiohttp)}
    try:
        fs, inner = core.url_to_fs(path, **options)
    except ImportError as error:
        raise SpecError(f"{where}: {path}: {error} (pip install it)") from None
    except ValueError as error:
        raise SpecError(f"{where}: {path}: {error} (use a path, or a URL such as s3://, gs://, hf:// or https://)") from None
    return fs, inner


@functools.cache
def _bounded_response(aiohttp: Any) -> type[Any]:
    """A response that is read whole, a page that lists files or a block of one, only up to LARGEST."""

    class Response(aiohttp.ClientResponse):  # type: ignore[misc]
        _body: Any

        async def read(self) -> bytes:
            if self._body is None:
                body = bytearray()
                async for part in self.content.iter_chunked(1 << 16):
                    body += part
                    if len(body) > LARGEST:
                        self.close()
                        raise RemoteFileTooLargeError(f"an answer does not end within {LARGEST >> 20} MiB")
                self._body = bytes(body)
            return bytes(await super().read())

    return Response


def find(path: str, where: str, wanted: Callable[[str], bool], endings: str, dotted: bool = True) -> list[tuple[str, int, str]]:
    """(URL, bytes, stamp) of each file, sorted. SpecError if there are none, or nobody answers."""
    fs, inner = filesystem(path, where)
    try:
        found: list[tuple[str, int, str]] = again(lambda: _find(fs, inner, path, where, wanted, endings, dotted))
        return found
    except SpecError:
        raise
    except Exception as error:  # of libraries that are known only by the URL
        if _is_missing(error):
            raise SpecError(f"{where}: {path}: not found (correct the URL)") from None
        raise SpecError(f"{where}: {path}: {_said(error)} (see that it can be reached and read)") from None


def _find(
    fs: Any, inner: str, path: str, where: str, wanted: Callable[[str], bool], endings: str, dotted: bool
) -> list[tuple[str, int, str]]:
    fs.invalidate_cache()
    is_web = path.startswith(("http://", "https://"))
    # To a web server, `?` begins a query, and each address may be a page as well as a directory: the ending tells.
    if "*" in path if is_web else SPECIAL.search(path):
        found = {name: fs.info(name) for name in fs.glob(inner)}
        found = {name: info for name, info in found.items() if is_web or info.get("type") == "file"}
        found = {name: info for name, info in found.items() if not is_hidden_match(name, inner, dotted=dotted)}
        if not found:
            raise SpecError(f"{where}: {path}: nothing matches (correct the URL)")
    elif path.endswith("/") if is_web else fs.isdir(inner):
        top = inner.rstrip("/")
        names = [name for name in fs.find(inner) if wanted(name.rpartition("/")[2])]
        names = [name for name in names if not is_hidden(name.removeprefix(top).split("/"), dotted=dotted)]
        found = {name: fs.info(name) for name in names}
        if not found:
            raise SpecError(f"{where}: {path}: no files ending in {endings} (hidden ones are not read)")
    else:
        found = {inner: fs.info(inner)}
    return sorted((fs.unstrip_protocol(name), int(info.get("size") or 0), _stamp(info)) for name, info in found.items())


def _stamp(info: dict[str, Any]) -> str:
    return next((str(info[key]) for key in STAMPS if info.get(key)), "")


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _is_missing(error: BaseException) -> bool:
    """Whether a file is not there. fsspec says so of a web server too that cannot be reached; then the cause has no status."""
    cause = error.__cause__
    return isinstance(error, FileNotFoundError) and (cause is None or getattr(cause, "status", 0) in (401, 403, 404, 410))


def again(call: Callable[[], Any], sleep: Callable[[float], None] = time.sleep) -> Any:
    """The call's result, tried a few times: what is not found or refused as a question is not tried again."""
    pause, until = PAUSE, time.monotonic() + REQUEST
    for left in range(TRIES - 1, -1, -1):
        try:
            return call()
        except Exception as error:  # of libraries that are known only by the URL
            if not left or time.monotonic() > until or isinstance(error, SpecError | PermissionError) or _is_missing(error):
                raise
            sleep(pause)
            pause *= 2
    raise AssertionError("not reached")


class RemoteFile(io.RawIOBase):
    """A remote file's bytes. Raises OSError where it cannot be read after TRIES, or is shorter than the server said."""

    def __init__(self, url: str, sleep: Callable[[float], None] = time.sleep) -> None:
        self._url, self._sleep = url, sleep
        self._at = 0
        self._file: Any = None
        self._whole = False  # the server gives it only from its beginning
        self._size: int | None = None
        self._fs, self._inner = filesystem(url, "source")
        self._try(self._open)

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return again(call, self._sleep)
        except Exception as error:  # of libraries that are known only by the URL
            if isinstance(error, SpecError | PermissionError) or _is_missing(error):
                raise
            raise OSError(f"{self._url}: {_said(error)}, {TRIES} times") from None

    def _open(self) -> None:
        self._drop()
        if not self._whole:
            self._file = self._fs.open(self._inner, "rb")
            self._size = getattr(self._file, "size", None)
            if self._size is None:
                self._whole = self._at > 0
            elif self._at:
                self._file.seek(self._at)
        if self._whole:
            self._drop()
            self._file = self._fs.open(self._inner, "rb", block_size=0)
            left = self._at
            while left:
                left -= len(self._file.read(min(left, 1 << 20))) or self._ended(self._at - left)

    def _ended(self, at: int) -> int:
        raise EOFError(f"ended after {at} of {self._size or 'unknown'} bytes")

    def _read(self, count: int) -> bytes:
        try:
            if self._file is None:
                self._open()
            data: bytes = self._file.read(count)
            if not data and self._size is not None and self._at < self._size:
                self._ended(self._at)
            return data
        except Exception as error:  # of libraries that are known only by the URL
            self._whole = self._whole or "range" in str(error).lower()
            self._drop()
            raise

    def _drop(self) -> None:
        if self._file is not None:
            file, self._file = self._file, None
            try:
                file.close()
            except Exception:  # a connection that is lost cannot be closed
                return

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._size is not None

    def readinto(self, buffer: Any) -> int:
        data = self._try(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        base = {0: 0, 1: self._at, 2: self._size or 0}[whence]
        if base + offset != self._at:
            self._at = base + offset
            if self._whole or self._file is None:
                self._drop()
            else:
                self._file.seek(self._at)
        return self._at

    def close(self) -> None:
        self._drop()
        super().close()
