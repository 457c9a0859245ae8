"""Slurm as a run needs it: the batch script, its submission, how the job stands, and queueing it again or taking it back.

A run that was submitted remembers its job in RUN/control/job. One that lives inside an allocation that somebody else has made, by
`salloc` or `sbatch`, remembers that one, and does nothing to it.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec

from midwatch.directory_identity import DirectoryId
from midwatch.recipe import Recipe
from midwatch.run_directory import PUBLIC_FILE, RunPaths, host_name, read_address, write_atomically
from midwatch.transport.discovery import Looks
from midwatch.transport.ssh_url import RemoteRun
from shards.common.decoding import DecodeError, json_as

ASK_SECONDS = 30.0
"""That Slurm's commands have; a controller that is busy answers late."""
BATCH_VARIABLE = "MIDWATCH_BATCH"
"""In the environment of a controller in a batch job of its own: `JOB.RESTARTS`."""
RESUME_VARIABLE = "MIDWATCH_RESUME"
"""Who has asked, by submitting the job, that the run go on; empty: nobody."""

_OVER = {
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
    "REVOKED",
}
_STUCK = {
    "JobHeldUser": "it is held; scontrol release JOB lets it start",
    "JobHeldAdmin": "an administrator holds it",
    "job requeued in held state": "it is held after it was queued again; scontrol release JOB lets it start",
    "launch failed requeued held": "it is held after a failed launch; scontrol release JOB lets it start",
    "BadConstraints": "no node meets its requirements",
    "DependencyNeverSatisfied": "a dependency has failed",
    "PartitionTimeLimit": "its time limit is above the partition's",
    "PartitionNodeLimit": "it asks for more nodes than the partition gives",
}
"""Reasons for which a job that waits is not started until somebody does something, and what."""
_RUNS = {"RUNNING", "SUSPENDED", "STOPPED"}


class SlurmError(Exception):
    """Slurm refuses or does not answer; the message holds its own words."""


class Job(msgspec.Struct, frozen=True):
    """The job that a run lives in, or lived in last."""

    id: str
    submitted: bool = True
    """By Midwatch; else somebody else made the allocation."""
    directory: DirectoryId | None = None
    """The run directory that it is the job of; filled in when it is written."""


class JobState(msgspec.Struct, frozen=True):
    """How a job stands."""

    state: str
    """In Slurm's word, as PENDING."""
    reason: str = ""
    start: str = ""
    """When it began, or is expected to; empty where Slurm cannot say."""

    @property
    def over(self) -> bool:
        return self.state in _OVER

    @property
    def runs(self) -> bool:
        return self.state in _RUNS

    def __str__(self) -> str:
        told = self.state.lower()
        if self.state == "PENDING":
            told += f" ({self.reason})" if self.reason not in ("", "None") else ""
            if (way := next((way for reason, way in _STUCK.items() if self.reason.startswith(reason)), None)) is not None:
                told += f", and does not start by itself: {way}"
            elif self.start:
                told += f", expected to start {self.start.replace('T', ' ')}"
        return told


def own_allocation() -> str | None:
    """The job that this process runs in."""
    return os.environ.get("SLURM_JOB_ID") or None


# What a run remembers


def read_job(paths: RunPaths) -> Job | None:
    """The job of this directory; that of a run which this one was copied from is not."""
    try:
        job = json_as(paths.job.read_bytes(), Job)
        return job if job.directory is None or job.directory.same(DirectoryId.of(paths.root)) else None
    except (OSError, DecodeError):
        return None


def write_job(paths: RunPaths, job: Job) -> None:
    job = msgspec.structs.replace(job, directory=DirectoryId.of(paths.root))
    if read_job(paths) != job:
        write_atomically(paths.job, msgspec.json.encode(job), mode=PUBLIC_FILE)


# Asking Slurm


def submit(paths: RunPaths, recipe: Recipe, *, resume: str = "") -> Job:
    """Writes the script and hands it to sbatch; `resume` names who asks that a run that was stopped go on. Raises SlurmError."""
    paths.logs.mkdir(exist_ok=True)
    write_atomically(paths.batch_script, script(paths.root.resolve(), recipe).encode())  # its lines may hold secrets
    said = _ask("sbatch", "--parsable", str(paths.batch_script), *([f"resume={resume}"] if resume else []))
    job = Job(said.split()[-1].partition(";")[0] if said.split() else "")
    if not job.id.isdigit():
        raise SlurmError(f"sbatch says {said.strip()[:200]!r}, and that is no job")
    write_job(paths, job)
    return job


def standing(job: str) -> JobState:
    """How the job stands; one that Slurm has forgotten is COMPLETED. Raises SlurmError where Slurm cannot be asked."""
    try:
        said = _ask("squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T|%r|%S").strip()
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return JobState("COMPLETED")
        raise
    parts = said.splitlines()[0].split("|") if said else []
    if len(parts) != 3:
        return JobState("COMPLETED")
    return JobState(parts[0], parts[1], "" if parts[2] in ("N/A", "Unknown") else parts[2])


def nodes_of(job: str) -> str:
    """The nodes of an allocation, as Slurm writes them: `gpu-[01-16]`. Raises SlurmError."""
    return _ask("squeue", "--noheader", f"--jobs={job}", "--format=%N").strip()


