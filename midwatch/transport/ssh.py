"""Commands on other machines, by the operator's own OpenSSH client with their configuration, keys, agent and jump hosts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from typing import Literal

import msgspec

from midwatch.recipe import Cluster

MOST_AT_ONCE = 32
MOST_OUTPUT = 1 << 20
"""Bytes kept of each of a command's two outputs; what comes after is read and thrown away."""

SILENT = "it says nothing; is a login shell set for you there that runs commands, and not /bin/false?"

Why = Literal["client", "name", "refused", "unreachable", "lost", "timeout", "permission", "host-key", "command", "other"]


class SshError(Exception):
    """The command did not run, or its end was not seen; the message is one sentence, without the host in front."""

    def __init__(self, host: str, why: Why, message: str) -> None:
        super().__init__(message)
        self.host, self.why = host, why

    @property
    def out_of_reach(self) -> bool:
        """Whether the host may simply be down, so that trying again later makes sense."""
        return self.why in ("refused", "unreachable", "lost", "timeout")


class Result(msgspec.Struct, frozen=True):
    """What a command did."""

    status: int
    stdout: str
    stderr: str

    @property
    def last_words(self) -> str:
        """The last line of its errors, for a message."""
        return _last_line(self.stderr) or SILENT


class Ssh:
    """Runs commands on hosts, not too many at once."""

    def __init__(self, options: tuple[str, ...] = (), connect_seconds: int = 5) -> None:
        # ssh takes the first value that it is given, so what the operator wrote goes before what is only our preference.
        self._words = ["ssh", "-T", "-o", "BatchMode=yes", *options]
        for preference in (f"ConnectTimeout={connect_seconds}", "ServerAliveInterval=5", "ServerAliveCountMax=3"):
            self._words += ["-o", preference]
        self._places = asyncio.Semaphore(MOST_AT_ONCE)

    async def run(self, host: str, command: str, stdin: bytes = b"", timeout: float = 30) -> Result:
        """Runs shell text on a host and waits for its end, `timeout` seconds at most. Raises SshError."""
        async with self._places:
            if shutil.which("ssh") is None:
                raise SshError(host, "client", "there is no ssh on this machine's PATH (install OpenSSH's client)")
            conversation = _Conversation()
            try:
                status = await conversation.hold([*self._words, "--", host, command], stdin, timeout)
            except TimeoutError:
                said = _last_line(conversation.text(2))
                raise SshError(host, "timeout", f"no end after {timeout:g} s{f' ({said})' if said else ''}") from None
            except OSError as error:
                raise SshError(host, "client", f"ssh cannot be started: {error.strerror or error}") from None
        result = Result(status, conversation.text(1), conversation.text(2))
        problem = explain(host, result)
        if problem is not None:
            raise problem
        return result


class _Conversation(asyncio.SubprocessProtocol):
    """One ssh: what it is told, what is heard of it, and its end."""

    def __init__(self) -> None:
        self._heard = {1: bytearray(), 2: bytearray()}
        self._open = {1, 2}
        self._ended, self._silent = asyncio.Event(), asyncio.Event()

    async def hold(self, words: list[str], stdin: bytes, timeout: float) -> int:
        """Returns its exit status; when this is cancelled or late, ssh and what it started are killed."""
        # A session of its own: no terminal to ask on, and one signal reaches a ProxyCommand too.
        transport, _ = await asyncio.get_running_loop().subprocess_exec(lambda: self, *words, start_new_session=True)
        try:
            to_ssh = transport.get_pipe_transport(0)
            assert isinstance(to_ssh, asyncio.WriteTransport)
            to_ssh.write(stdin)
            to_ssh.write_eof()
            async with asyncio.timeout(timeout):
                await self._ended.wait()
            with contextlib.suppress(TimeoutError):  # a master connection that stays behind may keep the pipes open
                await asyncio.wait_for(self._silent.wait(), 1.0)
            status = transport.get_returncode()
            assert status is not None
            return status
        finally:
            if not self._ended.is_set():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(transport.get_pid(), signal.SIGKILL)
                await self._ended.wait()
            transport.close()

    def text(self, stream: int) -> str:
        return self._heard[stream].decode(errors="replace")

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        self._heard[fd] += data[: MOST_OUTPUT - len(self._heard[fd])]

    def pipe_connection_lost(self, fd: int, exc: Exception | None) -> None:
        self._open.discard(fd)
        if not self._open:
            self._silent.set()

    def process_exited(self) -> None:
        self._ended.set()


