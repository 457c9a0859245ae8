"""The Slurm backend: an agent on each node of an allocation, in a step of its own that srun keeps.

Slurm ends what a step has left behind, so the agent stays in the foreground of its step and srun stays with it: in a session of its
own, with nothing that ties it to the controller, whose death ends neither. A controller that takes over starts a second step, in
which the agent finds the first and says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import subprocess
import threading
import time
from typing import NamedTuple

from launcher.backends import Started, StartError
from launcher.backends.slurm.jobs import (
    BATCH_VARIABLE,
    Job,
    SlurmError,
    nodes_of,
    own_allocation,
    read_job,
    standing,
    step,
    write_job,
)
from launcher.backends.ssh import started
from midwatch.journal import journal as j
from midwatch.recipe import Cluster
from midwatch.recipe.hosts import expand
from midwatch.run_directory import RunPaths
from midwatch.signals import SHELL_TRAP
from midwatch.transport.ssh import remote_command
from midwatch.transport.tls_identity import RunKeys

START_SECONDS = 900.0
"""That an agent has to begin: a container's image may have to be fetched first."""
MOST_SAID = 64 * 1024
"""Bytes that are read of what precedes an agent's word."""


class SrunStep(NamedTuple):
    """An agent's step, by the srun that keeps it."""

    agent: Started
    srun: subprocess.Popen[bytes]


class SlurmBackend:
    """Agents on the nodes of an allocation; of none, where the run's job is over or has not begun."""

    def __init__(self, paths: RunPaths, cluster: Cluster) -> None:
        self._paths, self._cluster = paths, cluster
        self._steps: dict[str, SrunStep] = {}
        self._job, self._nodes = self._find()
        self.patience = START_SECONDS if self._nodes else 0.0
        self.lacking = "" if self._nodes else f"there is no allocation (midwatch resume {paths.root} submits the run again)"

    def _find(self) -> tuple[str, tuple[str, ...]]:
        """The allocation and its nodes."""
        own, known = own_allocation(), read_job(self._paths)
        if own is not None and (known is None or known.id != own):
            write_job(self._paths, Job(own, submitted=BATCH_VARIABLE in os.environ))
        job = own or (known.id if known is not None else "")
        names = os.environ.get("SLURM_JOB_NODELIST", "") if own is not None else ""
        try:
            if job and not names and standing(job).runs:
                names = nodes_of(job)
            return job, expand((names,)) if names else ()
        except (SlurmError, ValueError):
            return job, ()

    @property
    def nodes(self) -> tuple[str, ...]:
        return self._nodes

    async def start(self, node: str) -> Started:
        identity = RunKeys.ensure(self._paths).issue("agent", node)
        words = ["-P", "-m", "launcher.agent", str(self._paths.root.resolve()), "--node", node, "--step"]
        command = [
            *step(self._job, node),
            *self._cluster.srun_args,
            "/bin/sh",
            "-c",
            f"{SHELL_TRAP}\n{remote_command(self._cluster, words)}",
        ]
        unwanted = threading.Event()
        try:
            return await asyncio.to_thread(self._start, node, command, identity.encode() + b"\n", unwanted)
        finally:
            unwanted.set()  # where this was cancelled the thread must not go on

    def _start(self, node: str, command: list[str], stdin: bytes, unwanted: threading.Event) -> Started:
        log = self._paths.logs / node / "srun.log"
        try:
            log.parent.mkdir(exist_ok=True)
            with log.open("ab") as errors:
                before = errors.tell()
                srun = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    start_new_session=True,
                    cwd="/",
                    env=_environment(),
                )
        except OSError as error:
            raise StartError(f"{node}: srun cannot be started: {error.strerror or error}") from None
        try:
            said = _first_words(srun, stdin, unwanted)
            agent = started(node, srun.poll() or 0, said, log.read_bytes()[before:].decode(errors="replace"))
        except BaseException:
            srun.kill()
            srun.wait()
            raise
        # One that has named another's agent ends at once and tells nothing of that agent's end.
        with contextlib.suppress(subprocess.TimeoutExpired):
            srun.wait(0.5)
        if srun.returncode is None:
            self._steps[node] = SrunStep(agent, srun)
        return agent

    def alive(self, agent: j.AgentStarted) -> bool | None:
        known = self._steps.get(agent.node)
        if known is None or known.agent[:2] != (agent.pid, agent.birth):
            return None
        return known.srun.poll() is None


def _environment() -> dict[str, str]:
    """What srun hands on to a step: all that there is, and a PATH where a job without an environment has none."""
    kept = {name: value for name, value in os.environ.items() if name not in ("SLURM_EXPORT_ENV", "SRUN_EXPORT_ENV")}
    return {"PATH": os.defpath, **kept}


def _first_words(srun: subprocess.Popen[bytes], stdin: bytes, unwanted: threading.Event) -> str:
    """What the agent says until it has named itself, or until it has ended or time is up."""
    assert srun.stdin is not None and srun.stdout is not None
    with contextlib.suppress(OSError):
        srun.stdin.write(stdin)
        srun.stdin.close()
    said = bytearray()
    deadline = time.monotonic() + START_SECONDS
    with srun.stdout:
        while time.monotonic() < deadline and len(said) < MOST_SAID and not unwanted.is_set():
            if not select.select([srun.stdout], [], [], 0.2)[0]:
                continue
            chunk = os.read(srun.stdout.fileno(), 4096)
            said += chunk
            if not chunk:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    srun.wait(5)
                break
            if b'"birth"' in said and said.endswith(b"\n"):
                break
    return said.decode(errors="replace")
