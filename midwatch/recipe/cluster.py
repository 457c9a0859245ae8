"""`[cluster]`: where the ranks run."""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from midwatch.extensions import Registry
from midwatch.recipe.bounds import MOST_COUNT, bounded
from midwatch.recipe.hosts import expand
from shards.common.decoding import shown


class Sbatch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `sbatch` is told when a run asks for an allocation of its own."""

    partition: str | None = None
    account: str | None = None
    time: str | None = None
    """Time limit, as Slurm writes it: `2-00:00:00`."""
    signal_seconds: int = 300
    """How long before the time limit the run saves a checkpoint and is queued again."""
    lines: tuple[str, ...] = ()
    """Further options, as `--gres=gpu:8`."""

    def limit(self) -> tuple[str, str]:
        """The key that sets the time limit, and its text; both empty where none does, so that the partition's default holds."""
        for place in range(len(self.lines) - 1, -1, -1):  # the last one holds, and `lines` come after `time`
            found = re.search(r"(?:--time[= ]|-t ?)([\w:-]+)", self.lines[place])
            if found is not None:
                return f"sbatch.lines.{place}", found[1]
        return ("sbatch.time", self.time) if self.time is not None else ("", "")

    def problems(self) -> list[tuple[str, str]]:
        found = [] if self.signal_seconds > 0 else [("sbatch.signal_seconds", "must be above 0")]
        key, text = self.limit()
        seconds = limit_seconds(text)
        if key and seconds is None and text.lower() not in ("unlimited", "infinite", "0"):
            found.append((key, f"{text!r} is no time limit as Slurm writes it (as 90, 12:00:00 or 2-00:00:00)"))
        elif seconds is not None and seconds <= self.signal_seconds:
            found.append(
                (
                    key,
                    f"the time limit {text} is {seconds:.0f} s, and the run is to save and be queued again {self.signal_seconds} s "
                    "before it, so that it would never train; make the limit longer, or signal_seconds shorter",
                )
            )
        return found


