"""What a rank writes into its log: timestamped lines on standard error. Rank 0 writes what concerns all, the others their own.

Under a controller that is RUN/logs/NODE/RANK.log; under plain torchrun it is what the terminal shows.
"""

from __future__ import annotations

import faulthandler
import logging
import time
from collections.abc import Callable
from typing import Any

from midwatch.protocol import (
    CheckpointFailed,
    CheckpointReady,
    CommitRefused,
    Committed,
    Ended,
    Metrics,
    Note,
    Op,
    Order,
    Outcome,
    Phase,
    RankBody,
    Sampled,
    StageBorder,
)
from shards.common.terminal import log_to_stderr
from trainer.control.reporting import ControllerLink

log = logging.getLogger("trainer")

FORMAT = "%(asctime)s %(levelname)-7s %(message)s"
PROGRESS_SECONDS = 10.0
PROGRESS_STEPS = 50
_PROGRESS = ("train/loss", "train/lr", "train/grad_norm", "perf/tokens_per_second")
_LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "alarm": logging.ERROR}


def begin() -> None:
    """Sends this process's log to standard error; warnings, and the stack of a crash below Python, go there too."""
    log_to_stderr(FORMAT)
    logging.captureWarnings(True)
    logging.getLogger("websockets").setLevel(logging.WARNING)
    faulthandler.enable()


def describe_order(order: Order) -> str:
    """As `command 7: rollback checkpoint=40-1 skip=3`."""
    name = Op(order.op).name.lower().replace("_", "-") if order.op in tuple(Op) else f"operation {order.op}"
    return " ".join([f"command {order.number}: {name}", *_pairs(order.arguments)])


def describe(body: RankBody) -> tuple[int, str] | None:
    """Level and text of what is told; None for what is not worth a line of its own."""
    if isinstance(body, Outcome):
        if not body.ok:
            return logging.WARNING, f"command {body.number}: failed at step {body.step}: {body.reason}"
        return logging.INFO, " ".join([f"command {body.number}: done at step {body.step}", *_pairs(body.detail)])
    if isinstance(body, CheckpointReady):
        stood = f"training stood still for {body.stall_seconds:.3f} s"
        text = f"checkpoint {body.id}: written in {body.seconds:.2f} s, {body.bytes / 1e6:.1f} MB, {stood}"
        return (logging.WARNING, text + "; suspect: its step's loss was not finite") if body.suspect else (logging.INFO, text)
    if isinstance(body, CheckpointFailed):
        return logging.ERROR, f"checkpoint {body.id} failed: {body.reason}"
    if isinstance(body, StageBorder):
        product = f", checkpoint {body.product}" if body.product else ""
        return logging.INFO, f"step {body.step}: stage {body.stage} {body.event}s{product}"
    if isinstance(body, Sampled):
        if body.tokens is not None:
            return None  # a rollout's: they are many, and lie elsewhere
        return logging.INFO, f"step {body.step}: {body.prompt!r} -> {body.text!r}"
    if isinstance(body, Note):
        return _LEVELS[body.level], f"step {body.step}: {body.text}"
    if isinstance(body, Ended):
        return logging.INFO, f"step {body.step}: {body.cause}" + (f", checkpoint {body.checkpoint}" if body.checkpoint else "")
    return None


def _pairs(values: dict[str, Any]) -> list[str]:
    """As `key=value`; of what is itself made of parts, only its number."""
    plain = {key: value.get("id") if isinstance(value, dict) else value for key, value in values.items()}
    return [f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in plain.items()]


class Logged:
    """A `ControllerLink` that also writes into the log: progress now and then, the rest at once."""

    def __init__(
        self,
        link: ControllerLink,
        seconds: float = PROGRESS_SECONDS,
        steps: int = PROGRESS_STEPS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Progress is written when `seconds` have passed, or so many steps and a second."""
        self._link, self._seconds, self._steps, self._clock = link, seconds, steps, clock
        self._shown_at, self._shown = float("-inf"), 0
        self._paused = False
        self.next_order: Callable[[], Order | None] = link.next_order
        self.next_answer: Callable[[], Committed | CommitRefused | None] = link.next_answer

    def send(self, body: RankBody) -> None:
        self._link.send(body)
        if isinstance(body, Metrics):
            self._progress(body)
        elif isinstance(body, Phase):
            self._phase(body)
        elif (said := describe(body)) is not None:
            log.log(*said)

    def flush(self, timeout: float) -> bool:
        return self._link.flush(timeout)

    def close(self) -> None:
        self._link.close()

    def _progress(self, row: Metrics) -> None:
        if "train/loss" not in row.values:
            self._write(row, tuple(row.values))
            return
        passed = self._clock() - self._shown_at
        if passed >= self._seconds or (passed >= 1.0 and row.step >= self._shown + self._steps):
            self._shown_at, self._shown = self._clock(), row.step
            self._write(row, _PROGRESS)

    def _write(self, row: Metrics, names: tuple[str, ...]) -> None:
        shown = ", ".join(f"{name} {row.values[name]:.4g}" for name in names if name in row.values)
        log.info("step %d: %s", row.step, shown)

    def _phase(self, phase: Phase) -> None:
        if phase.phase == "paused":
            log.info("step %d: paused", phase.step)
            self._paused = True
        elif self._paused and phase.phase in ("training", "evaluating", "sampling", "generating", "scoring"):
            log.info("step %d: resumed", phase.step)
            self._paused = False
        elif phase.phase in ("loading", "evaluating", "sampling", "generating", "scoring"):
            log.info("step %d: %s", phase.step, phase.phase)
