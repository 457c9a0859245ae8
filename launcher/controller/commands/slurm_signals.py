"""A controller in a batch job: Slurm's signals become commands, and a run that Slurm has interrupted goes on when its job does.

The time limit is near (SIGUSR1): checkpoint, release the ranks, and the job's keeper has the job queued again. The job is to end
(SIGTERM, by scancel or a preemption): stop with a checkpoint, for which there is as long as Slurm waits before it kills. Both are
commands with the author "slurm", in the journal as any; a job that begins anew resumes what "slurm" has ended, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os

from launcher.backends.slurm.jobs import BATCH_VARIABLE, RESUME_VARIABLE
from launcher.controller.commands.command_queue import Dispatch
from launcher.controller.core.context import ControllerContext
from launcher.controller.supervision.generations import Generations
from midwatch.journal import entries as j
from midwatch.journal.journal import JournalError
from midwatch.protocol import Command, CommandView, Verb

log = logging.getLogger("launcher.controller")

AUTHOR = "slurm"
LATE = "the job ended before"
HELD = "held"
"""Ends the id of a release that found the run paused: it is to be paused again."""
MARGIN = 0.75
"""Of the time between the signal and the limit, for the release; then the job is queued again with the newest checkpoint."""
WATCHED_SECONDS = 300.0
"""That a run which is over keeps its job for those who watch: its nodes cost."""


class BatchJob:
    """What one controller in a batch job does for Slurm."""

    def __init__(self, context: ControllerContext, dispatch: Dispatch, generations: Generations, name: str) -> None:
        """`name` tells one start of one job from all others: `JOB.RESTARTS`."""
        self._context, self._dispatch, self._generations = context, dispatch, generations
        self._prefix = f"slurm/{name}/"
        self._over = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None

    @classmethod
    def of(cls, context: ControllerContext, dispatch: Dispatch, generations: Generations) -> BatchJob | None:
        """None where this controller is in no batch job of its own."""
        name = os.environ.get(BATCH_VARIABLE)
        return cls(context, dispatch, generations, name) if name else None

    def begin(self) -> None:
        """Ends what Slurm has asked for in an earlier job, and goes on where that was the last word."""
        context = self._context
        for command in context.ledger.open_commands():
            if command.author == AUTHOR and not command.id.startswith(self._prefix):
                ended = j.CommandEnded(time=context.clock(), author=AUTHOR, number=command.number, state="failed", reason=LATE)
                context.record(ended)
        last = self._last()
        asker = os.environ.get(RESUME_VARIABLE, "")
        interrupted = last is not None and last.author == AUTHOR and last.verb != "resume"
        if context.state == "released" and last is not None and interrupted and not last.id.startswith(self._prefix):
            context.note("info", f"Slurm has started the job again ({self._prefix.split('/')[1]}); the run goes on")
            self._give("resume", AUTHOR)
            if last.id.endswith(HELD):
                self._give("pause", AUTHOR)
        elif asker and context.state in ("released", "failed"):
            self._give("resume", asker)

    def _last(self) -> CommandView | None:
        """The last command that has ended or resumed the run."""
        verbs = ("stop", "stop-now", "release", "resume")
        done = [c for c in self._context.ledger.commands.values() if c.verb in verbs and c.state == "done"]
        return max(done, key=lambda c: c.number, default=None)

    # Signals

    def limit_is_near(self) -> None:
        seconds = self._context.recipe.cluster.sbatch.signal_seconds * MARGIN
        self._end_once("release", seconds, "the job's time limit is near: a checkpoint, and it is queued again")

    def job_ends(self) -> None:
        self._end_once("stop", float("inf"), "Slurm ends the job")

    def _end_once(self, verb: Verb, seconds: float, told: str) -> None:
        if self._ending is None:
            self._ending = asyncio.create_task(self._end(verb, seconds, told), name="slurm-signal")

    async def _end(self, verb: Verb, seconds: float, told: str) -> None:
        context = self._context
        try:
            context.note("warning", told, context.live.step)
            if context.state in ("training", "paused"):
                self._give(verb, AUTHOR, HELD if context.state == "paused" else "")
            elif context.state in ("starting", "recovering"):
                self._give("stop-now", AUTHOR)  # there is nothing new to keep
            async with asyncio.timeout(None if seconds == float("inf") else seconds):
                while context.state in ("training", "paused", "starting", "recovering") or context.ledger.generation_live:
                    await asyncio.sleep(0.05)
        except TimeoutError:
            context.note("alarm", "there was no time for a checkpoint; the newest one counts")
        except JournalError as error:
            log.error("%s", error)
        finally:
            self._over.set()

    def _give(self, verb: Verb, author: str, more: str = "") -> None:
        self._dispatch.accept(Command(id=f"{self._prefix}{verb}{'/' if more else ''}{more}", verb=verb), author)

    # The end

    async def until_over(self) -> None:
        """Returns when Slurm wants the job to end, or when the run has been over for so long that its nodes are given back."""
        rested = 0.0
        while rested < WATCHED_SECONDS and not self._over.is_set():
            resting = self._context.state in ("finished", "failed", "released") and not self._context.ledger.generation_live
            rested = rested + 0.5 if resting else 0.0
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), 0.5)
        self._generations.dismiss()
        await asyncio.sleep(0.2)