def limit_seconds(text: str) -> float | None:
    """A time limit as Slurm writes it: MINUTES[:SECONDS], HOURS:MINUTES:SECONDS, or DAYS-HOURS[:MINUTES[:SECONDS]].

    None where it is no limit.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text.strip())
    if found is None:
        return None
    days, first, second, third = (int(each or 0) for each in found.groups())
    hours, minutes, seconds = (first, second, third) if found[1] or found[4] else (0, first, second)
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds) or None


BACKENDS = Registry(
    "midwatch.backends",
    "backend",
    {
        "local": "launcher.backends.local:LocalBackend",
        "ssh": "launcher.backends.ssh:SshBackend",
        "slurm": "launcher.backends.slurm.backend:SlurmBackend",
        "pbs": "launcher.backends.pbs:PbsBackend",
        "external": "launcher.backends.external:JoiningBackend",
    },
)
"""By name, since this package does not import the launcher."""


class Cluster(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Nodes, ranks and how they are started."""

    backend: str = "local"
    """`local`: this machine; `ssh`: `hosts`, by the operator's own ssh; `slurm`, `pbs`: an allocation; `external`: nodes that join;
    or one that another package brings."""
    hosts: tuple[str, ...] = ()
    """For `ssh`: names that ssh knows, as `gpu-[01-16]`."""
    nodes: int | str | None = None
    """Nodes that train: a number, or `"12:16"` for the fewest and the most; those beyond are spares. All, where left out."""
    ranks_per_node: int = 1
    threads: int = 1
    """Torch threads of a rank on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = True
    """Kernels that give the same bits each time; `false` may be faster on a GPU."""
    python: str | None = None
    """Interpreter of agents and ranks; the one that runs the controller where it is left out."""
    interface: str | None = None
    """Network interface of the nodes that collectives and the controller use; must be a network that is trusted."""
    port: int = 0
    """Port on which the controller listens for agents of other nodes; 0: any free one."""
    ssh_options: tuple[str, ...] = ()
    """Handed to ssh as they are, as `["-J", "login"]`."""
    fork_ranks: bool = True
    """Start ranks as forks of a process that has imported torch already, which saves the seconds that this takes."""
    env: dict[str, str] = {}
    """Environment of the ranks on every node."""
    setup: tuple[str, ...] = ()
    """Shell lines run on a node before its agent starts, as `module load cuda/12.8`."""
    operators: str | None = None
    """Group whose members may watch and command the run, besides who started it."""
    hang_seconds: float = 60.0
    """Shortest time without a move after which ranks count as hung; above it, five times what they usually take in that phase."""
    hang_first_seconds: float = 1800.0
    """The same for a phase that has not been seen often enough to know."""
    quarantine_after: int = 3
    """Failures of a node after which it is used no more."""
    straggler_ratio: float = 1.3
    """How many times the median of all ranks a rank's own time a step is before it counts as slow."""
    straggler_seconds: float = 30.0
    """For how long it must be so before it is named, and must not before it is no more."""
    srun_args: tuple[str, ...] = ()
    """Handed to srun as they are, as `["--container-image=…"]`."""
    sbatch: Sbatch = Sbatch()

    @property
    def host_names(self) -> tuple[str, ...]:
        """`hosts`, written out."""
        return expand(self.hosts)

    @property
    def fewest_nodes(self) -> int:
        return self._bounds()[0]

    @property
    def most_nodes(self) -> int:
        return self._bounds()[1]

    def _bounds(self) -> tuple[int, int]:
        if self.nodes is None:
            count = len(self.host_names) or 1
            return count, count
        if isinstance(self.nodes, int):
            return self.nodes, self.nodes
        low, _, high = self.nodes.partition(":")
        return int(low), int(high or low)

    def problems(self) -> list[tuple[str, str]]:
        if not BACKENDS.knows(self.backend):
            return [("backend", f"must be one of {', '.join(BACKENDS.names())}, but it is {shown(self.backend)}")]
        found = bounded(self, 1, MOST_COUNT, ("ranks_per_node", "threads", "quarantine_after"))
        keys = ("hang_seconds", "hang_first_seconds", "straggler_seconds")
        found += [(key, "must be greater than 0") for key in keys if not getattr(self, key) > 0]
        if not self.straggler_ratio > 1:
            found.append(("straggler_ratio", "must be greater than 1"))
        if not 0 <= self.port < 65536:
            found.append(("port", "must be between 0 and 65535"))
        if self.backend == "slurm":
            found += self.sbatch.problems()
        try:
            hosts = len(self.host_names)
        except ValueError as error:
            return [*found, ("hosts", str(error))]
        if self.backend == "ssh" and not hosts:
            found.append(("hosts", 'the backend "ssh" needs hosts, as hosts = ["gpu-[01-16]"]'))
        if self.backend != "ssh" and hosts:
            found.append(("hosts", f'only the backend "ssh" takes hosts, and this is "{self.backend}"'))
        if isinstance(self.nodes, str) and not re.fullmatch(r"[0-9]{1,7}(:[0-9]{1,7})?", self.nodes):
            return [*found, ("nodes", f'must be a number, or fewest and most as "12:16", but it is {shown(self.nodes)}')]
        low, high = self._bounds()
        if not 1 <= low <= high:
            found.append(("nodes", f"{self.nodes!r}: the fewest must be at least 1, and the most no fewer"))
        elif high > MOST_COUNT:
            found.append(("nodes", f"{high} nodes are more than any cluster has (at most {MOST_COUNT:,})"))
        elif self.backend == "ssh" and hosts and low > hosts:
            found.append(("nodes", f"at least {low} nodes are asked for, and there are {hosts} hosts"))
        elif self.backend == "local" and (low, high) != (1, 1):
            found.append(("nodes", 'the backend "local" has one node; for more use "ssh", "slurm" or "external"'))
        return found
