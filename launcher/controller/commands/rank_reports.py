"""What rank 0 reports, taken in once: each message is stored in journal, metrics or samples before it is acknowledged."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from launcher.controller.commands.command_queue import Dispatch
from launcher.controller.core.checkpoints import Commits
from launcher.controller.core.context import ControllerContext
from launcher.controller.core.watch_rules import WatchRules
from launcher.controller.supervision.generations import Generations
from launcher.metrics.chunks import MetricFrame, StepMetrics
from midwatch import protocol as p
from midwatch.journal import entries as j
from midwatch.metrics.m4_columns import LineageSegment

log = logging.getLogger("launcher.controller")

ROWS_SECONDS = 20.0
"""Longer than it takes to tell that a node is lost, whose rows never come."""

Send = Callable[[p.Message], None]


class Reports:
    """Stores by (source, number), so that a resend changes nothing."""

    def __init__(
        self, context: ControllerContext, commits: Commits, dispatch: Dispatch, generations: Generations, watching: WatchRules
    ) -> None:
        self._context, self._commits, self._dispatch = context, commits, dispatch
        self._generations, self._watching = generations, watching
        self._taken = 0
        """Highest number of this generation's control messages that was taken in by this controller."""
        self._durable = 0
        """Highest number of those whose entries are durable."""
        self._of_generation = -1
        self._lost_samples = False

    def acknowledged(self) -> int:
        """Highest number of the control messages of the living generation that is stored durably."""
        self._follow_generation()
        return max(self._durable, 0 if self._context.unwritten else self._context.ledger.reported)

    def _seen(self) -> int:
        """Highest number that was taken in: what is sent again up to it changes nothing."""
        self._follow_generation()
        return max(self._taken, self._context.ledger.reported)

    def _follow_generation(self) -> None:
        if self._of_generation != self._context.ledger.generation:
            self._of_generation, self._taken, self._durable = self._context.ledger.generation, 0, 0

    def metrics(self, source: str, message: p.Numbered) -> bool:
        """One step's row, or a sample of a rollout; whether it was new. Raises OSError where a row cannot be stored."""
        row = message.body
        self._context.live.heard = self._context.clock()
        if isinstance(row, p.Sampled):
            return self._sample(source, message.number, row)
        if isinstance(row, p.Dropped):
            self._context.live.dropped += row.count
            return True
        if not isinstance(row, p.Metrics):
            return False
        context = self._context
        stored = StepMetrics(lineage=row.lineage, step=row.step, tokens=row.tokens, time=row.time, values=row.values)
        new = context.metrics.add(MetricFrame(source, message.number, [stored]))
        if new and row.lineage == context.ledger.lineage:
            self._see(row)
        return new

    def _sample(self, source: str, number: int, sample: p.Sampled) -> bool:
        """Where the disk has no room for it, it is lost: training and its metrics matter more."""
        context = self._context
        try:
            new = context.samples.add(source, number, context.clock(), sample)
        except OSError as error:
            if not self._lost_samples:
                context.note(
                    "warning", f"{context.paths.samples}: {error.strerror}; the policy's samples are not stored", sample.step
                )
            self._lost_samples = True
            return False
        self._lost_samples = self._lost_samples and not new
        if new:
            context.touch()
        return new

    def _see(self, row: p.Metrics) -> None:
        live = self._context.live
        live.latest |= row.values
        if "train/loss" in row.values:
            if row.step > live.step:
                self._generations.progressed()
            live.step, live.tokens, live.step_time = row.step, row.tokens, row.time
            seconds = row.values.get("perf/step_seconds")
            if seconds is not None and math.isfinite(seconds):
                live.step_seconds.append(seconds)
        self._watching.see(row)
        self._context.touch()

    async def rows_stored(self, ready: p.CheckpointReady) -> None:
        """Waits until the metrics up to a checkpoint's step are durable, for its line will need them; or its ranks are gone."""
        context = self._context
        line = context.ledger.lineages.get(ready.lineage)
        end = time.monotonic() + ROWS_SECONDS
        while ready.step > (line.fork_step if line is not None else 0) and time.monotonic() < end:
            newest = context.metrics.latest("train/loss", [LineageSegment(ready.lineage, -1, None)])
            if newest is not None and newest.step >= ready.step:
                break
            if context.ledger.generation != ready.generation or not context.ledger.generation_live:
                break
            await asyncio.sleep(0.02)
        await asyncio.to_thread(context.metrics.sync)

    def _reached(self, step: int, lineage: int | None = None) -> None:
        """Control may be ahead of telemetry in telling how far the ranks are."""
        context = self._context
        if lineage is None or lineage == context.ledger.lineage:
            context.live.step = max(context.live.step, step)

    def control(self, message: p.Numbered, send: Send) -> None:
        """Anything but metrics; acknowledged once it is durable. What ranks of an ended generation still say changes nothing."""
        context, generation = self._context, self._context.ledger.generation
        if context.ledger.generation_live:
            context.live.heard = context.clock()
            if message.number > self._seen():
                self._take(message.body, message.number, send)
                self._taken = message.number
            elif isinstance(message.body, p.CheckpointReady):
                self._commit(message.body, 0, send)
        context.when_durable(lambda: self._acknowledge(generation, message.number, send))

    def _acknowledge(self, generation: int, number: int, send: Send) -> None:
        if generation == self._context.ledger.generation:
            self._durable = max(self._durable, number)
        send(p.Ack(number=number))

    def _commit(self, ready: p.CheckpointReady, report: int, send: Send) -> None:
        """The ranks hear of a commit once it is durable: until then they must not count on it."""
        answer = self._commits.take(ready, report)
        self._context.when_durable(lambda: send(answer))

    def _take(self, body: p.RankBody, report: int, send: Send) -> None:
        context = self._context
        now = context.clock()
        if isinstance(body, p.Phase):
            self._phase(body, report)
        elif isinstance(body, p.Outcome):
            self._reached(body.step)
            self._dispatch.outcome(body, report)
        elif isinstance(body, p.CheckpointReady):
            self._commit(body, report, send)
        elif isinstance(body, p.CheckpointFailed):
            self._checkpoint_failed(body, report)
        elif isinstance(body, p.StageBorder):
            self._border(body, report)
        elif isinstance(body, p.Sampled):
            context.record(
                j.SampleTaken(
                    time=now,
                    report=report,
                    stage=body.stage,
                    step=body.step,
                    lineage=body.lineage,
                    prompt=body.prompt,
                    text=body.text,
                )
            )
        elif isinstance(body, p.Note):
            context.note(body.level, body.text, body.step, report)
        elif isinstance(body, p.Ended):
            self._reached(body.step)
            self._dispatch.ranks_ended(body.cause, body.step, body.checkpoint)
            self._generations.ended(body.cause)

    def _phase(self, phase: p.Phase, report: int) -> None:
        context = self._context
        if context.live.phase is None or context.live.phase.phase != phase.phase:
            context.live.phase_since = context.clock()
        context.live.phase = phase
        self._reached(phase.step, phase.lineage)
        if phase.settings and phase.settings != context.ledger.settings:
            context.record(
                j.SettingsInForce(
                    time=context.clock(), report=report, lineage=phase.lineage, step=phase.step, settings=phase.settings
                )
            )
        if phase.phase == "paused":
            if context.state != "paused":
                reason = context.journal_fault or self._newest_alarm()
                context.change_state("paused", "" if context.ledger.held else reason)
            self._generations.training()
        elif phase.phase in ("training", "evaluating", "sampling", "generating", "scoring"):
            if context.state != "paused" or phase.phase == "training":
                context.change_state("training")
            self._generations.training()
        context.touch()
        self._dispatch.wake()

    def _newest_alarm(self) -> str:
        """Why ranks that nobody has paused hold: what they have just raised an alarm about."""
        for _, entry in reversed(self._context.journal.entries[-50:]):
            if isinstance(entry, j.Noted) and entry.level == "alarm":
                return entry.text
        return ""

    def _checkpoint_failed(self, failed: p.CheckpointFailed, report: int) -> None:
        context = self._context
        context.note("alarm", f"checkpoint {failed.id} could not be written: {failed.reason}", failed.step)
        for number in failed.numbers:
            self._dispatch.outcome(p.Outcome(number=number, ok=False, step=failed.step, reason=failed.reason), 0)
        context.record(
            j.CheckpointFailed(time=context.clock(), report=report, id=failed.id, step=failed.step, reason=failed.reason)
        )

    def _border(self, border: p.StageBorder, report: int) -> None:
        context = self._context
        if border.event == "begin":
            context.record(
                j.StageBegan(
                    time=context.clock(),
                    report=report,
                    stage=border.stage,
                    step=border.step,
                    lineage=border.lineage,
                    stage_step=border.stage_step,
                )
            )
            return
        context.record(
            j.StageEnded(
                time=context.clock(),
                report=report,
                stage=border.stage,
                step=border.step,
                stage_step=border.stage_step,
                lineage=border.lineage,
                product=border.product,
            )
        )
