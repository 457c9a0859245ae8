"""An HTTP answer that has to come to its end by a certain time and within a certain size, whatever the server sends.

`http.client` bounds one read by the socket's timeout, so a server that sends a byte now and then, or `100 Continue` again and
again, holds it for ever; and it takes a header or a body of any length in.
"""

from __future__ import annotations

import http.client
import io
import socket
import time
from typing import Any


class AnswerTooLargeError(Exception):
    """The answer is larger than it may be."""


class _Bounded(io.RawIOBase):
    """What a socket gives. Each read waits no longer than is left in all."""

    def __init__(self, line: socket.socket, file: io.BufferedIOBase, until: float, most: int) -> None:
        """file: of the same socket; while it is open, so is the socket, though the connection is closed meanwhile."""
        self._line, self._file, self._until, self._left = line, file, until, most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        seconds = self._until - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        self._line.settimeout(seconds)
        count = self._line.recv_into(buffer)
        self._left -= count
        if self._left < 0:
            raise AnswerTooLargeError
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def bound_answer(connection: http.client.HTTPConnection, until: float, most: int) -> None:
    """Of the answer that a connection reads next, head and body: TimeoutError after `until` (of time.monotonic), OversizeError
    beyond so many bytes."""

    class Answer(http.client.HTTPResponse):
        def __init__(self, line: socket.socket, *args: Any, **kwargs: Any) -> None:
            super().__init__(line, *args, **kwargs)
            self.fp = io.BufferedReader(_Bounded(line, self.fp, until, most))

    connection.response_class = Answer


def read_answer(answer: http.client.HTTPResponse) -> bytes:
    """The whole body, read in parts: `read` would make room for whatever length the head names."""
    parts: list[bytes] = []
    while part := answer.read1(1 << 16):
        parts.append(part)
    if answer.length:
        raise http.client.IncompleteRead(b"".join(parts), answer.length)
    return b"".join(parts)
