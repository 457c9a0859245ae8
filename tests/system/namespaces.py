"""Network namespaces, by the `ip` command: made, entered, emptied of processes and taken away."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path


def missing() -> str:
    """What this machine lacks for hosts of its own; empty where it lacks nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    tools = ("ip", "tc", "ssh", "ssh-keygen", "unshare", "nsenter", "/usr/sbin/sshd")
    lacking = [tool for tool in tools if shutil.which(tool) is None]
    if lacking:
        return f"{', '.join(lacking)} missing (packages iproute2, openssh-client, openssh-server, util-linux)"
    probe = f"mwprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return ""


def ip(*lines: str, space: str | None = None) -> None:
    """Runs lines of `ip`, in a namespace; a failure shows which."""
    words = ["ip", *(["-n", space] if space else []), "-batch", "-"]
    done = subprocess.run(words, input="\n".join(lines), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' ; '.join(lines)}: {done.stderr.strip()}")


def ip_exec(space: str, *words: str) -> str:
    return subprocess.run(["ip", "netns", "exec", space, *words], check=True, capture_output=True, text=True).stdout


def pids(space: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def kill_all(space: str, timeout: float = 10) -> None:
    """Kills every process there; again and again, since one may fork while the others die."""
    deadline = time.monotonic() + timeout
    while found := pids(space):
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise RuntimeError(f"{space}: processes {found} do not die")
        time.sleep(0.01)


def sweep(prefix: str) -> None:
    """Takes away the namespaces `PREFIX-…` with all that runs in them, the interface PREFIX and the directories /tmp/PREFIX-…."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for line in listed.splitlines():
        space = line.split()[0]
        if space.startswith(f"{prefix}-"):
            kill_all(space)
            ip(f"netns del {space}")
    subprocess.run(["ip", "link", "del", prefix], capture_output=True)
    for left in Path("/tmp").glob(f"{prefix}-*"):
        shutil.rmtree(left, ignore_errors=True)
