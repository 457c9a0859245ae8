"""How long this rank itself works a step: what tells a slow rank from those that wait for it.

All ranks end a step together, so the step's time is the same on all of them. What differs is how much of it each spends waiting
in collectives. Here the opposite is measured, on the parts of a step in which a rank waits for nobody: reading its batch, and the
forward passes through the blocks, whose parameters are gathered before they begin. A rank that is short of CPU, of clock or of
disk takes longer over them, by the factor by which it is slow. On CUDA the passes are measured by events on the device, which
nothing waits for; they are read when the device has passed them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

SMOOTH_SECONDS = 5.0
"""Over which the figure is smoothed."""
SAMPLED = 8
"""Blocks that are measured, evenly spread; they stand for all."""
WARM_STEPS = 3
"""First steps that are not taken in: libraries load and memory is laid out in them."""
MOST_PASSES = 64
"""Measured passes of a step; those beyond are counted alone."""


class Pace:
    """Measures between `begin` and `end` of each step."""

    def __init__(self, blocks: Sequence[nn.Module], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._cuda = device.type == "cuda"
        every = -(-len(blocks) // SAMPLED)
        watched = blocks[::every]
        self._scale = len(blocks) / max(1, len(watched))
        self._on = False
        self._passes = 0
        self._spans: list[tuple[Any, Any]] = []
        """Beginnings and ends of this step's passes: seconds, or events."""
        self._waiting: tuple[float, int, list[tuple[Any, Any]]] | None = None
        """A step whose events the device has not passed yet: seconds of reading, passes, events."""
        self._pool: list[Any] = []
        self._began: Any = None
        self._last = 0.0
        self._taken = 0
        self.own = 0.0
        """Seconds a step, smoothed; 0: not known yet."""
        for block in watched:
            # FSDP gathers in a hook that it puts first, and frees in one that it puts last: these two are between them.
            block.register_forward_pre_hook(self._enter)
            block.register_forward_hook(self._leave, prepend=True)

    def begin(self) -> None:
        self._on, self._passes, self._began = True, 0, None
        self._spans = []

    def end(self, reading: float) -> float:
        """Takes the step in, with the seconds that its batch took to read; the smoothed seconds."""
        self._on = False
        if not self._cuda:
            self._take(reading, self._passes, sum(stop - start for start, stop in self._spans), len(self._spans))
            return self.own
        if self._waiting is not None and self._waiting[2][-1][1].query():
            read, passes, spans = self._waiting
            self._take(read, passes, sum(start.elapsed_time(stop) for start, stop in spans) / 1000, len(spans))
            self._pool += [event for span in spans for event in span]
            self._waiting = None
        if self._waiting is None and self._spans:
            self._waiting = (reading, self._passes, self._spans)
        else:
            self._pool += [event for span in self._spans for event in span]
        return self.own

    def _take(self, reading: float, passes: int, measured: float, count: int) -> None:
        self._taken += 1
        if self._taken <= WARM_STEPS:
            return
        seconds = reading + measured * self._scale * passes / max(1, count)
        now = self._clock()
        weight = 1 - math.exp(-(now - self._last) / SMOOTH_SECONDS) if self.own else 1.0
        self.own += weight * (seconds - self.own)
        self._last = now

    def _mark(self) -> Any:
        if not self._cuda:
            return self._clock()
        event = self._pool.pop() if self._pool else torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        event.record()
        return event

    def _enter(self, *_: Any) -> None:
        if self._on and len(self._spans) < MOST_PASSES:
            self._began = self._mark()

    def _leave(self, *_: Any) -> None:
        if self._on:
            self._passes += 1
            if self._began is not None:
                self._spans.append((self._began, self._mark()))
                self._began = None