_MEANINGS: tuple[tuple[str, Why, str], ...] = (
    (r"Could not resolve hostname", "name", "its name is not known here; put it in ~/.ssh/config or ask who runs the DNS"),
    (
        r"REMOTE HOST IDENTIFICATION HAS CHANGED",
        "host-key",
        "its host key has changed; if it was set up anew: ssh-keygen -R {host}, then log in by hand once: ssh {host}",
    ),
    (r"Host key verification failed", "host-key", "its host key is not known yet; log in by hand once: ssh {host}"),
    (
        r"Permission denied \(|Too many authentication failures",
        "permission",
        "it lets nobody in without a password; log in by hand once: ssh {host}",
    ),
    (r"Connection refused", "refused", "the connection is refused; is sshd running there?"),
    (r"timed out|Timeout, server", "timeout", "it does not answer; is it up, and does a firewall let ssh through?"),
    (r"No route to host|Network is unreachable|Host is down", "unreachable", "there is no way to it; is it up?"),
    (
        r"Bad configuration option|Can't open user config|Bad owner or permissions|(unknown|illegal) option",
        "client",
        "ssh refuses its options; see [cluster] ssh_options and ~/.ssh/config",
    ),
    (r"closed by|Connection reset|Broken pipe|kex_exchange_identification", "lost", "the connection was lost"),
)


_NOLOGIN = re.compile(r"^.*account is (?:currently )?not available.*$", re.IGNORECASE | re.MULTILINE)
"""What nologin says in place of running anything."""


def explain(host: str, result: Result) -> SshError | None:
    """What kept a command from running; None where it ran, however it ended."""
    if result.status < 0:
        return SshError(host, "lost", f"ssh was ended by {signal.Signals(-result.status).name}")
    if result.status in (126, 127):
        why = "cannot be started" if result.status == 126 else "is not there"
        return SshError(host, "command", f"the command {why} ({result.last_words})")
    if result.status == 1 and (refusal := _NOLOGIN.search(f"{result.stdout}\n{result.stderr}")) is not None:
        return SshError(
            host, "permission", f"your login shell there lets nobody in ({refusal[0].strip()}); have it changed: chsh -s /bin/bash"
        )
    if result.status != 255:
        return None
    lines = _lines(result.stderr)
    for pattern, why, meaning in _MEANINGS:
        said = next((line for line in reversed(lines) if re.search(pattern, line)), None)
        if said is not None:
            return SshError(host, why, f"{meaning.format(host=host)} ({said.strip('@ ')})")
    return SshError(host, "other", f"ssh, or the command there, ended with status 255 ({result.last_words})")


def _lines(stderr: str) -> list[str]:
    lines = (line.strip() for line in stderr.splitlines())
    return [line for line in lines if line.strip("@* ") and not line.startswith(("Warning: ", "debug", "** "))]


def _last_line(stderr: str) -> str:
    lines = _lines(stderr)
    return lines[-1][:300] if lines else ""


def remote_command(cluster: Cluster, words: Sequence[str]) -> str:
    """Shell text that runs the recipe's Python with these words on a node, after the setup lines.

    The values of `cluster.env` are not in it: whoever lists a node's processes would read them.
    """
    program = " ".join(shlex.quote(word) for word in (cluster.python or sys.executable, *words))
    if not cluster.setup:
        return f"exec {program}"
    # Setup lines neither read what is meant for the program nor mix their talk into what it says.
    return "\n".join(["set -e", "{", *cluster.setup, "} </dev/null >&2", f"exec {program}"])
