"""Where ranks are: their Python stacks and the flight recorder's record of their collectives, through torch's worker server.

Each rank serves a unix socket that answers while the rank waits in a collective. One that does not answer is stopped, or its
process is stuck in the kernel; what the kernel says of it is written down instead.
"""

from __future__ import annotations

import http.client
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ANSWER_SECONDS = 5.0
MOST_BYTES = 4 << 20


class Taken(NamedTuple):
    file: Path
    stuck: tuple[int, ...]
    """Ranks that gave no answer."""


def socket_of(base: Path, rank: int) -> Path:
    """The socket of a rank's worker server: a short name, for a socket's path may not be long."""
    return base.with_name(f"{base.stem}.w{rank}")


def take(base: Path, pids: Mapping[int, int], directory: Path, generation: int) -> Taken:
    """Asks all ranks at once and writes what they say into a file of the directory. Raises OSError where that cannot be written."""
    with ThreadPoolExecutor(max(1, len(pids))) as pool:
        told = dict(zip(pids, pool.map(lambda rank: _of_rank(socket_of(base, rank), pids[rank]), pids), strict=True))
    file = directory / f"hang-{generation}-{time.strftime('%Y%m%d-%H%M%S')}.txt"
    parts = [f"=== rank {rank}, process {pids[rank]} ===\n{text}\n" for rank, (_, text) in sorted(told.items())]
    file.write_text("\n".join(parts))
    return Taken(file, tuple(rank for rank, (answers, _) in sorted(told.items()) if not answers))


def _of_rank(server: Path, pid: int) -> tuple[bool, str]:
    state = _state(pid)
    try:
        stack = _ask(server, "dump_traceback")
    except (OSError, http.client.HTTPException) as error:
        return False, f"{state}\nit does not answer: {error or type(error).__name__}"
    try:
        record = _ask(server, "fr_trace_json")
    except (OSError, http.client.HTTPException) as error:
        record = f"none: {error}"
    return True, f"{state}\n\n{stack}\n--- collectives (flight recorder)\n{record}"


def _state(pid: int) -> str:
    """What the kernel says: running, sleeping, stopped, and where."""
    lines = []
    try:
        status = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
        lines.append(f"state {status.get('State', '?')}, {status.get('VmRSS', '?').strip()} resident")
        where = Path(f"/proc/{pid}/wchan").read_text().strip()
        lines.append(f"in the kernel at {where}" if where not in ("", "0") else "not in the kernel")
    except OSError:
        lines.append("the process is gone")
    return "; ".join(lines)


class _Unix(http.client.HTTPConnection):
    def __init__(self, server: Path) -> None:
        super().__init__("rank", timeout=ANSWER_SECONDS)
        self._server = server

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(ANSWER_SECONDS)
        self.sock.connect(str(self._server))


def _ask(server: Path, handler: str) -> str:
    connection = _Unix(server)
    try:
        connection.request("POST", f"/handler/{handler}", headers={"Content-Length": "0"})
        answer = connection.getresponse()
        text = answer.read(MOST_BYTES).decode(errors="replace")
        if answer.status != 200:
            raise http.client.HTTPException(f"{handler}: {answer.status} {text[:200]}")
        return text
    finally:
        connection.close()
