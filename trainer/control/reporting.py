"""How rank 0 speaks to whoever commands the run, and the metrics it tells: one step late, so that nothing waits for the device."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from midwatch.protocol import CommitRefused, Committed, Metrics, Order, RankBody
from trainer.transfer import HostCopy


class ControllerLink(Protocol):
    """The controller as rank 0 sees it: `midwatch.transport.rank_client.RankLink`, or `trainer.control.standalone.LogLink`."""

    def send(self, body: RankBody) -> None:
        """Reports; never blocks."""

    def next_order(self) -> Order | None: ...

    def next_answer(self) -> Committed | CommitRefused | None:
        """What became of a checkpoint that was reported ready."""

    def flush(self, timeout: float) -> bool:
        """Waits until everything sent has arrived; whether it was in time."""

    def close(self) -> None: ...


class NoLink:
    """The link of all ranks but the first."""

    def send(self, body: RankBody) -> None:
        pass

    def next_order(self) -> Order | None:
        return None

    def next_answer(self) -> Committed | CommitRefused | None:
        return None

    def flush(self, timeout: float) -> bool:
        return True

    def close(self) -> None:
        pass


@dataclass(frozen=True)
class StepReport:
    """One step's metrics, some of them still on the device."""

    lineage: int
    step: int
    tokens: int
    known: dict[str, float]
    values: Tensor
    """Summed over the ranks."""
    read: Callable[[list[float]], dict[str, float]]
    """Metrics from the values, `train/loss` and `train/grad_norm` among them."""


class MetricReporter:
    """Sends metrics one step late, and tells `observe` what each step's loss and gradient were like."""

    def __init__(
        self, link: ControllerLink, observe: Callable[[int, bool, float], None], clock: Callable[[], float] = time.time
    ) -> None:
        self._link, self._observe, self._clock = link, observe, clock
        self._pending: tuple[StepReport, HostCopy] | None = None

    def put(self, report: StepReport) -> None:
        """Takes a step's metrics and sends those of the step before."""
        # Before anything of the next step is queued: a copy that is asked for later waits for that step.
        arriving = HostCopy(report.values)
        self.flush()
        self._pending = report, arriving

    def flush(self) -> None:
        """Sends what is left; waits for the device to have computed it, but not for what it was asked after."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        report, arriving = pending
        values = report.known | report.read(arriving.tolist())
        loss, norm = values["train/loss"], values["train/grad_norm"]
        finite = abs(loss) < float("inf") and abs(norm) < float("inf")
        self._observe(report.step, finite, loss)
        self.send(report.lineage, report.step, report.tokens, values)

    def send(self, lineage: int, step: int, tokens: int, values: dict[str, float]) -> None:
        self._link.send(Metrics(lineage=lineage, step=step, tokens=tokens, time=self._clock(), values=values))
