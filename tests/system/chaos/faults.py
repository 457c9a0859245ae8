"""What can go wrong, each done to real processes, links and disks, and undone."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import psutil
from websockets.exceptions import WebSocketException
from websockets.sync.client import connect

from midwatch import protocol as p
from midwatch.journal.run_identity import run_id
from midwatch.run_directory import RunPaths, read_address
from midwatch.transport.tls_identity import CONTROLLER_NAME, RunKeys, client_context
from tests.system.harness import Run
from tests.system.hosts import Hosts


class Fault(NamedTuple):
    """Done for so long; `seconds` is nothing for what cannot be undone."""

    kind: str
    host: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.kind} on {self.host} for {self.seconds:.1f} s" if self.seconds else f"{self.kind} on {self.host}"


MILD = frozenset(
    {
        *("controller killed", "controller stopped", "agent stopped", "sshd killed", "slow link", "disk full", "clock", "scan"),
        *("journal errs", "journal full", "checkpoints away"),
        *("rank forged", "directory copied"),
    }
)
"""Faults through which the ranks train on, or only wait: none of them may cost a generation."""


class Theatre:
    """The run, its hosts, and the hands that hurt them."""

    def __init__(
        self, run: Run, hosts: Hosts, disk: Path | None = None, clock: Path | None = None, errors: Path | None = None
    ) -> None:
        """disk: what the run lies on. clock, errors: files that the libraries of `preload` read, loaded by the controller."""
        self.run, self.hosts, self.disk, self.clock = run, hosts, disk, clock
        self._acts: dict[str, tuple[Callable[[str], None], Callable[[str], None] | None]] = {
            "controller killed": (lambda _: self._controller(signal.SIGKILL), None),
            "controller stopped": (lambda _: self._controller(signal.SIGSTOP), lambda _: self._controller(signal.SIGCONT)),
            "agent killed": (lambda h: self._signal(h, "launcher.agent", signal.SIGKILL), None),
            "agent stopped": (
                lambda h: self._signal(h, "launcher.agent", signal.SIGSTOP),
                lambda h: self._signal(h, "launcher.agent", signal.SIGCONT),
            ),
            "rank killed": (lambda h: self._signal(h, "rank", signal.SIGKILL), None),
            "rank stopped": (
                lambda h: self._signal(h, "rank", signal.SIGSTOP),
                lambda h: self._signal(h, "rank", signal.SIGCONT),
            ),
            "fork server killed": (lambda h: self._signal(h, "rank-forks", signal.SIGKILL), None),
            "fork server stopped": (
                lambda h: self._signal(h, "rank-forks", signal.SIGSTOP),
                lambda h: self._signal(h, "rank-forks", signal.SIGCONT),
            ),
            "sshd killed": (self._kill_sshd, self._restart_sshd),
            "power lost": (self.hosts.kill, self.hosts.restart),
            "link cut": (lambda h: self.hosts.cut(h), self.hosts.mend),
            "link cut inwards": (lambda h: self.hosts.cut(h, "in"), self.hosts.mend),
            "link cut outwards": (lambda h: self.hosts.cut(h, "out"), self.hosts.mend),
            "slow link": (lambda h: self.hosts.delay(h, 500, 10), self.hosts.mend),
            "scan": (lambda _: self._scan(), None),
            "power lost everywhere": (lambda _: self._kill_all(), lambda _: self._restart_all()),
            "rank forged": (self._forge_rank, None),
            "directory copied": (lambda _: self._copy(), None),
            "directory moved": (lambda _: run.root.rename(self._moved), lambda _: self._move_back()),
        }
        if errors is not None:
            self._acts["journal errs"] = (lambda _: self._write(errors, errno.EIO), lambda _: self._write(errors, 0))
            self._acts["journal full"] = (lambda _: self._write(errors, errno.EDQUOT), lambda _: self._write(errors, 0))
        if disk is not None:
            self._acts["checkpoints away"] = (lambda _: self._cover(), lambda _: self._uncover())
            self._acts["disk full"] = (lambda _: self._fill(), lambda _: self._ballast.unlink(missing_ok=True))
        if clock is not None:
            self._acts["clock"] = (lambda _: clock.write_text("3600"), lambda _: clock.write_text("0"))

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(self._acts)

    def draw(self, dice: random.Random, kind: str | None = None) -> Fault:
        """A fault at random, or one of a kind, on a host that has ranks or on any."""
        kind = kind or dice.choice(self.kinds)
        undone = self._acts[kind][1] is not None
        return Fault(kind, dice.choice(self.hosts.names), dice.uniform(3.0, 8.0) if undone else 0.0)

    def draw_all(self, dice: random.Random, kinds: tuple[str | None, ...]) -> tuple[Fault, ...]:
        """One for each kind (None: any), no two of one kind: what is moved away cannot be moved away again."""
        faults: list[Fault] = []
        for kind in kinds:
            fault = self.draw(dice, kind)
            while fault.kind in {earlier.kind for earlier in faults}:
                fault = self.draw(dice)
            faults.append(fault)
        return tuple(faults)

    def inflict(self, fault: Fault) -> None:
        self._acts[fault.kind][0](fault.host)

    def undo(self, fault: Fault) -> None:
        undo = self._acts[fault.kind][1]
        if undo is not None:
            undo(fault.host)

    # Hands

    def _controller(self, number: signal.Signals) -> None:
        with contextlib.suppress(psutil.Error, AssertionError):
            self.run.controller().send_signal(number)

    def _signal(self, host: str, what: str, number: signal.Signals) -> None:
        here = set(self.hosts.pids(host))
        found = {"rank": self.run.ranks, "rank-forks": self.run.forks, "launcher.agent": self.run.agents}[what]()
        for process in found:
            if process.pid in here:
                with contextlib.suppress(psutil.Error):
                    process.send_signal(number)

    def _kill_all(self) -> None:
        self._controller(signal.SIGKILL)
        for host in self.hosts.names:
            self.hosts.kill(host)

    def _restart_all(self) -> None:
        for host in self.hosts.names:
            self.hosts.restart(host)

    @staticmethod
    def _write(file: Path, number: int) -> None:
        file.write_text(str(number))

    def _cover(self) -> None:
        """The volume of the checkpoints is not mounted: an empty directory is there in its place."""
        assert self.disk is not None
        empty = self.disk / f"empty-{self.run.root.name}"
        shutil.rmtree(empty, ignore_errors=True)
        empty.mkdir()
        subprocess.run(["mount", "--bind", str(empty), str(self.run.root / "checkpoints")], check=True)

    def _uncover(self) -> None:
        root = self.run.root if self.run.root.exists() else self._moved
        subprocess.run(["umount", "-l", str(root / "checkpoints")], check=True)

    def _kill_sshd(self, host: str) -> None:
        for pid in self.hosts.pids(host):
            with contextlib.suppress(psutil.Error, OSError):
                if "sshd" in psutil.Process(pid).name():
                    os.kill(pid, signal.SIGKILL)

    def _restart_sshd(self, host: str) -> None:
        self.hosts.restart(host)

    @property
    def _ballast(self) -> Path:
        assert self.disk is not None
        return self.disk / "ballast"

    def _fill(self) -> None:
        with self._ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(65536))

    def _forge_rank(self, host: str) -> None:
        """A node that does not have rank 0 poses as it, to get its orders."""
        run, paths = self.run, RunPaths(self.run.root)
        ledger, address = run.ledger(), read_address(paths.address)
        if address is None or not address.remote or host == ledger.generation_nodes[0]:
            return
        context = client_context(RunKeys.ensure(paths).issue("agent", host))
        generation = ledger.generation
        hello = p.RankHello(version=p.VERSION, run=run_id(paths), generation=generation, term=ledger.term, pid=1, world=2)
        with (
            contextlib.suppress(OSError, WebSocketException),
            connect(address.remote, ssl=context, server_hostname=CONTROLLER_NAME, proxy=None, open_timeout=20) as forged,
        ):
            forged.send(p.encode(hello))
            answer = p.decode(forged.recv(timeout=20))
            if not isinstance(answer, p.Refused):
                raise AssertionError(f"a key of {host} spoke as rank 0 of {ledger.generation_nodes[0]}: {answer}")

    def _copy(self) -> None:
        """The run directory is copied, and the copy is told to stop."""
        copy = self.run.root.with_name(f"{self.run.root.name}-copy")
        subprocess.run(["cp", "-r", str(self.run.root), str(copy)], check=False, capture_output=True)  # files come and go
        try:
            done = self.run.midwatch("pause", str(copy), timeout=90)
            assert done.returncode != 0 and "done" not in done.stdout, f"a copy steered the original: {done.stdout}"
        finally:
            shutil.rmtree(copy, ignore_errors=True)

    @property
    def _moved(self) -> Path:
        return self.run.root.with_name(f"{self.run.root.name}-moved")

    def _move_back(self) -> None:
        assert not self.run.root.exists(), f"somebody made the directory again: {list(self.run.root.rglob('*'))}"
        self._moved.rename(self.run.root)

    def _scan(self) -> None:
        """Strangers at the controller's port: connects, garbage, half a handshake."""
        address = read_address(self.run.root / "control" / "address")
        if address is None or not address.remote:
            return
        place = urlsplit(address.remote)
        for number in range(40):
            with contextlib.suppress(OSError), socket.create_connection((place.hostname or "", place.port or 0), 2) as wire:
                wire.sendall((b"", b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", os.urandom(4000))[number % 4])
                time.sleep(0.005)
