"""A file that says how far this rank is, for the agent to tell a slow rank from a hung one."""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from midwatch.protocol import PHASES

_LAYOUT = struct.Struct("<QdIf")
"""Step, the time of the beat by the machine's monotonic clock, the phase's place in PHASES, and the rank's own seconds a step."""


class Heartbeat:
    """Beats into a few bytes of shared memory: no system call, so it may beat at every boundary."""

    def __init__(self, file: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase = 0
        self.own = 0.0
        """Seconds of a step in which this rank waits for no other; told with the next beat."""
        self._map: mmap.mmap | None = None
        if file is not None:
            with file.open("w+b") as opened:
                opened.truncate(_LAYOUT.size)
                self._map = mmap.mmap(opened.fileno(), _LAYOUT.size)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Heartbeat:
        """At MIDWATCH_HEARTBEAT with the rank as a suffix; nowhere if that is not set."""
        base = environment.get("MIDWATCH_HEARTBEAT")
        return cls(Path(f"{base}.{environment.get('RANK', '0')}") if base else None)

    def enter(self, phase: str, step: int) -> None:
        """A phase begins: what it may take before it counts as hung is its own."""
        self._phase = PHASES.index(phase)
        self.beat(step)

    def beat(self, step: int) -> None:
        """The rank still moves."""
        if self._map is not None:
            _LAYOUT.pack_into(self._map, 0, step, self._clock(), self._phase, self.own)

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
            self._map = None
