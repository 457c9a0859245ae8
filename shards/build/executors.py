"""Steps on a cluster, by datatrove's executors: Slurm's job arrays, or Ray's tasks, over a directory that all nodes see.

The head waits for files, not for jobs' words: a task is done when its file is there. What jobs did not finish, because
their time or their node ended, is sent again, as long as something gets done.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from shards.build.workspace import Work
from shards.common.errors import ShardError, SpecError
from shards.spec import Build

LOOK = 1.0  # seconds between looks at what is done


@dataclass
class TaskShare:
    """A rank's part of a step's tasks, as datatrove calls it: every `world_size`th."""

    build: bytes
    key: str
    step: str
    tasks: list[Any]
    said: Path  # where a rank writes why it ended, since libraries tell it their own ways or not at all

    def __call__(self, data: Any, rank: int, world_size: int) -> None:
        from shards.build.steps import STEPS, do

        work = Work(msgspec.json.decode(self.build, type=Build), self.key)
        for task in self.tasks[rank::world_size]:
            if not STEPS[self.step].output(work, task).exists():
                try:
                    do(self.build, self.key, self.step, task)
                except Exception as error:
                    self.said.mkdir(parents=True, exist_ok=True)
                    (self.said / f"{rank:05d}.txt").write_text(str(error) or type(error).__name__)
                    raise


def run_elsewhere(step: Any, work: Work, waiting: list[Any]) -> Iterator[Any]:
    """Yields tasks as they are done. Raises ShardError where a round of jobs ends and nothing was done."""
    attempt = 0
    while waiting:
        logs = work.root / "jobs" / f"{step.name}-{int(time.time() * 1000)}-{attempt}"
        tasks = min(work.build.data.executor_tasks, len(waiting))
        share = TaskShare(msgspec.json.encode(work.build), work.key, step.name, list(waiting), logs / "said")
        jobs = _Slurm(share, tasks, logs, work) if work.build.data.executor == "slurm" else _InThread(share, tasks, logs, work)
        before = len(waiting)
        try:
            while waiting:
                alive = jobs.alive()  # asked first: what ends after the question is looked at once more
                done = [task for task in waiting if step.output(work, task).exists()]
                yield from done
                waiting = [task for task in waiting if task not in set(done)]
                if not alive:
                    break
                if waiting:
                    time.sleep(LOOK)
        finally:
            jobs.close()
        if len(waiting) == before:
            told = [path.read_text(errors="replace") for path in sorted(share.said.glob("*.txt"))]
            raise ShardError(
                f"{step.about}: the {work.build.data.executor} jobs ended and did nothing: {(told or [jobs.why()])[0]}"
                f" (their logs are in {logs}; the same command goes on)"
            )
        attempt += 1


def _datatrove() -> None:
    """Makes sure that it is there, and quiet."""
    try:
        from datatrove.utils.logging import logger
    except ImportError:
        raise SpecError("executor: slurm and ray need datatrove (pip install 'midwatch[executors]')") from None
    logger.remove()
    logging.getLogger("fsspec").setLevel(logging.WARNING)


def _nothing() -> None:
    pass


def _check_partition(name: str) -> None:
    try:
        done = subprocess.run(["sinfo", "-h", "-p", name, "-o", "%P"], capture_output=True, text=True)
    except OSError as error:
        raise SpecError(f"executor slurm: sinfo: {error.strerror} (build where Slurm's commands are)") from None
    if done.returncode:
        raise ShardError(f"executor slurm: sinfo says: {done.stderr.strip()} (see that Slurm's controller answers)")
    if not done.stdout.strip():
        known = subprocess.run(["sinfo", "-h", "-o", "%R"], capture_output=True, text=True).stdout.split()
        raise SpecError(
            f'executor slurm: there is no partition "{name}" (there are: {", ".join(known)}; set [data.slurm] partition)'
        )


class _Slurm:
    """Job arrays, and whether any of them is still queued or running."""

    def __init__(self, share: TaskShare, tasks: int, logs: Path, work: Work) -> None:
        _datatrove()
        from datatrove.executor.slurm import SlurmPipelineExecutor

        slurm = work.build.data.slurm
        _check_partition(slurm.partition)
        self._logs = logs
        self._name = f"midwatch-{share.step}-{logs.name.rsplit('-', 2)[1]}"
        executor = SlurmPipelineExecutor(
            pipeline=[share],
            tasks=tasks,
            time=slurm.time,
            partition=slurm.partition,
            cpus_per_task=1,
            mem_per_cpu_gb=slurm.memory_gb,
            job_name=self._name,
            qos=slurm.qos,
            venv_path=str(Path(sys.prefix, "bin", "activate")),
            sbatch_args=dict(slurm.sbatch),
            logging_dir=str(logs),
            skip_completed=False,
            requeue=False,
        )
        executor.launch_merge_stats = _nothing  # a job more each step, for statistics that nobody reads
        try:
            executor.run()
        except (OSError, subprocess.CalledProcessError) as error:
            raise ShardError(f"executor slurm: the jobs could not be sent: {error} (see sinfo, and [data.slurm])") from None

    def alive(self) -> bool:
        done = subprocess.run(["squeue", "-h", "-n", self._name, "-o", "%i"], capture_output=True, text=True)
        return done.returncode != 0 or bool(done.stdout.strip())  # a silent controller says nothing of the jobs

    def why(self) -> str:
        said = [
            line for path in sorted(self._logs.glob("slurm_logs/*.out")) for line in path.read_text(errors="replace").split("\n")
        ]
        errors = [line for line in said if "Error" in line or "error" in line]
        return (errors or said or ["no log was written"])[-1].strip()

    def close(self) -> None:
        subprocess.run(["scancel", "-n", self._name], capture_output=True)


class _InThread:
    """Ray's tasks, waited for by a thread named shards-executor."""

    def __init__(self, share: TaskShare, tasks: int, logs: Path, work: Work) -> None:
        _datatrove()
        try:
            import ray
            from datatrove.executor.ray import RayPipelineExecutor
        except ImportError:
            raise SpecError("executor ray needs ray (pip install 'midwatch[executors]')") from None
        if not ray.is_initialized():
            ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level=logging.ERROR)
        self._error = ""
        self._executor = RayPipelineExecutor(pipeline=[share], tasks=tasks, logging_dir=str(logs), skip_completed=False)
        self._thread = threading.Thread(target=self._run, name="shards-executor", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._executor.run()
        except Exception as error:  # whatever a cluster's library raises is told by whoever waits
            self._error = f"{type(error).__name__}: {error}"

    def alive(self) -> bool:
        return self._thread.is_alive()

    def why(self) -> str:
        return self._error or "no task said why"

    def close(self) -> None:
        self._thread.join(timeout=5)
