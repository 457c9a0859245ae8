"""What is wrong with a GPU: XIDs, ECC, throttling, NVLink and PCIe errors, in words, each with when it was first seen."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pynvml

from launcher.agent.nvml import Gone, maybe
from midwatch.protocol import Fault

XID_SECONDS = 3600.0
"""That an XID which a program causes is told of; those that tell of the card's own condition stay."""
MOST_XIDS = 4
GROWN_SECONDS = 600.0
"""After the last error of a link that it is told of."""
REPLAYS = 8
"""PCIe replays a minute from which on they are a fault: single ones happen on sound hardware."""
MOST_LINKS = 18


class Xid(NamedTuple):
    text: str
    card: bool = True  # tells of the card's own condition, not of a program's error


XIDS: dict[int, Xid] = {
    13: Xid("an exception in a kernel, usually a bug in the program", False),
    31: Xid("a page fault on the GPU, usually a bug in the program", False),
    43: Xid("it stopped a program after an error", False),
    45: Xid("a program was cleaned up after an earlier error", False),
    48: Xid("an uncorrectable ECC error"),
    63: Xid("a memory row will be remapped at the next reset"),
    64: Xid("a memory row could not be remapped: the card must be replaced"),
    74: Xid("an NVLink error"),
    79: Xid("it has fallen off the bus"),
    92: Xid("many correctable ECC errors"),
    94: Xid("a contained ECC error: the affected program must restart"),
    95: Xid("an uncontained ECC error: the card must be reset"),
    119: Xid("its own processor (GSP) does not answer"),
    120: Xid("its own processor (GSP) failed"),
    140: Xid("an ECC error that it could not recover from"),
}

THROTTLES = (
    (pynvml.nvmlClocksEventReasonHwThermalSlowdown, "slowed down by heat"),
    (pynvml.nvmlClocksEventReasonSwThermalSlowdown, "slowed down by the driver, to stay below its temperature"),
    (pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown, "slowed down by the power brake: the rack lacks power"),
    (pynvml.nvmlClocksEventReasonHwSlowdown, "slowed down by the hardware (heat or power)"),
)
"""What slows a sound card down (its power limit, idleness, clocks that were set) is no fault."""

ORDER = ("lost", "reset", "xid", "ecc", "remap", "throttle", "nvlink", "pcie", "program")

COUNTERS = (
    (pynvml.NVML_NVLINK_ERROR_DL_REPLAY, "replay", "replays"),
    (pynvml.NVML_NVLINK_ERROR_DL_RECOVERY, "recovery", "recoveries"),
    (pynvml.NVML_NVLINK_ERROR_DL_CRC_FLIT, "CRC error", "CRC errors"),
    (pynvml.NVML_NVLINK_ERROR_DL_CRC_DATA, "CRC data error", "CRC data errors"),
    (pynvml.NVML_NVLINK_ERROR_DL_ECC_DATA, "ECC error", "ECC errors"),
)


@dataclass
class Grown:
    """Errors of one link since it was last sound."""

    counts: dict[int, int] = field(default_factory=dict)
    last: float = 0.0


