"""Agents and the controller: a node's ranks, hang reports, and each second's measurements of its GPUs."""

from __future__ import annotations

from typing import Literal

import msgspec

from midwatch.protocol.base import LenientMessage, StrictMessage
from midwatch.protocol.ranks import Start

# The agent and the controller.


class AgentHello(StrictMessage, frozen=True):
    version: int
    run: str
    node: str
    pid: int
    generation: int
    """The generation whose ranks it holds; 0: none."""
    address: str = "127.0.0.1"
    """Where the other nodes reach it."""
    probe_port: int = 0
    """A port there that takes connections and closes them: it tells a node that is cut off from one that is slow. 0: none."""


class AgentWelcome(StrictMessage, frozen=True):
    term: int


class Gather(StrictMessage, frozen=True):
    """Start the ranks of a generation."""

    start: Start
    node_rank: int
    nodes: int
    ranks_per_node: int
    store_host: str
    store_port: int
    """0: this agent opens the store."""
    environment: dict[str, str] = {}
    """Of the ranks, beside what they inherit."""


class Gathered(StrictMessage, frozen=True):
    """The store is open and the ranks are starting."""

    generation: int
    store_port: int
    environment: dict[str, str] = {}
    """Of the ranks, the values of secrets left out."""


class Hung(StrictMessage, frozen=True):
    """Ranks of this node have not moved for longer than they ever should; the agent has written down where they are."""

    generation: int
    phase: str
    seconds: float
    limit: float
    file: str
    """Their stacks, below the run's directory."""
    stuck: tuple[int, ...] = ()
    """Ranks that are stopped or do not answer: the others wait for them."""


class TakeStacks(StrictMessage, frozen=True):
    """Write down where this node's ranks are: those of another node hang."""

    generation: int


class StacksTaken(StrictMessage, frozen=True):
    generation: int
    file: str
    stuck: tuple[int, ...] = ()


class EndRanks(StrictMessage, frozen=True):
    """End the ranks of the generation at once."""

    generation: int
    reason: str


class Leave(StrictMessage, frozen=True):
    """The agent may end: the run is over."""


class RankExit(msgspec.Struct, frozen=True):
    rank: int
    code: int
    """Exit status; the negative signal where one killed it."""
    message: str = ""


class RanksEnded(StrictMessage, frozen=True):
    """All ranks of the generation on this node have ended."""

    generation: int
    ok: bool
    exits: tuple[RankExit, ...] = ()
    reason: str = ""
    certain: bool = False
    """Whether the ranks of another start would end in the same way."""


FaultKind = Literal["lost", "xid", "ecc", "remap", "throttle", "nvlink", "pcie", "reset", "hang"]


class Fault(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Something that is wrong with a GPU."""

    kind: str
    """One of FaultKind; an agent of a later version may know others."""
    text: str
    """In an operator's words."""
    time: float = 0.0
    """When it was first seen, by the node's clock; 0: not known."""


class GpuProcess(msgspec.Struct, frozen=True, array_like=True, gc=False):
    pid: int
    memory: int | None = None
    """Bytes on the GPU."""
    rank: int | None = None
    """Of this run, where it is a rank's or a child's of one."""


class Gpu(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One GPU's figures; what a card does not give is None."""

    index: int
    name: str = ""
    utilisation: float | None = None
    """Part of the time in which it was busy, 0 to 1; None: not to be had."""
    memory_used: int | None = None
    """Bytes."""
    memory_total: int | None = None
    temperature: float | None = None
    """Degrees Celsius."""
    power: float | None = None
    """Watts."""
    power_limit: float | None = None
    slowdown: float | None = None
    """Degrees Celsius at which it slows itself down."""
    clock: int | None = None
    """MHz of its multiprocessors."""
    clock_most: int | None = None
    sm: float | None = None
    """Part of the multiprocessors that were busy, 0 to 1; by GPM, from Hopper on."""
    tensor: float | None = None
    """Part of the time in which tensor cores worked, 0 to 1; likewise."""
    links: tuple[int, int] | None = None
    """NVLinks that are up, and all it has; None where it has none."""
    bus: str = ""
    """PCI address, as `nvidia-smi` shows it."""
    faults: tuple[Fault, ...] = ()
    """The gravest first."""
    processes: tuple[GpuProcess, ...] = ()
    stale: float | None = None
    """Since when it has not answered: the figures are from then. By the node's clock; None: they are new."""


class RankBeat(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """How far a rank is, as its node sees it."""

    rank: int
    pid: int
    step: int
    time: float
    """When it last passed a boundary, by the node's clock; 0: not yet."""
    phase: str = "loading"
    own: float = 0.0
    """Seconds of a step in which it works and waits for no other rank, smoothed (trainer.control.step_timer); 0: not known."""


class NodeStats(LenientMessage, frozen=True, gc=False):
    node: str
    time: float
    cpus: tuple[float, ...]
    """Utilisation of each CPU, 0 to 1."""
    memory_used: int
    memory_total: int
    gpus: tuple[Gpu, ...] = ()
    gpu_note: str = ""
    """Why there are no figures of GPUs, where there are none."""
    rank_rss: tuple[int, ...] = ()
    """Resident bytes of each rank's process."""
    disk_free: int | None = None
    generation: int = 0
    """Of the ranks; 0: there are none."""
    ranks: tuple[RankBeat, ...] = ()
