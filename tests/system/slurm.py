"""A real Slurm on hosts of one machine: its controller on `head`, a slurmd on each node, all gone when it ends.

Its nodes are hosts as any (`slurm.hosts.kill("n1")`); `slurm.run("srun", …)` runs a command on `head`.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import pytest

from tests.system.hosts import Hosts, require

HEAD = "head"

CONFIGURATION = """
ClusterName=midwatch
SlurmctldHost={head}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={directory}/munge.sock,cred_expire=5
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmctldLogFile={directory}/slurmctld.log
SlurmdPidFile={directory}/%n.pid
SlurmdLogFile={directory}/%n.log
SlurmdSpoolDir={directory}/spool-%n
ProctrackType=proctrack/pgid
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,bf_interval=5
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MailProg=/bin/true
{nodes}
PartitionName=all Nodes={names} Default=YES MaxTime=INFINITE State=UP
"""


def require_slurm() -> None:
    """Skips the test where this machine cannot have a Slurm, saying what it lacks."""
    require()
    lacking = [tool for tool in ("slurmctld", "slurmd", "srun", "munged") if shutil.which(tool) is None]
    if lacking:
        pytest.skip(f"{', '.join(lacking)} missing (packages slurm-wlm, munge)")


class Slurm:
    """A Slurm with these nodes, from `with` to its end; what hosts leave in the directory is the caller's to remove."""

    def __init__(self, nodes: Iterable[str], directory: Path, cpus: int = 4) -> None:
        self.nodes, self._cpus = tuple(nodes), cpus
        self.hosts = Hosts((HEAD, *self.nodes), directory)
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self.hosts.__enter__()
        try:
            self._place = Path(tempfile.mkdtemp(prefix=self.hosts.prefix + "-", dir="/tmp"))  # with the hosts it is swept away
            self._configure()
            self._munge()
            self._start(HEAD, "slurmctld", "-D", "-f", str(self.configuration))
            for node in self.nodes:
                self.start_node(node)
            self.wait_idle()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the daemons, the jobs and the hosts."""
        self.hosts.close()  # which kills all that runs on them, jobs included
        for daemon in self._daemons:
            daemon.wait()

    # Where things are

    @property
    def configuration(self) -> Path:
        return self._place / "slurm.conf"

    @property
    def environment(self) -> dict[str, str]:
        """What makes Slurm's commands find it, on its hosts."""
        return {"SLURM_CONF": str(self.configuration)}

    def logs(self) -> str:
        """What the daemons said last."""
        return "\n".join(f"--- {f.name}\n{f.read_text(errors='replace')[-3000:]}" for f in sorted(self._place.glob("*.log")))

    # Doing

    def run(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Runs a command on the head, as `slurm.run("srun", "-N2", "hostname")`."""
        inside = self.hosts.inside(HEAD, *words)
        environment = {**os.environ, **self.environment, "HOME": str(self.hosts.home(HEAD))}
        return subprocess.run(inside, env=environment, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)

    def start_node(self, node: str) -> None:
        """Starts a node's slurmd, also after the host was killed and restarted."""
        self._start(node, "slurmd", "-D", "-f", str(self.configuration), "-N", node)

    def wait_idle(self, timeout: float = 30) -> None:
        """Waits until every node is there with nothing to do."""
        self.wait_for("sinfo -h -N -o %T", " ".join(["idle"] * len(self.nodes)), timeout)

    def wait_for(self, command: str, answer: str, timeout: float = 30) -> None:
        """Asks until the answer is these words; `("squeue -h", "")` waits until no job is left."""
        deadline = time.monotonic() + timeout
        while (said := " ".join(self.run(*command.split()).stdout.split())) != answer:
            if time.monotonic() > deadline:
                raise RuntimeError(f"{command}: {said!r} and not {answer!r} after {timeout} s\n{self.logs()}")
            time.sleep(0.1)

    # Inside

    def _configure(self) -> None:
        names = ",".join(self.nodes)
        nodes = "\n".join(f"NodeName={n} NodeAddr={self.hosts.address(n)} CPUs={self._cpus} State=UNKNOWN" for n in self.nodes)
        text = CONFIGURATION.format(head=f"{HEAD}({self.hosts.address(HEAD)})", directory=self._place, nodes=nodes, names=names)
        self.configuration.write_text(text)
        # Hosts have no cgroups to themselves; a slurmd that looks for some does not start.
        version = subprocess.run(["slurmd", "-V"], capture_output=True, text=True, check=True).stdout.split()[-1]
        plugin = "disabled" if int(version.split(".")[0]) >= 23 else "cgroup/v1"
        (self._place / "cgroup.conf").write_text(f"CgroupPlugin={plugin}\n")
        (self._place / "state").mkdir()

    def _munge(self) -> None:
        """One munged for all: they share its socket as they share all files."""
        key = self._place / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        files = {"key-file": key, "socket": self._place / "munge.sock", "pid-file": self._place / "munged.pid"}
        files |= {"log-file": self._place / "munged.log", "seed-file": self._place / "munged.seed"}
        self._start(HEAD, "munged", "--foreground", "--force", *(f"--{name}={file}" for name, file in files.items()))
        deadline = time.monotonic() + 10
        while not files["socket"].exists():
            if time.monotonic() > deadline or self._daemons[-1].poll() is not None:
                raise RuntimeError(f"munged does not start\n{self.logs()}")
            time.sleep(0.02)

    def _start(self, host: str, *words: str) -> None:
        with (self._place / f"{words[0]}-{host}-out.log").open("ab") as out:
            inside = self.hosts.inside(host, *words)
            self._daemons.append(subprocess.Popen(inside, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True))
