"""The PBS backend: an agent on each node of a job of OpenPBS or PBS Professional, in a task that `pbs_tmrsh` starts.

The run is started inside the job, in its script or in an interactive job (`qsub -I`). PBS names the job's nodes in the file that
PBS_NODEFILE names, one line for each MPI process. `pbs_tmrsh HOST COMMAND` runs a command on one of them as a task of the job and
ends with its status; unlike rsh it hands on neither input nor output, which is the job's (pbs_tmrsh(8)). So an agent reads its key
from a file of the run directory and writes who it is to another. The file with the key is deleted when the agent has begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import subprocess
import threading
import time
from pathlib import Path

from launcher.backends.base import Started, StartError, started
from midwatch.journal import entries as j
from midwatch.recipe import Cluster
from midwatch.run_directory import RunPaths
from midwatch.signals import SHELL_TRAP
from midwatch.transport.ssh import remote_command
from midwatch.transport.tls_identity import RunKeys

START_SECONDS = 300.0
"""That an agent has to begin."""
POLL_SECONDS = 0.1


class PbsBackend:
    """Agents on the nodes of the job that the controller is in; of none outside a job."""

    def __init__(self, paths: RunPaths, cluster: Cluster) -> None:
        self._paths, self._cluster = paths, cluster
        self._tasks: dict[str, tuple[Started, subprocess.Popen[bytes]]] = {}
        self._nodes, problem = _nodes()
        self.patience = START_SECONDS if self._nodes else 0.0
        self.lacking = "" if self._nodes else f"{problem} (start or resume the run inside a PBS job, by a script or qsub -I)"

    @property
    def nodes(self) -> tuple[str, ...]:
        return self._nodes

    async def start(self, node: str) -> Started:
        identity = RunKeys.ensure(self._paths).issue("agent", node)
        unwanted = threading.Event()
        try:
            return await asyncio.to_thread(self._start, node, identity.encode() + b"\n", unwanted)
        finally:
            unwanted.set()  # where this was cancelled the thread must not go on

    def alive(self, agent: j.AgentStarted) -> bool | None:
        known = self._tasks.get(agent.node)
        if known is None or known[0][:2] != (agent.pid, agent.birth):
            return None
        return known[1].poll() is None

    def _start(self, node: str, key: bytes, unwanted: threading.Event) -> Started:
        logs = self._paths.logs.resolve() / node
        said, errors, secret = logs / "pbs.out", logs / "pbs.log", logs / "pbs.key"
        words = ["-P", "-m", "launcher.agent", str(self._paths.root.resolve()), "--node", node, "--step"]
        files = f"exec <{shlex.quote(str(secret))} >{shlex.quote(str(said))} 2>>{shlex.quote(str(errors))}"
        script = f"{SHELL_TRAP}\n{files}\n{remote_command(self._cluster, words)}"
        task: subprocess.Popen[bytes] | None = None
        try:
            logs.mkdir(exist_ok=True)
            said.unlink(missing_ok=True)
            before = errors.stat().st_size if errors.exists() else 0
            with os.fdopen(os.open(secret, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
                file.write(key)
            with errors.open("ab") as log:
                task = subprocess.Popen(
                    ["pbs_tmrsh", node, "/bin/sh", "-c", script],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    cwd="/",
                )
            text = _first_words(said, task, unwanted)
            agent = started(node, task.poll() or 0, text, errors.read_bytes()[before:].decode(errors="replace"))
        except OSError as error:
            _end(task)
            raise StartError(f"{node}: pbs_tmrsh cannot be started: {error.strerror or error} (is PBS's bin on PATH?)") from None
        except BaseException:
            _end(task)
            raise
        finally:
            secret.unlink(missing_ok=True)
        # One that has named another's agent ends at once and tells nothing of that agent's end.
        with contextlib.suppress(subprocess.TimeoutExpired):
            task.wait(0.5)
        if task.returncode is None:
            self._tasks[node] = (agent, task)
        return agent


def _first_words(said: Path, task: subprocess.Popen[bytes], unwanted: threading.Event) -> str:
    """What the agent has written once it has named itself, or once its task has ended or time is up."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        over = task.poll() is not None or time.monotonic() > deadline or unwanted.is_set()
        with contextlib.suppress(OSError):
            text = said.read_bytes()
            if (b'"birth"' in text and text.endswith(b"\n")) or over:
                return text.decode(errors="replace")
        if over:
            return ""
        time.sleep(POLL_SECONDS)


def _end(task: subprocess.Popen[bytes] | None) -> None:
    if task is not None:
        task.kill()
        task.wait()


def _nodes() -> tuple[tuple[str, ...], str]:
    """The job's nodes, each once, in PBS's order; or none, and why."""
    file = os.environ.get("PBS_NODEFILE", "")
    if not file:
        return (), "this is no PBS job: PBS_NODEFILE is not set"
    try:
        lines = Path(file).read_text(errors="replace").split()
    except OSError as error:
        return (), f"PBS_NODEFILE, {file}, cannot be read: {error.strerror or error}"
    return tuple(dict.fromkeys(lines)), f"PBS_NODEFILE, {file}, names no node"
