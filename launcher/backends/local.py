"""The local backend: the agent of this machine."""

from __future__ import annotations

import os
import subprocess
import sys

from launcher.agent.place import holder_of
from launcher.backends.base import FIRST_SECONDS, Started, StartError
from midwatch.journal import entries as j
from midwatch.processes import birth_of, lives
from midwatch.recipe import Cluster
from midwatch.run_directory import RunPaths, host_name


class LocalBackend:
    """Starts the agent in a session of its own, and tells by process number and birth whether it lives."""

    patience, lacking = FIRST_SECONDS, ""

    def __init__(self, paths: RunPaths, cluster: Cluster) -> None:
        self._paths, self._python = paths, cluster.python or sys.executable

    @property
    def nodes(self) -> tuple[str, ...]:
        return (host_name(),)

    async def start(self, node: str) -> Started:
        directory = self._paths.logs / node
        try:
            there = holder_of(self._paths, node)
            if there is not None:
                return Started(there.pid, there.birth, found=True)
            directory.mkdir(exist_ok=True)
            with (directory / "agent.log").open("ab") as out:
                process = subprocess.Popen(
                    [self._python, "-P", "-m", "launcher.agent", str(self._paths.root.resolve()), "--node", node],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=out,
                    start_new_session=True,
                    cwd="/",
                    env={**os.environ, "PYTHONUNBUFFERED": "1"},
                )
            _children.append(process)
            return Started(process.pid, birth_of(process.pid))
        except OSError as error:
            raise StartError(f"the agent of {node} cannot be started: {error}") from None

    def alive(self, agent: j.AgentStarted) -> bool | None:
        for child in _children:
            child.poll()
        return lives(agent.pid, agent.birth)


_children: list[subprocess.Popen[bytes]] = []
"""Agents started by this controller; asked now and then, so that none is left a zombie."""
