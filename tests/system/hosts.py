"""Hosts on one machine: a network namespace each, with a name, an address and an sshd of its own, joined by a switch.

They share this machine's files and clock, as nodes of a cluster share storage; HOME and XDG_RUNTIME_DIR are a host's own. The
machine itself is on the same switch, at `hosts.gateway`. What a host can suffer: `kill`, `restart`, `cut`, `delay`, `mend`, `hide`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, Self

import pytest

from tests.system.namespaces import ip, ip_exec, kill_all, missing, pids, sweep
from tests.system.sshd import configure

SLOW_LINK = Path(__file__).with_name("slow_link.py")


def require() -> None:
    """Skips the test where this machine cannot have hosts, saying what it lacks."""
    if lacking := missing():
        pytest.skip(lacking)


class Hosts:
    """The hosts of these names, from `with` to its end; keys and logs lie in the directory, which is the caller's to remove."""

    def __init__(self, names: Iterable[str], directory: Path) -> None:
        self.names = tuple(names)
        self.directory = directory.absolute()
        self.config = self.directory / "ssh_config"
        """For `ssh -F`; in a recipe: `ssh_options = ["-F", FILE]`."""
        self._listened: dict[str, int] = {}
        """Times that a host's sshd had begun to listen before the one that runs now."""
        self._sshd: dict[str, subprocess.Popen[bytes]] = {}
        self._slow: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        # An abstract socket is a lock that the kernel lets go of however we end; what a killed owner left is swept away.
        self._lock = socket.socket(socket.AF_UNIX)
        for number in range(256):
            with contextlib.suppress(OSError):
                self._lock.bind(f"\0midwatch-test-hosts-{number}")
                break
        else:
            raise RuntimeError("256 sets of hosts are in use at once")
        self.prefix, self._network = f"mw{number}", f"10.77.{number}"
        sweep(self.prefix)
        atexit.register(self.close)
        try:
            self._short = Path(tempfile.mkdtemp(prefix=f"{self.prefix}-", dir="/tmp"))  # a socket's path must be short
            self._connect()
            self._configure()
            for name in self.names:
                self._start_sshd(name)
            for name in self.names:
                self._await_sshd(name)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends every process on the hosts and takes them away; harmless when done already."""
        atexit.unregister(self.close)
        for process in self._slow.values():
            process.kill()
        sweep(self.prefix)
        for process in (*self._slow.values(), *self._sshd.values()):
            process.wait()
        if hasattr(self, "_short"):
            shutil.rmtree(self._short, ignore_errors=True)
        self._lock.close()

    # Where things are

    @property
    def gateway(self) -> str:
        """This machine's address on the switch."""
        return f"{self._network}.1"

    def address(self, host: str) -> str:
        return f"{self._network}.{10 + self.names.index(host)}"

    @property
    def options(self) -> tuple[str, ...]:
        """What makes ssh know the hosts."""
        return ("-F", str(self.config))

    def home(self, host: str) -> Path:
        return self._short / host / "home"

    def log(self, host: str) -> str:
        """What its sshd said."""
        return (self.directory / host / "sshd.log").read_text(errors="replace")

    # Doing

    def run(self, host: str, command: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """Runs shell text on a host, by ssh."""
        words = ["ssh", "-o", "BatchMode=yes", *self.options, "--", host, command]
        return subprocess.run(words, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)

    def inside(self, host: str, *words: str) -> list[str]:
        """The words that run a command as on that host, without ssh."""
        return ["nsenter", f"--target={self._sshd[host].pid}", "--mount", "--uts", "--net", "--", *words]

    def pids(self, host: str) -> list[int]:
        """Every process on the host, its sshd included."""
        return pids(self._space(host))

    # Hurting

    def kill(self, host: str) -> None:
        """The host loses power: its link goes down and every process dies."""
        self._in_switch(f"link set {self._port(host)} down")
        kill_all(self._space(host))
        self._sshd[host].wait()

    def restart(self, host: str) -> None:
        """The host comes back, with nothing running but sshd."""
        self._link_up(host)
        self._start_sshd(host)
        self._await_sshd(host)

    def cut(self, host: str, direction: Literal["both", "in", "out"] = "both") -> None:
        """Nothing gets through any more, in silence: to the host (`in`), from it (`out`), or its link is down (`both`)."""
        if direction == "both":
            self._in_switch(f"link set {self._port(host)} down")
        elif direction == "in":
            ip_exec(self._switch, "tc", "qdisc", "replace", "dev", self._port(host), "root", "pfifo", "limit", "0")
        else:
            ip_exec(self._space(host), "tc", "qdisc", "replace", "dev", "eth0", "root", "pfifo", "limit", "0")

    def delay(self, host: str, ms: float, loss_percent: float = 0.0) -> None:
        """Each packet to and from the host takes this long, and some are lost."""
        # Not netem, which many kernels lack: a process that carries the packets between the host's link and the switch.
        self._hasten(host)
        port, slow = self._port(host), f"s{self.names.index(host)}"
        self._in_switch(
            f"link set {port} nomaster",
            f"link add {slow} type veth peer name {slow}b",
            f"link set {slow}b master br0",
            f"link set {slow}b up",
            f"link set {slow} up",
        )
        words = [sys.executable, "-P", str(SLOW_LINK), port, slow, str(ms), str(loss_percent)]
        process = subprocess.Popen(["ip", "netns", "exec", self._switch, *words], stdout=subprocess.PIPE)
        self._slow[host] = process
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"

    def mend(self, host: str) -> None:
        """Undoes `cut` and `delay`."""
        self._hasten(host)
        for space, device in ((self._switch, self._port(host)), (self._space(host), "eth0")):
            shown = ip_exec(space, "tc", "qdisc", "show", "dev", device)
            if "pfifo" in shown:
                ip_exec(space, "tc", "qdisc", "del", "dev", device, "root")
        self._link_up(host)

    def hide(self, host: str, path: Path) -> None:
        """Something else is mounted there on this host, so that it sees an empty directory."""
        subprocess.run(self.inside(host, "mount", "-t", "tmpfs", "none", str(path)), check=True)

    def show(self, host: str, path: Path) -> None:
        """Undoes `hide`."""
        subprocess.run(self.inside(host, "umount", str(path)), check=True)

    # Inside

    @property
    def _switch(self) -> str:
        return f"{self.prefix}-switch"

    def _space(self, host: str) -> str:
        return f"{self.prefix}-host-{host}"

    def _port(self, host: str) -> str:
        return f"p{self.names.index(host)}"

    def _in_switch(self, *lines: str) -> None:
        ip(*lines, space=self._switch)

    def _connect(self) -> None:
        # The switch has a namespace to itself, where no firewall of this machine filters what a bridge carries.
        ip(f"netns add {self._switch}", *(f"netns add {self._space(name)}" for name in self.names))
        self._in_switch(
            "link add br0 type bridge",
            "link set br0 up",
            f"link add uplink type veth peer name {self.prefix} netns {os.getpid()}",
            "link set uplink master br0",
            "link set uplink up",
        )
        # Everybody knows everybody's hardware address: asking for it would fail, and fail late, over a link cut one way.
        known = [(self.gateway, "02:77:00:00:00:01")]
        known += [(self.address(name), f"02:77:00:00:01:{i:02x}") for i, name in enumerate(self.names)]
        macs = dict(known)

        def settle(device: str, address: str, space: str | None = None) -> None:
            others = [f"neigh add {a} lladdr {mac} dev {device} nud permanent" for a, mac in known if a != address]
            ip(f"link set {device} address {macs[address]}", f"addr add {address}/24 dev {device}", space=space)
            ip(f"link set {device} up", *others, space=space)

        settle(self.prefix, self.gateway)
        for name in self.names:
            port, space = self._port(name), self._space(name)
            self._in_switch(
                f"link add {port} type veth peer name eth0 netns {space}", f"link set {port} master br0", f"link set {port} up"
            )
            ip("link set lo up", space=space)
            settle("eth0", self.address(name), space)

    def _configure(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        client = ""
        for name in self.names:
            self.home(name).mkdir(parents=True)
            runtime = self._short / name / "run"
            runtime.mkdir(mode=0o700)
            client += configure(self.directory, name, self.address(name), HOME=self.home(name), XDG_RUNTIME_DIR=runtime)
        self.config.write_text(client)
        known_names = "".join(f"{self.address(name)} {name}\n" for name in self.names)
        (self.directory / "hosts").write_text(f"127.0.0.1 localhost\n{self.gateway} gateway\n{known_names}")

    def _start_sshd(self, name: str) -> None:
        mine = self.directory / name
        script = (
            f"hostname {shlex.quote(name)}; mount --bind {shlex.quote(str(self.directory / 'hosts'))} /etc/hosts; "
            f"exec /usr/sbin/sshd -D -e -f {shlex.quote(str(mine / 'sshd_config'))}"
        )
        words = [
            "ip",
            "netns",
            "exec",
            self._space(name),
            "unshare",
            "--uts",
            "--mount",
            "--propagation",
            "slave",
            "sh",
            "-c",
            script,
        ]
        with (mine / "sshd.log").open("ab") as out:
            self._listened[name] = self.log(name).count("Server listening")
            # What makes the controller's clock and disk fail is not for sshd, whose sandbox would end it.
            clean = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
            self._sshd[name] = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True, env=clean
            )

    def _await_sshd(self, name: str, timeout: float = 60) -> None:
        """Until the one that was started last listens; by its log, since the link may be cut meanwhile."""
        deadline = time.monotonic() + timeout
        while self._sshd[name].poll() is None and time.monotonic() < deadline:
            if self.log(name).count("Server listening") > self._listened[name]:
                return
            time.sleep(0.02)
        raise RuntimeError(f"the sshd of {name} does not listen:\n{self.log(name)}")

    def _link_up(self, host: str, timeout: float = 60) -> None:
        self._in_switch(f"link set {self._port(host)} up")
        port = f"/sys/class/net/{self._port(host)}"
        deadline = time.monotonic() + timeout  # the kernel may take a second to notice, on either side
        while time.monotonic() < deadline:
            files = [f"{port}/operstate"] if host in self._slow else [f"{port}/operstate", f"{port}/brport/state"]
            here = ip_exec(self._switch, "cat", *files).split()  # a slow link's port is not the switch's own
            if here == ["up", "3"][: len(files)] and ip_exec(self._space(host), "cat", "/sys/class/net/eth0/operstate") == "up\n":
                return
            time.sleep(0.01)

    def _hasten(self, host: str) -> None:
        process = self._slow.pop(host, None)
        if process is not None:
            process.kill()
            process.wait()
            self._in_switch(f"link del s{self.names.index(host)}", f"link set {self._port(host)} master br0")
