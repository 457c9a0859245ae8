"""Agents that a scheduler's own command keeps on a node: it starts the agent, stays with it, and ends when it ends.

Schedulers end what such a command has left behind, so the agent stays in the foreground of it, and the command lives in a session
of its own, with nothing that ties it to the controller, whose death ends neither. A controller that takes over starts a second
command, in which the agent finds the first and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import subprocess
import threading
import time
from collections.abc import Sequence
from typing import NamedTuple

from launcher.backends.base import Started, StartError, started
from midwatch.journal import entries as j
from midwatch.recipe import Cluster
from midwatch.run_directory import RunPaths
from midwatch.signals import SHELL_TRAP
from midwatch.transport.ssh import remote_command
from midwatch.transport.tls_identity import RunKeys

START_SECONDS = 900.0
"""That an agent has to begin: a container's image may have to be fetched first."""
MOST_SAID = 64 * 1024
"""Bytes that are read of what precedes an agent's word."""


class Keeper(NamedTuple):
    """An agent, and the command that keeps it."""

    agent: Started
    command: subprocess.Popen[bytes]


class KeptAgents:
    """Starts agents by a scheduler's command and knows whether those live that it has started."""

    def __init__(self, paths: RunPaths, cluster: Cluster) -> None:
        self._paths, self._cluster = paths, cluster
        self._keepers: dict[str, Keeper] = {}

    async def start(self, node: str, prefix: Sequence[str], environment: dict[str, str]) -> Started:
        """prefix: the scheduler's words, which what runs on the node follows. Raises StartError."""
        identity = RunKeys.ensure(self._paths).issue("agent", node)
        words = ["-P", "-m", "launcher.agent", str(self._paths.root.resolve()), "--node", node, "--step"]
        command = [*prefix, "/bin/sh", "-c", f"{SHELL_TRAP}\n{remote_command(self._cluster, words)}"]
        unwanted = threading.Event()
        try:
            return await asyncio.to_thread(self._start, node, command, environment, identity.encode() + b"\n", unwanted)
        finally:
            unwanted.set()  # where this was cancelled the thread must not go on

    def alive(self, agent: j.AgentStarted) -> bool | None:
        known = self._keepers.get(agent.node)
        if known is None or known.agent[:2] != (agent.pid, agent.birth):
            return None
        return known.command.poll() is None

    def _start(self, node: str, words: list[str], environment: dict[str, str], stdin: bytes, unwanted: threading.Event) -> Started:
        log = self._paths.logs / node / f"{words[0]}.log"
        try:
            log.parent.mkdir(exist_ok=True)
            with log.open("ab") as errors:
                before = errors.tell()
                command = subprocess.Popen(
                    words,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,
                    cwd="/",
                    env=environment,
                )
        except OSError as error:
            raise StartError(f"{node}: {words[0]} cannot be started: {error.strerror or error}") from None
        try:
            said = _first_words(command, stdin, unwanted)
            agent = started(node, command.poll() or 0, said, log.read_bytes()[before:].decode(errors="replace"))
        except BaseException:
            command.kill()
            command.wait()
            raise
        # One that has named another's agent ends at once and tells nothing of that agent's end.
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.wait(0.5)
        if command.returncode is None:
            self._keepers[node] = Keeper(agent, command)
        return agent


def _first_words(command: subprocess.Popen[bytes], stdin: bytes, unwanted: threading.Event) -> str:
    """What the agent says until it has named itself, or until it has ended or time is up."""
    assert command.stdin is not None and command.stdout is not None
    with contextlib.suppress(OSError):
        command.stdin.write(stdin)
        command.stdin.close()
    said = bytearray()
    deadline = time.monotonic() + START_SECONDS
    with command.stdout:
        while time.monotonic() < deadline and len(said) < MOST_SAID and not unwanted.is_set():
            if not select.select([command.stdout], [], [], 0.2)[0]:
                continue
            chunk = os.read(command.stdout.fileno(), 4096)
            said += chunk
            if not chunk:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    command.wait(5)
                break
            if b'"birth"' in said and said.endswith(b"\n"):
                break
    return said.decode(errors="replace")