class Faults:
    """One card's; looked for by its reading thread."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._found: dict[str, dict[str, Fault]] = {}
        """By order and by what tells them apart."""
        self._events: Any = None
        self._seen: dict[tuple[int, int], int] = {}
        self._up: dict[int, bool] = {}
        self._grown: dict[int, Grown] = {}
        self._replays: tuple[float, int] | None = None
        self.links: tuple[int, int] | None = None
        """NVLinks that are up, and all there are."""

    def open(self, handle: Any) -> None:
        """The card answers (again)."""
        for kind in ("lost", "reset"):
            self._found.pop(kind, None)
        self.close()
        with contextlib.suppress(pynvml.NVMLError):
            events = pynvml.nvmlEventSetCreate()
            self._events = events
            pynvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, events)

    def close(self) -> None:
        if self._events is not None:
            with contextlib.suppress(pynvml.NVMLError):
                pynvml.nvmlEventSetFree(self._events)
            self._events = None

    def gone(self, why: Gone) -> None:
        self._take_xids()
        for kind in ("throttle", "pcie"):
            self._found.pop(kind, None)
        self._tell(why.kind, "", why.kind, why.text)

    def all(self) -> tuple[Fault, ...]:
        return tuple(fault for kind in ORDER for fault in self._found.get(kind, {}).values())

    def look(self, handle: Any, *, counters: bool) -> None:
        """Raises Gone where the card answers nothing any more."""
        self._take_xids()
        self._look_throttle(handle)
        if counters:
            self._look_memory(handle)
            self._look_links(handle)
            self._look_bus(handle)

    def _tell(self, order: str, key: str, kind: str, text: str, when: float | None = None) -> None:
        """Keeps when it was first seen, unless a `when` says otherwise."""
        kept = self._found.setdefault(order, {})
        since = when if when is not None else kept[key].time if key in kept else self._clock()
        kept[key] = Fault(kind, text, since)

    def _take_xids(self) -> None:
        for _ in range(100):
            if self._events is None:
                break
            try:
                event = pynvml.nvmlEventSetWait(self._events, 0)
            except pynvml.NVMLError:  # mostly: there is none
                break
            if event.eventType == pynvml.nvmlEventTypeXidCriticalError:
                self._tell_xid(int(event.eventData))
        program = self._found.get("program", {})
        for key in [key for key, fault in program.items() if self._clock() - fault.time > XID_SECONDS]:
            del program[key]

    def _tell_xid(self, code: int) -> None:
        known = XIDS.get(code, Xid("see NVIDIA's table of XIDs"))
        order = "xid" if known.card else "program"
        self._found.get(order, {}).pop(str(code), None)
        self._tell(order, str(code), "xid", f"XID {code}: {known.text}", self._clock())
        kept = self._found[order]
        newest = sorted(kept, key=lambda key: -kept[key].time)[:MOST_XIDS]
        self._found[order] = {key: kept[key] for key in newest}

    def _look_throttle(self, handle: Any) -> None:
        reasons = maybe(lambda: pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
        if reasons is None:
            reasons = maybe(lambda: pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)) or 0
        text = next((words for bit, words in THROTTLES if reasons & bit), "")
        if text:
            self._tell("throttle", "", "throttle", text)
        else:
            self._found.pop("throttle", None)

    def _look_memory(self, handle: Any) -> None:
        errors = maybe(
            lambda: pynvml.nvmlDeviceGetTotalEccErrors(handle, pynvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, pynvml.NVML_VOLATILE_ECC)
        )
        if errors:
            many = "error" if errors == 1 else "errors"
            self._tell("ecc", "", "ecc", f"{errors:,} uncorrected ECC {many} since the driver was loaded")
        else:
            self._found.pop("ecc", None)
        rows = maybe(lambda: pynvml.nvmlDeviceGetRemappedRows(handle))
        pending, failed = (bool(rows[2]), bool(rows[3])) if rows is not None else (False, False)
        if pending or failed:
            words = "memory rows could not be remapped: replace it" if failed else "memory rows wait to be remapped: reset it"
            self._tell("remap", "", "remap", words)
        else:
            self._found.pop("remap", None)

    def _look_links(self, handle: Any) -> None:
        states: dict[int, bool] = {}
        for link in range(MOST_LINKS):
            state = maybe(lambda link=link: pynvml.nvmlDeviceGetNvLinkState(handle, link))  # type: ignore[misc]  # mypy cannot type a lambda's default
            if state is None:
                break
            states[link] = bool(state)
        self.links = (sum(states.values()), len(states)) if any(states.values()) or self._up else None
        kept = self._found.setdefault("nvlink", {})
        for link, up in states.items():
            if up:
                self._up[link] = True
                kept.pop(f"down {link}", None)
                self._count_errors(handle, link)
            elif self._up.get(link):  # one that never was up may have no partner
                self._tell("nvlink", f"down {link}", "nvlink", f"NVLink {link} is down")

    def _count_errors(self, handle: Any, link: int) -> None:
        now = self._clock()
        grown = self._grown.setdefault(link, Grown())
        for counter, _, _ in COUNTERS:
            value = maybe(lambda counter=counter: pynvml.nvmlDeviceGetNvLinkErrorCounter(handle, link, counter))  # type: ignore[misc]  # mypy cannot type a lambda's default
            if value is None:
                continue
            before = self._seen.get((link, counter), value)
            self._seen[link, counter] = value
            if value > before:
                grown.counts[counter] = grown.counts.get(counter, 0) + value - before
                grown.last = now
        if grown.counts and now - grown.last > GROWN_SECONDS:
            grown.counts.clear()
            self._found.get("nvlink", {}).pop(f"errors {link}", None)
        if grown.counts:
            told = [f"{n:,} {one if n == 1 else many}" for counter, one, many in COUNTERS if (n := grown.counts.get(counter))]
            self._tell("nvlink", f"errors {link}", "nvlink", f"NVLink {link}: {', '.join(told)}")

    def _look_bus(self, handle: Any) -> None:
        value = maybe(lambda: pynvml.nvmlDeviceGetPcieReplayCounter(handle))
        now = self._clock()
        if value is None:
            return
        if self._replays is None:
            self._replays = (now, value)
        elif now - self._replays[0] >= 60 or value - self._replays[1] > REPLAYS:
            grown, self._replays = value - self._replays[1], (now, value)
            if grown > REPLAYS:
                self._tell("pcie", "", "pcie", f"{grown:,} PCIe replays within a minute")
            else:
                self._found.pop("pcie", None)