def time_limit(job: str) -> str:
    """A job's time limit as Slurm writes it. Raises SlurmError."""
    return _ask("squeue", "--noheader", f"--jobs={job}", "--format=%l").strip()


def requeue(job: str) -> None:
    """Has the job end and be queued again under the same number. Raises SlurmError."""
    _ask("scontrol", "requeue", job)


def cancel(job: str) -> None:
    """Raises SlurmError."""
    _ask("scancel", job)


def _ask(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ASK_SECONDS, stdin=subprocess.DEVNULL)
    except FileNotFoundError:
        raise SlurmError(f"there is no {words[0]} on this machine's PATH (log in where Slurm's commands are)") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{words[0]} has not ended after {ASK_SECONDS:g} s; is slurmctld up? (scontrol ping)") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        said = lines[-1].strip().removeprefix(f"{words[0]}: ").removeprefix("error: ") if lines else f"status {done.returncode}"
        raise SlurmError(f"{words[0]}: {said}")
    return done.stdout


# The batch script


def script(root: Path, recipe: Recipe) -> str:
    """The batch job of a run: Slurm's options, the recipe's setup lines, and the keeper of the controller."""
    cluster, sbatch = recipe.cluster, recipe.cluster.sbatch
    low, high = recipe.fewest_nodes, recipe.most_nodes
    options = [
        f"--job-name={recipe.run.name}",
        f"--nodes={low}" if low == high else f"--nodes={low}-{high}",
        f"--cpus-per-task={cluster.ranks_per_node * cluster.threads}",
        "--requeue",
        "--no-kill",  # the loss of a node must not take the others'
        "--open-mode=append",
        f"--output={str(root / 'logs' / 'slurm.log').replace('%', '%%')}",
        f"--signal=B:USR1@{sbatch.signal_seconds}",
    ]
    options += [f"--{key}={value}" for key in ("partition", "account", "time") if (value := getattr(sbatch, key)) is not None]
    lines = [f"#SBATCH {_quoted(option)}" for option in options]
    lines += [f"#SBATCH {line.removeprefix('#SBATCH').strip()}" for line in sbatch.lines]  # as the operator wrote them
    keeper = shlex.join([sys.executable, "-P", "-m", "launcher.backends.slurm.batch_main", str(root)])
    head = "# The batch job of a Midwatch run, written anew by each `midwatch run` and `midwatch resume`."
    return "\n".join(["#!/bin/sh", head, *lines, *cluster.setup, f'exec {keeper} "$@"', ""])


def _quoted(option: str) -> str:
    """As sbatch reads it in a script: it knows double quotes and no escapes that can be relied on."""
    if any(c in option for c in '"\n\\'):
        raise SlurmError(f"sbatch cannot be told {option!r}: it holds a quote, a backslash or a line's end")
    key, equals, value = option.partition("=")
    return f"{key}={value}" if equals and not set(value) & set(" '#;\t") else f'{key}="{value}"' if equals else key


# The way there


@dataclass(frozen=True)
class SlurmRun(RemoteRun):
    """A run whose controller is in a batch job: reached by a step of that job, so that nobody need log in to its nodes."""

    job: str = ""

    @property
    def root(self) -> Path:
        return Path(self.run)

    def __str__(self) -> str:
        return f"{self.run} (Slurm job {self.job})"

    def command(self, *, prompts: bool, looks: Looks = "never") -> list[str]:
        """`midwatch relay` here, which finds out where the job is: after it was queued again that is another place."""
        return [sys.executable, "-P", "-m", "midwatch", "relay", self.run]


def elsewhere(root: Path) -> SlurmRun | None:
    """The run as one in a batch job, where it has one that waits or runs and this machine is not where its controller is."""
    paths = RunPaths(root)
    job = read_job(paths)
    if job is None or not job.submitted:
        return None
    address = read_address(paths.address)
    with contextlib.suppress(SlurmError):
        if standing(job.id).over or (address is not None and address.host == host_name() and own_allocation() == job.id):
            return None
    return SlurmRun(f"job {job.id}", None, str(root.resolve()), job.id)


def relay_step(run: SlurmRun) -> list[str]:
    """What connects with the controller, to be executed where Slurm's commands are. Raises SlurmError where there is none yet."""
    now = standing(run.job)
    if now.over:
        raise SlurmError(f"the job has ended ({now.state.lower()}); midwatch resume {run.root} submits the run again")
    address = read_address(RunPaths(run.root).address)
    if not now.runs or address is None:
        raise SlurmError(f"it is {now}; it takes commands when it runs" if not now.runs else "its controller is still starting")
    unbuffered = "--unbuffered"  # else srun keeps what comes until a line is full
    return [*step(run.job, address.host), unbuffered, sys.executable, "-P", "-m", "midwatch", "relay", run.run]


def step(job: str, node: str) -> list[str]:
    """The beginning of a command that runs one process on a node of a job, whatever else runs there, and leaves the job alone."""
    words = ["srun", "--quiet", f"--jobid={job}", "--overlap", f"--nodelist={node}", "--nodes=1", "--ntasks=1", "--cpu-bind=none"]
    # Whatever `--export` the job was made with, a step needs what this process has: PATH, the modules that are loaded.
    return [*words, "--export=ALL", "--no-kill", "--kill-on-bad-exit=0", "--immediate=20"]
