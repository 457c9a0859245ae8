"""The agent's end of the process that forks ranks: forked ones are handled as torch's elastic agent handles started ones."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

log = logging.getLogger("launcher.agent")

READY_SECONDS = 300.0
"""To import everything, on a slow file system."""
ANSWER_SECONDS = 5.0
"""To fork, once that is done; one that takes longer is stuck."""
MOST_BYTES = 1 << 20
UNTOLD_SECONDS = 0.5
"""After which a rank that is dead counts as ended though the fork server, which may stand still itself, has not said how."""
FORKS = hasattr(os, "pidfd_open") and hasattr(socket, "SOCK_SEQPACKET")


class ForkServerError(Exception):
    """It is gone, does not answer, or has never run; ranks are to be started in the ordinary way."""


class StaleError(ForkServerError):
    """The code on disk has changed since it was read."""


class ForkedProcess:
    """A rank that was forked; speaks as subprocess.Popen does."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._ended = threading.Event()
        self._dead_since: float | None = None

    def poll(self) -> int | None:
        """Its exit status, minus the signal where one ended it; None while it runs."""
        if self.returncode is None and (status := _status_of_the_dead(self.pid)) is not None:
            now = time.monotonic()
            self._dead_since = self._dead_since or now
            if now - self._dead_since > UNTOLD_SECONDS:
                self.has_ended(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        end = time.monotonic() + timeout if timeout is not None else None
        while not self._ended.wait(0.1 if end is None else max(0.0, min(0.1, end - time.monotonic()))):
            if self.poll() is None and end is not None and time.monotonic() >= end:
                raise subprocess.TimeoutExpired(f"rank, process {self.pid}", timeout or 0.0)
        return self.returncode or 0

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def has_ended(self, status: int) -> None:
        if not self._ended.is_set():
            self.returncode = status
            self._ended.set()


def _status_of_the_dead(pid: int) -> int | None:
    """How a process ended that nobody has asked about yet, or that is gone altogether; None while it lives."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return -signal.SIGKILL
    return os.waitstatus_to_exitcode(int(fields[-1])) if fields[0] in "ZX" else None


class ForkServer:
    """One process of `trainer` that has imported everything and waits; started at once, for it takes seconds."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        """`arguments` are those of a rank, `environment` what ranks have from their first line on. Raises OSError."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        handle = theirs.fileno()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "trainer", *arguments],
                # Asked through NVML, whether there is a GPU does not initialise CUDA, which would not survive a fork.
                env={**environment, "MIDWATCH_FORKSERVER": str(handle), "PYTORCH_NVML_BASED_CUDA_CHECK": "1"},
                stdin=subprocess.DEVNULL,
                pass_fds=(handle,),
                start_new_session=True,
            )
        self._lock = threading.Condition()
        self._answers: list[dict[str, int]] = []
        self._children: dict[int, ForkedProcess] = {}
        self._early: dict[int, int] = {}
        """How children ended that nobody has asked for yet."""
        self._ready = self._gone = False
        threading.Thread(target=self._listen, name="fork-server", daemon=True).start()

    @property
    def alive(self) -> bool:
        return not self._gone

    def fork(self, arguments: Sequence[str], environment: Mapping[str, str]) -> ForkedProcess:
        """A rank with these, as soon as the imports are done. Raises ForkServerError."""
        order = json.dumps({"arguments": list(arguments), "environment": dict(environment)}).encode()
        with self._lock:
            if not self._lock.wait_for(lambda: self._ready or self._gone, READY_SECONDS):
                raise ForkServerError(f"not ready in {READY_SECONDS:.0f} s")
            try:
                self._socket.send(order)
            except OSError as error:
                raise ForkServerError(str(error)) from error
            if not self._lock.wait_for(lambda: self._answers or self._gone, ANSWER_SECONDS):
                raise ForkServerError(f"no answer in {ANSWER_SECONDS:.0f} s")
            if not self._answers:
                raise ForkServerError("it has ended")
            answer = self._answers.pop()
            if "stale" in answer:
                raise StaleError("the code has changed")
            child = ForkedProcess(answer["pid"])
            if child.pid in self._early:
                child.has_ended(self._early.pop(child.pid))
            else:
                self._children[child.pid] = child
            return child

    def close(self) -> None:
        """Ends it, and its children with it."""
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        while True:
            try:
                packet = self._socket.recv(MOST_BYTES)
            except OSError:
                packet = b""
            with self._lock:
                if not packet:
                    self._gone = True
                    for child in self._children.values():
                        child.has_ended(-signal.SIGKILL)  # as the kernel does when the process dies that forked it
                    self._lock.notify_all()
                    return
                said = json.loads(packet)
                if "ready" in said:
                    self._ready = True
                    self._lock.notify_all()
                elif "ended" not in said:
                    self._answers.append(said)
                    self._lock.notify_all()
                elif said["ended"] in self._children:
                    self._children.pop(said["ended"]).has_ended(said["status"])
                else:
                    self._early[said["ended"]] = said["status"]


class ForkServers:
    """The fork server of a node's ranks, replaced when it dies or has old code."""

    def __init__(self, run_directory: Path, environment: Mapping[str, str]) -> None:
        self._arguments, self._environment = [str(run_directory)], dict(environment)
        self._lock = threading.Lock()
        self._closed = False
        self._server: ForkServer | None = None

    def prepare(self) -> None:
        """Has one ready soon."""
        with self._lock:
            self._living()

    def fork(self, arguments: Sequence[str], environment: Mapping[str, str]) -> ForkedProcess:
        """A rank with these arguments, and these variables beside those of the server. Raises ForkServerError."""
        whole = {**self._environment, **environment}
        with self._lock:
            try:
                return self._living().fork(arguments, whole)
            except StaleError:
                log.info("the trainer's code has changed: reloading it")
                self._server = None  # it stays until its last child has ended
                return self._living().fork(arguments, whole)
            except ForkServerError as error:
                log.warning("starting another process to fork the ranks: %s", error)
                self._abandon()
                return self._living().fork(arguments, whole)

    def close(self) -> None:
        """Ends it at once, also while somebody waits for it."""
        self._closed = True
        if (server := self._server) is not None:
            server.close()

    def _abandon(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    def _living(self) -> ForkServer:
        if self._closed:
            raise ForkServerError("the agent leaves")
        if not FORKS:
            raise ForkServerError("this system cannot fork ranks")
        if self._server is None or not self._server.alive:
            try:
                self._server = ForkServer(self._arguments, self._environment)
            except OSError as error:
                raise ForkServerError(str(error)) from error
        return self._server
