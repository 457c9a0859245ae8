"""Runs on other machines: `ssh://[USER@]HOST[:PORT]/NAME`, or with a directory, `ssh://HOST//abs/dir`.

The operator's own ssh, with their configuration and keys, runs `midwatch relay` there; its standard input and output are the
connection to the controller. No port is open, and what crosses the link is numbers, not screens.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import re
import shlex
import signal
import socket
from dataclasses import dataclass

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidMessage, WebSocketException

from midwatch import protocol
from midwatch.signals import send_signal
from midwatch.transport.discovery import Looks
from shards.common.terminal import safe

OPEN_SECONDS = 60.0
"""Login included, which may ask for a second factor."""
PROGRAM_VARIABLE = "MIDWATCH_REMOTE"
"""How `midwatch` is called there, where that is not its name: words for the shell there, as `~/midwatch/bin/midwatch`."""


class RemoteError(Exception):
    """The other machine or the run there cannot be reached; the message says which, why and what to do."""


@dataclass(frozen=True)
class RemoteRun:
    """A run on another machine."""

    host: str
    """As ssh takes it, with a user where one is named."""
    port: int | None
    run: str
    """Its name there, or its directory."""

    @property
    def name(self) -> str:
        return self.run.rstrip("/").rpartition("/")[2]

    def __str__(self) -> str:
        return f"ssh://{self.host}{f':{self.port}' if self.port is not None else ''}/{self.run}"

    def command(self, *, prompts: bool, looks: Looks = "never") -> list[str]:
        """What to execute here. Without `prompts` ssh fails where it would ask, for the terminal is a screen's."""
        program = os.environ.get(PROGRAM_VARIABLE) or "midwatch"
        options = [*(["-p", str(self.port)] if self.port is not None else []), *([] if prompts else ["-o", "BatchMode=yes"])]
        return ["ssh", "-T", "-C", *options, self.host, f"{program} relay {_option(looks)}{shlex.quote(self.run)}"]


def _option(looks: Looks) -> str:
    return "" if looks == "never" else "--look " if looks == "always" else "--look-when-over "


def parse_remote(text: str) -> RemoteRun | None:
    """None where it is no `ssh://` address. Raises RemoteError where it is a wrong one."""
    if not text.startswith("ssh://"):
        return None
    where, slash, run = text.removeprefix("ssh://").partition("/")
    found = re.fullmatch(
        r"((?:[^@:\s\[\]-][^@:\s\[\]]*@)?(?:[A-Za-z0-9_][A-Za-z0-9_.-]*|\[[0-9A-Fa-f:.%]+\]))(?::(\d{1,5}))?", where
    )
    if found is None or not slash or not run or run.startswith("-") or not run.isprintable():
        raise RemoteError(f"{text}: must be ssh://[USER@]HOST[:PORT]/NAME, or ssh://HOST//DIRECTORY")
    host = found.group(1).replace("[", "").replace("]", "")
    return RemoteRun(host, int(found.group(2)) if found.group(2) else None, run)


class SshWay:
    """One ssh at a time, and the connection through it."""

    def __init__(self, remote: RemoteRun, *, prompts: bool = True, looks: Looks = "never") -> None:
        self._remote, self._prompts, self.looks = remote, prompts, looks
        self._process: asyncio.subprocess.Process | None = None
        self._said: collections.deque[str] = collections.deque(maxlen=20)
        self._listening: asyncio.Task[None] | None = None

    async def connect(self) -> ClientConnection:
        """Raises RemoteError, in ssh's or the relay's own words where there are any."""
        await self.close()
        near, far = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._remote.command(prompts=self._prompts, looks=self.looks),
                stdin=far.fileno(),
                stdout=far.fileno(),
                stderr=asyncio.subprocess.PIPE,
                start_new_session=not self._prompts,  # it must not meet the screen's terminal; or must, to ask
            )
        except OSError as error:
            near.close()
            raise RemoteError(f"ssh cannot be started: {error.strerror}") from None
        finally:
            far.close()
        self._said.clear()
        self._listening = asyncio.create_task(self._listen(self._process), name="ssh-stderr")
        try:
            return await connect(
                "ws://controller/",
                sock=near,
                proxy=None,
                max_size=protocol.MAX_FRAME,
                open_timeout=OPEN_SECONDS,
                close_timeout=1,
                ping_interval=10,
                ping_timeout=20,
                compression=None,
            )
        except (OSError, WebSocketException, EOFError, TimeoutError) as error:
            near.close()
            raise RemoteError(await self._reason(error)) from None
        except BaseException:
            near.close()
            await self.close()
            raise

    async def close(self) -> None:
        """Ends ssh, which ends the relay."""
        process, self._process = self._process, None
        if process is not None and process.returncode is None:
            send_signal(process, signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 2)
            except TimeoutError:
                send_signal(process, signal.SIGKILL)
                await process.wait()
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
            self._listening = None

    async def _listen(self, process: asyncio.subprocess.Process) -> None:
        assert process.stderr is not None
        while chunk := await process.stderr.read(4096):
            self._said.extend(line.strip() for line in chunk.decode(errors="replace").splitlines() if line.strip())

    async def _reason(self, error: BaseException) -> str:
        """Why there is no connection: the last thing that ssh or the relay has said."""
        process, listening = self._process, self._listening
        status: int | None = None
        if process is not None and listening is not None:
            with contextlib.suppress(TimeoutError):
                status = await asyncio.wait_for(process.wait(), 2)
                await asyncio.wait_for(asyncio.shield(listening), 1)
        await self.close()
        host = self._remote.host
        if status in (None, 0) and not self._said and isinstance(error, InvalidMessage):
            return f"{host}: what came is no controller: do login scripts there print something? (try: ssh -T {host} true)"
        last = safe(self._said[-1] if self._said else "")[:300]
        last = last.removeprefix("midwatch: ")
        if status == 127:
            return f"{host}: {last or 'midwatch is not found'} ({PROGRAM_VARIABLE} may name the command there, with its directory)"
        if not self._prompts and ("Permission denied" in last or "verification failed" in last):
            return (
                f"{host}: {last} (a screen cannot ask; see that `ssh {host} true` needs no answer: a key, an agent, a shared login)"
            )
        return f"{host}: {last or f'the connection failed: {error or type(error).__name__}'}"
