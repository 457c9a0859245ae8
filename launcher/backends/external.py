"""The backend of nodes that join by themselves: what runs them (Kubernetes, a cloud, somebody's hands) starts their agents, too."""

from __future__ import annotations

import math

from launcher.backends.base import Started, StartError
from midwatch.journal import entries as j
from midwatch.recipe import Cluster
from midwatch.run_directory import RunPaths


class JoiningBackend:
    """Names no node and starts no agent: the pool knows those that have come."""

    def __init__(self, paths: RunPaths, cluster: Cluster) -> None:
        pass

    patience, lacking = math.inf, "they join by: midwatch agent --join URL --key-file FILE"

    @property
    def nodes(self) -> tuple[str, ...]:
        return ()

    async def start(self, node: str) -> Started:
        raise StartError(f"{node} has gone; it joins again when its agent is started there (midwatch agent --join)")

    def alive(self, agent: j.AgentStarted) -> bool | None:
        return None
