"""The GPUs of a node through NVML, each read in a thread of its own.

A call into the driver may take seconds on a card that is dying, or never come back. So nothing here is waited for: `read` gives the
newest figures there are, and says since when a card has not answered; the other cards go on.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pynvml

from launcher.agent.gpm import Activity
from launcher.agent.gpu_faults import Faults
from launcher.agent.nvml import Gone, maybe
from midwatch.protocol import Fault, Gpu, GpuProcess

log = logging.getLogger("launcher.agent")

READ_SECONDS = 1.0
RETRY_SECONDS = 60.0
"""Between two tries to open the driver where that failed."""
SELDOM = 5
"""Readings between two of what changes slowly or takes long: processes, counters of errors."""
STALE_SECONDS = 3.0
"""Without an answer before figures are called old."""
HANG_SECONDS = 15.0
"""Without an answer before that is a fault."""


class GpuReader:
    """Opens the driver, tries again now and then where it cannot, and keeps a thread for each card."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._cards: list[Card] = []
        self._note = "the GPU driver does not answer yet"
        self._ending = threading.Event()
        self._asked = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpus", daemon=True)
        self._thread.start()

    def read(self) -> tuple[tuple[Gpu, ...], str]:
        """The newest figures of every card, in their order, and why there are none where there are none."""
        return tuple(card.newest() for card in self._cards), self._note

    def wait(self, seconds: float) -> None:
        """For the first figures, but not for long."""
        end = time.monotonic() + seconds
        self._asked.wait(seconds)
        for card in self._cards:
            card.read_once.wait(max(0.0, end - time.monotonic()))

    def close(self) -> None:
        """Ends the threads; one that hangs in the driver is left behind, and the driver then stays open."""
        self._ending.set()
        self._thread.join(1.0)
        ended = [card.join(1.0) for card in self._cards]
        if self._cards and all(ended) and not self._thread.is_alive():
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlShutdown()

    def _run(self) -> None:
        while not self._ending.is_set() and not self._cards:
            self._open()
            self._asked.set()
            if not self._cards:
                self._ending.wait(RETRY_SECONDS)

    def _open(self) -> None:
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
        except pynvml.NVMLError as error:
            self._note = f"no GPU: {error}"
            return
        self._note = "" if count else "NVML finds no GPU"
        self._cards = [Card(index, self._ending, self._clock) for index in range(count)]


class Card:
    """One GPU. The thread reads; `newest` may be called from any other."""

    def __init__(self, index: int, ending: threading.Event, clock: Callable[[], float]) -> None:
        self._index, self._ending, self._clock = index, ending, clock
        self._handle: Any = None
        self._name, self._bus = "", ""
        self._passes = 0
        self._slow: dict[str, Any] = {}
        """What is read seldom, as of the last time."""
        self._faults = Faults(clock)
        self._activity: Activity | None = None
        self._answered = clock()
        self._newest = Gpu(index=index)
        self.read_once = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"gpu-{index}", daemon=True)
        self._thread.start()

    def newest(self) -> Gpu:
        gpu, answered, now = self._newest, self._answered, self._clock()
        if now - answered <= STALE_SECONDS:
            return gpu
        faults = gpu.faults
        if now - answered > HANG_SECONDS:
            faults = (*faults, Fault("hang", "the driver does not answer for it", answered))
        return msgspec.structs.replace(gpu, stale=answered, faults=faults)

    def join(self, seconds: float) -> bool:
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._ending.is_set():
            began = time.monotonic()
            try:
                found = self._read()
            except Gone as gone:
                self._handle = self._activity = None
                self._passes = 0
                self._faults.gone(gone)
                found = Gpu(index=self._index, name=self._name, bus=self._bus, faults=self._faults.all())
            except Exception:  # whatever a driver does, the other figures and the ranks are not hurt by it
                log.exception("reading GPU %d", self._index)
                found = Gpu(index=self._index, name=self._name, bus=self._bus, faults=self._faults.all())
            self._newest, self._answered = found, self._clock()
            self.read_once.set()
            self._ending.wait(max(0.05, READ_SECONDS - (time.monotonic() - began)))
        self._faults.close()
        if self._activity is not None:
            self._activity.close()

    def _open(self) -> Any:
        """The card's handle, and what never changes."""
        handle = maybe(lambda: pynvml.nvmlDeviceGetHandleByIndex(self._index))
        if handle is None:
            raise Gone("lost", "the driver no longer knows it")
        self._name = _text(maybe(lambda: pynvml.nvmlDeviceGetName(handle)) or self._name)
        self._bus = _text(maybe(lambda: pynvml.nvmlDeviceGetPciInfo(handle).busId) or self._bus)
        self._slow["slowdown"] = maybe(
            lambda: pynvml.nvmlDeviceGetTemperatureThreshold(handle, pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN)
        )
        self._slow["clock_most"] = maybe(lambda: pynvml.nvmlDeviceGetMaxClockInfo(handle, pynvml.NVML_CLOCK_SM))
        self._faults.open(handle)
        self._activity = Activity.open(handle)
        return handle

    def _read(self) -> Gpu:
        """Raises Gone where the card is lost or must be reset."""
        if self._handle is None:
            self._handle = self._open()
        handle = self._handle
        seldom = self._passes % SELDOM == 0
        self._passes += 1
        if seldom:
            self._slow["processes"] = tuple(
                GpuProcess(int(p.pid), int(p.usedGpuMemory) if p.usedGpuMemory is not None else None)
                for p in maybe(lambda: pynvml.nvmlDeviceGetComputeRunningProcesses(handle)) or ()
            )
        self._faults.look(handle, counters=seldom)
        memory = maybe(lambda: pynvml.nvmlDeviceGetMemoryInfo(handle))
        busy = maybe(lambda: pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
        power = maybe(lambda: pynvml.nvmlDeviceGetPowerUsage(handle))
        limit = maybe(lambda: pynvml.nvmlDeviceGetEnforcedPowerLimit(handle))
        sm, tensor = self._activity.read() if self._activity is not None else (None, None)
        return Gpu(
            index=self._index,
            name=self._name,
            utilisation=busy / 100 if busy is not None else None,
            memory_used=int(memory.used) if memory is not None else None,
            memory_total=int(memory.total) if memory is not None else None,
            temperature=_number(maybe(lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))),
            power=power / 1000 if power is not None else None,
            power_limit=limit / 1000 if limit is not None else None,
            slowdown=_number(self._slow["slowdown"]),
            clock=maybe(lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
            clock_most=self._slow["clock_most"],
            sm=sm,
            tensor=tensor,
            links=self._faults.links,
            bus=self._bus,
            faults=self._faults.all(),
            processes=self._slow["processes"],
        )


def _text(value: str | bytes) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _number(value: Any) -> float | None:
    return float(value) if value is not None else None
