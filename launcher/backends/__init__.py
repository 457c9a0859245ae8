"""How agents are started on nodes: on this machine, over ssh, by Slurm; or not at all, where nodes join by themselves."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from midwatch.journal import journal as j
from midwatch.recipe import Recipe
from midwatch.run_directory import RunPaths

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


def backend_of(recipe: Recipe, paths: RunPaths) -> Backend:
    """The backend that the recipe names."""
    if recipe.cluster.backend == "ssh":
        from launcher.backends.ssh import SshBackend

        return SshBackend(paths, recipe.cluster)
    if recipe.cluster.backend == "slurm":
        from launcher.backends.slurm.backend import SlurmBackend

        return SlurmBackend(paths, recipe.cluster)
    if recipe.cluster.backend == "external":
        from launcher.backends.external import JoiningBackend

        return JoiningBackend()
    from launcher.backends.local import LocalBackend

    return LocalBackend(paths, recipe.cluster.python)
