"""Runs that go through Slurm's queue: submitted by `midwatch run` and `midwatch resume`, waited for, and taken back."""

from __future__ import annotations

import argparse
import contextlib
import signal
import time
from pathlib import Path

from launcher.backends.slurm.jobs import (
    JobState,
    SlurmError,
    SlurmRun,
    cancel,
    elsewhere,
    own_allocation,
    read_job,
    standing,
    submit,
)
from launcher.cli.runs import find_run, line_of, read_ledger
from midwatch.recipe import RecipeError, load_recipe
from midwatch.run_directory import RunPaths, read_address, shows_life
from midwatch.signals import EndingSignals
from midwatch.transport.access import own_name
from midwatch.transport.discovery import ClientError
from shards.common.terminal import OutputError, discard_out, reader_is_gone, write_error, write_json, write_out

POLL_SECONDS = 2.0
"""Between two questions to Slurm while a job waits: its controller has other work."""
FAILED, STOPPED = 1, 4


def needs_job(paths: RunPaths) -> bool:
    """Whether the run is Slurm's and there is no allocation yet."""
    return load_recipe(paths.recipe).cluster.backend == "slurm" and own_allocation() is None


def submit_run(paths: RunPaths) -> SlurmRun:
    """Raises RecipeError, and leaves no run behind, where Slurm does not take it."""
    try:
        job = submit(paths, load_recipe(paths.recipe))
    except SlurmError as error:
        _unmake(paths)
        raise RecipeError(f"the run cannot be submitted: {error}") from None
    write_error(f"midwatch: submitted as job {job.id}")
    return SlurmRun(f"job {job.id}", None, str(paths.root.resolve()), job.id)


def _unmake(paths: RunPaths) -> None:
    """Takes away a run directory in which nothing has happened yet."""
    for file in (paths.recipe, paths.record, paths.batch_script):
        file.unlink(missing_ok=True)
    for directory in (*paths.directories, paths.root):
        with contextlib.suppress(OSError):
            directory.rmdir()


def wait_in_queue(run: SlurmRun, *, as_json: bool, signals: EndingSignals | None = None) -> int | None:
    """Shows the queue until the controller is there; an exit status where it is not to come. Raises ClientError.

    signals: of a caller that owns the run; each takes the job back. Else only SIGTERM and SIGINT end the wait, and the job stays.
    """
    if signals is not None:
        with signals.interrupting():
            return _wait_in_queue(run, as_json, owns=True)
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _wait_in_queue(run, as_json, owns=False)
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_in_queue(run: SlurmRun, as_json: bool, owns: bool) -> int | None:
    term = _term(run.root)  # that of the job before, where there was one
    told = ""
    try:
        while True:
            now = _standing(run)
            if now.over:
                log = RunPaths(run.root).logs / "slurm.log"
                write_error(f"midwatch: the job {run.job} has ended ({now}); see {log}")
                return FAILED
            if now.runs and (_term(run.root) > term or shows_life(RunPaths(run.root))):
                return None
            gone = owns and reader_is_gone()
            if str(now) != told and not gone:
                told = str(now)
                try:
                    _tell(run, now, as_json)
                except OutputError as error:
                    if not owns:
                        raise
                    gone = error.reader_is_gone  # a full disk takes no job back
            if gone:
                discard_out()
                write_error("midwatch: nobody reads standard output any more")
                _cancel(run)
                return STOPPED
            time.sleep(0.3 if now.runs else POLL_SECONDS)
    except KeyboardInterrupt:
        if owns:
            _cancel(run)
        else:
            ways = f"midwatch attach {run.root} waits for it, midwatch stop {run.root} takes it back"
            write_error(f"\nmidwatch: job {run.job} stays queued: {ways}")
        return STOPPED


def ask_queue(arguments: argparse.Namespace) -> int | None:
    """What `stop`, `resume` and `status` are for a run whose job waits or is over; None where they are for its controller."""
    if (arguments.run or "").startswith("ssh://"):
        return None
    root = find_run(arguments.run)
    job = read_job(RunPaths(root))
    if job is None or not job.submitted or own_allocation() == job.id:
        return None
    run = elsewhere(root)
    if run is None:
        return _resubmit(root) if arguments.command == "resume" else None
    now = _standing(run)
    if now.runs:
        return None
    if arguments.command == "stop":
        _cancel(run)
        return 0
    if arguments.command == "status":
        ledger, line = read_ledger(root), line_of(root)
        stage = ledger.borders[-1].stage if ledger.borders else ""
        said = {"run": root.name, "state": line.state, "step": line.step, "stage": stage, "job": run.job, "queue": str(now)}
        if arguments.json:
            write_json(said | {"archived": True})
        else:
            write_out(f"{root.name}: job {run.job} is {now}")
        return 0
    raise ClientError(f"job {run.job} is {now}; the run continues when it begins")


def _resubmit(root: Path) -> int | None:
    paths = RunPaths(root)
    if read_ledger(root).state == "finished":
        return None  # the controller says it best
    try:
        job = submit(paths, load_recipe(paths.recipe), resume=own_name())
    except SlurmError as error:
        raise ClientError(f"{root}: cannot be submitted: {error}") from None
    write_out(f"resume: submitted as job {job.id} (midwatch attach {root} waits for it)")
    return 0


def _standing(run: SlurmRun) -> JobState:
    try:
        return standing(run.job)
    except SlurmError as error:
        raise ClientError(str(error)) from None


def _cancel(run: SlurmRun) -> None:
    try:
        cancel(run.job)
    except SlurmError as error:
        raise ClientError(str(error)) from None
    write_error(f"midwatch: job {run.job} is taken back; midwatch resume {run.root} submits it again")


def _tell(run: SlurmRun, now: JobState, as_json: bool) -> None:
    if as_json:
        write_json({"queue": {"job": run.job, "state": now.state, "reason": now.reason, "start": now.start}}, flush=True)
    else:
        write_out(f"job {run.job} is {now}", flush=True)


def _term(root: Path) -> int:
    address = read_address(RunPaths(root).address)
    return address.term if address is not None else 0


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt
