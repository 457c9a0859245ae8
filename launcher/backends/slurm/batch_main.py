"""`python -P -m launcher.backends.slurm.batch_main RUN [resume=WHO]`: what a run's batch job executes.

It keeps a controller, hands it Slurm's signals, and ends as the run.

A controller that dies is followed by another, which takes over. When the time limit is near the controller has the ranks save and
leave, and the job is queued again under the same number; where the cluster does not allow that, another job is submitted.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from launcher.backends.slurm.jobs import BATCH_VARIABLE, RESUME_VARIABLE, SlurmError, requeue, submit, time_limit
from midwatch.journal.journal import JournalError, read_journal
from midwatch.journal.run_state import Ledger
from midwatch.recipe import RecipeError, load_recipe
from midwatch.recipe.cluster import limit_seconds
from midwatch.run_directory import RunPaths
from midwatch.signals import ignore_stray
from midwatch.transport.discovery import start_controller
from shards.common.terminal import write_error

MOST_DEATHS = 5
"""Of controllers in a row that did not live for a minute."""
FINISHED, FAILED, WRONG, RULE_STOPPED, STOPPED = 0, 1, 2, 3, 4


class Keeper:
    """Keeps one run's controller for as long as the job lasts."""

    def __init__(self, paths: RunPaths, job: str) -> None:
        self._paths, self._job = paths, job
        self._controller: subprocess.Popen[bytes] | None = None
        self._asked: set[int] = set()
        self._queued_again = False

    def keep(self) -> int:
        """The value is the job's exit status."""
        ignore_stray()
        for which in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(which, self._signalled)
        deaths = 0
        while True:
            began = time.monotonic()
            self._controller = start_controller(self._paths.root).process
            for number in self._asked:  # it came between two controllers
                self._controller.send_signal(number)
            status = self._controller.wait()
            _say(f"the controller has ended with status {status}")
            if status == WRONG:
                return WRONG
            over = self._outcome()
            if signal.SIGTERM in self._asked:
                return STOPPED if over is None else over
            if signal.SIGUSR1 in self._asked and over not in (FINISHED, FAILED):
                return self._queue_again() if self._worth_it() else FAILED
            if over is not None:
                return over
            deaths = deaths + 1 if time.monotonic() - began < 60 else 1
            if deaths > MOST_DEATHS:
                _say(f"{deaths} controllers in a row have died; see {self._paths.logs / 'controller.log'}")
                return FAILED
            time.sleep(min(deaths, 5))

    def _signalled(self, number: int, frame: object) -> None:
        if self._queued_again:
            os._exit(0)  # Slurm ends the job because it was told to queue it
        self._asked.add(number)
        if self._controller is not None and self._controller.poll() is None:
            self._controller.send_signal(number)

    def _outcome(self) -> int | None:
        """What the journal says of the run; None where it is not over."""
        ledger = Ledger()
        try:
            for term, entry in read_journal(self._paths.journal).entries:
                ledger.apply(term, entry)
        except JournalError as error:
            _say(str(error))
            return None
        if ledger.state == "released" and not ledger.generation_live:
            ended = [c for c in ledger.commands.values() if c.verb in ("stop", "stop-now") and c.state == "done"]
            return RULE_STOPPED if ended and ended[-1].author.startswith("watch rule") else STOPPED
        return {"finished": FINISHED, "failed": FAILED}.get(ledger.state)

    def _worth_it(self) -> bool:
        """Not where the time limit, which may be the partition's default, is over before a run can train."""
        try:
            limit = limit_seconds(time_limit(self._job))
            before = load_recipe(self._paths.recipe).cluster.sbatch.signal_seconds
        except (SlurmError, RecipeError):
            return True
        if limit is None or limit > before:
            return True
        way = "give [cluster.sbatch] time a longer limit, or signal_seconds a smaller number"
        _say(f"the job's time limit is {limit:.0f} s, and the run is to end {before} s before it: it is not queued again; {way}")
        return False

    def _queue_again(self) -> int:
        self._queued_again = True
        try:
            requeue(self._job)
            _say("the job is requeued")
            time.sleep(600)  # until Slurm ends this one
        except SlurmError as error:
            _say(f"the job cannot be requeued: {error}")
        try:
            job = submit(self._paths, load_recipe(self._paths.recipe))
            _say(f"the run goes on in the job {job.id}")
        except (SlurmError, RecipeError) as error:
            _say(f"nor can another be submitted: {error}; midwatch resume {self._paths.root} does")
            return FAILED
        return 0


def _say(text: str) -> None:
    write_error(f"{time.strftime('%Y-%m-%d %H:%M:%S')} midwatch: {text}")


def main() -> int:
    job, restarts = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_RESTART_COUNT", "0")
    if job is None:
        _say("this is for a batch job of Slurm's; start a run with: midwatch run RECIPE")
        return WRONG
    os.environ[BATCH_VARIABLE] = f"{job}.{restarts}"
    asked = next((w.removeprefix("resume=") for w in sys.argv[2:] if w.startswith("resume=")), "")
    if asked and restarts == "0":
        os.environ[RESUME_VARIABLE] = asked
    _say(f"job {job}, start {int(restarts) + 1}, on {os.environ.get('SLURM_JOB_NODELIST', '?')}")
    return Keeper(RunPaths(Path(sys.argv[1])), job).keep()


if __name__ == "__main__":
    sys.exit(main())
