"""The Slurm backend: an agent on each node of an allocation, in a step of its own that srun keeps."""

from __future__ import annotations

import os

from launcher.backends.base import Started
from launcher.backends.slurm.jobs import (
    BATCH_VARIABLE,
    Job,
    SlurmError,
    nodes_of,
    own_allocation,
    read_job,
    standing,
    step,
    write_job,
)
from launcher.backends.slurm.kept_agents import START_SECONDS, KeptAgents
from midwatch.journal import entries as j
from midwatch.recipe import Cluster
from midwatch.recipe.hosts import expand
from midwatch.run_directory import RunPaths


class SlurmBackend:
    """Agents on the nodes of an allocation; of none, where the run's job is over or has not begun."""

    def __init__(self, paths: RunPaths, cluster: Cluster) -> None:
        self._paths, self._cluster = paths, cluster
        self._agents = KeptAgents(paths, cluster)
        self._job, self._nodes = self._find()
        self.patience = START_SECONDS if self._nodes else 0.0
        self.lacking = "" if self._nodes else f"there is no allocation (midwatch resume {paths.root} submits the run again)"

    def _find(self) -> tuple[str, tuple[str, ...]]:
        """The allocation and its nodes."""
        own, known = own_allocation(), read_job(self._paths)
        if own is not None and (known is None or known.id != own):
            write_job(self._paths, Job(own, submitted=BATCH_VARIABLE in os.environ))
        job = own or (known.id if known is not None else "")
        names = os.environ.get("SLURM_JOB_NODELIST", "") if own is not None else ""
        try:
            if job and not names and standing(job).runs:
                names = nodes_of(job)
            return job, expand((names,)) if names else ()
        except (SlurmError, ValueError):
            return job, ()

    @property
    def nodes(self) -> tuple[str, ...]:
        return self._nodes

    async def start(self, node: str) -> Started:
        return await self._agents.start(node, [*step(self._job, node), *self._cluster.srun_args], _environment())

    def alive(self, agent: j.AgentStarted) -> bool | None:
        return self._agents.alive(agent)


def _environment() -> dict[str, str]:
    """What srun hands on to a step: all that there is, and a PATH where a job without an environment has none."""
    kept = {name: value for name, value in os.environ.items() if name not in ("SLURM_EXPORT_ENV", "SRUN_EXPORT_ENV")}
    return {"PATH": os.defpath, **kept}
