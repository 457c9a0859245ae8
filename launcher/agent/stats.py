"""What a node is doing: CPUs and memory by psutil, GPUs by NVML where there is a driver."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import msgspec
import psutil

from launcher.agent.gpus import GpuReader
from midwatch.protocol import Gpu, NodeStats, RankBeat

FIRST_SECONDS = 0.5
"""That the first figures of the GPUs are waited for; later ones never are."""


class NodeReader:
    """Reads one node."""

    def __init__(self, node: str, disk: Path) -> None:
        self._node, self._disk = node, disk
        self._gpus = GpuReader()
        self._fresh = True
        self._rank_of: dict[int, int | None] = {}
        """Process numbers on the GPUs, and the rank each belongs to."""
        self._pids: dict[int, int] = {}
        psutil.cpu_percent(percpu=True)

    def read(self, ranks: tuple[RankBeat, ...] = (), generation: int = 0) -> NodeStats:
        if self._fresh:
            self._fresh = False
            self._gpus.wait(FIRST_SECONDS)
        memory = psutil.virtual_memory()
        gpus, note = self._gpus.read()
        return NodeStats(
            node=self._node,
            time=time.time(),
            cpus=tuple(p / 100 for p in psutil.cpu_percent(percpu=True)),
            memory_used=memory.total - memory.available,
            memory_total=memory.total,
            gpus=self._with_ranks(gpus, ranks),
            gpu_note="" if gpus else note,
            rank_rss=tuple(_resident(beat.pid) for beat in ranks),
            disk_free=_free(self._disk),
            generation=generation,
            ranks=ranks,
        )

    def close(self) -> None:
        self._gpus.close()

    def _with_ranks(self, gpus: tuple[Gpu, ...], ranks: tuple[RankBeat, ...]) -> tuple[Gpu, ...]:
        """The GPUs, with the rank of each process on them."""
        pids = {beat.pid: beat.rank for beat in ranks}
        if pids != self._pids:
            self._pids, self._rank_of = pids, {}
        return tuple(
            msgspec.structs.replace(gpu, processes=tuple(msgspec.structs.replace(p, rank=self._rank(p.pid)) for p in gpu.processes))
            if gpu.processes and pids
            else gpu
            for gpu in gpus
        )

    def _rank(self, pid: int) -> int | None:
        """The rank that a process is, or descends from. None where NVML counts processes in another container's way, too."""
        if pid not in self._rank_of:
            line = [pid]
            with contextlib.suppress(psutil.Error):
                line += [parent.pid for parent in psutil.Process(pid).parents()]
            self._rank_of[pid] = next((self._pids[each] for each in line if each in self._pids), None)
        return self._rank_of[pid]


def _resident(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _free(disk: Path) -> int | None:
    try:
        return int(psutil.disk_usage(str(disk)).free)
    except OSError:
        return None
