"""What a backend is: how agents are started on nodes."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import msgspec

from midwatch.journal import entries as j
from midwatch.transport.ssh import SILENT
from shards.common.decoding import Count, DecodeError, json_as

FIRST_SECONDS = 60.0
"""That the fewest nodes are waited for when a run starts, where starting an agent is a matter of seconds."""


class StartError(Exception):
    """An agent could not be started; the message says where, why and what to do."""

    def __init__(self, message: str, *, out_of_reach: bool = False) -> None:
        """`out_of_reach`: the node may simply not be up yet, so that waiting for it makes sense."""
        super().__init__(message)
        self.out_of_reach = out_of_reach


class Started(NamedTuple):
    """An agent that was started, or found: its process number on its node, and its birth (midwatch.processes)."""

    pid: int
    birth: str
    found: bool = False
    """It was there already, as far as that can be told."""


class Backend(Protocol):
    """Starts agents and knows whether they live."""

    patience: float
    """Seconds that the fewest nodes are waited for when a run starts; infinite where nodes come in their own time."""
    lacking: str
    """What an operator is told where nodes are lacking and none has said why."""

    @property
    def nodes(self) -> tuple[str, ...]:
        """All nodes that may be used, in the order in which they are preferred."""

    async def start(self, node: str) -> Started:
        """Starts the node's agent. Raises StartError."""

    def alive(self, agent: j.AgentStarted) -> bool | None:
        """Whether its process lives; None where that cannot be told from here."""


class _AgentOutput(msgspec.Struct):
    pid: Count
    birth: str


def started(node: str, status: int, stdout: str, stderr: str) -> Started:
    """The agent that `launcher.agent --detach` or `--step` has named on its output. Raises StartError where that is no agent."""
    for line in reversed(stdout.splitlines()):  # login scripts may have said something before
        try:
            said = json_as(line, _AgentOutput)
        except DecodeError:
            continue
        return Started(said.pid, said.birth)
    words = [line.strip() for line in stderr.splitlines() if line.strip()]
    raise StartError(f"{node}: the agent does not start (status {status}): {words[-1] if words else SILENT}")
