"""The process that answers prompts: started when something is asked, ended when nothing has been for a while; one for all askers.

It is `trainer.probe`, which has torch; this side has not. Whatever becomes of it, each ask gets its end.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from midwatch import protocol as p
from midwatch.recipe import Recipe
from midwatch.run_directory import RunPaths
from midwatch.signals import send_signal
from shards.common.terminal import safe

log = logging.getLogger(__name__)

LOG_NAME = "probe.log"
END_SECONDS = 2.0
"""For the process to end when its standard input has."""
LAST_BYTES = 4096
"""Of the log, in which its last line is looked for."""
MOST_SAID = 300
"""Characters of that line that are told."""

Deliver = Callable[[p.ProbeAnswer], None]


@dataclass
class _Open:
    """An ask on its way."""

    ask: p.ProbeAsk
    deliver: Deliver
    left: set[int] = field(default_factory=set)
    """Places of the checkpoints that have not ended."""


class Prober:
    """Lives in one event loop. Asks are known to the process by numbers of its own; `deliver` gets the asker's."""

    def __init__(self, paths: RunPaths, recipe: Recipe) -> None:
        self._paths, self._settings = paths, recipe.probe
        self._python = recipe.cluster.python or sys.executable
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._open: dict[int, _Open] = {}
        self._number = 0
        self._idle: asyncio.TimerHandle | None = None
        self._log_from = 0
        """Where this process's part of the log begins."""

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._process.pid if self._process is not None else None

    async def ask(self, ask: p.ProbeAsk, deliver: Deliver) -> int:
        """Passes it on, its checkpoints by their ids; the number by which it can be stopped."""
        self._number += 1
        number = self._number
        self._open[number] = _Open(ask, deliver, set(range(len(ask.checkpoints))))
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        try:
            async with self._starting:
                if self._process is None:
                    await self._start()
            self._write(msgspec.structs.replace(ask, ask=number))
        except OSError as error:
            self._fail(number, f"the probe cannot be started: {error.filename or self._python}: {error.strerror}")
        return number

    def stop(self, number: int) -> None:
        """Ends an ask's answers where they are; nothing if they have ended."""
        if number in self._open and self._process is not None:
            self._write(p.ProbeStop(ask=number))

    async def close(self) -> None:
        """Ends the process; what it was at has failed."""
        if self._idle is not None:
            self._idle.cancel()
        process, reading = self._process, self._reading
        if process is None or reading is None:
            return
        assert process.stdin is not None
        process.stdin.close()
        done, _ = await asyncio.wait([reading], timeout=END_SECONDS)
        if not done:
            send_signal(process, signal.SIGKILL)
            await reading

    async def _start(self) -> None:
        threads = str(self._settings.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if self._settings.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self._paths.logs.mkdir(exist_ok=True)
        with (self._paths.logs / LOG_NAME).open("ab") as out:
            self._log_from = out.tell()
            self._process = await asyncio.create_subprocess_exec(
                *(self._python, "-P", "-m", "trainer.probe", str(self._paths.root.resolve())),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=out,
                start_new_session=True,  # a terminal's Ctrl-C ends an answer, not the process
                cwd="/",
                env=environment,
            )
        log.info("the probe is process %d", self._process.pid)
        self._reading = asyncio.create_task(self._read(self._process), name="probe")

    def _write(self, message: p.Message) -> None:
        process = self._process
        if process is not None and process.stdin is not None:
            process.stdin.write(p.framed(message))

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        said = ""
        try:
            while True:
                length = p.frame_length(await process.stdout.readexactly(p.LENGTH_BYTES))
                self._take(p.decode(await process.stdout.readexactly(length)))
        except asyncio.IncompleteReadError:
            pass
        except p.ProtocolError as error:
            said = f"it sent an invalid message ({error})"
            send_signal(process, signal.SIGKILL)
        status = await process.wait()
        if self._process is not process:
            return  # it was idle, and what is open now is another's
        self._process = None
        if self._open:
            problem = f"the probe {said or _how(status)}{self._last_words()}; ask again to start another"
            log.warning("%s", problem)
            for number in list(self._open):
                self._fail(number, problem)

    def _take(self, message: p.Message) -> None:
        if not isinstance(message, p.ProbeBegan | p.ProbeToken | p.ProbeEnd):
            raise p.ProtocolError(f"a {type(message).__name__}")
        found = self._open.get(message.ask)
        if found is None or message.which not in found.left:
            return
        if isinstance(message, p.ProbeEnd):
            self._ends(message.ask, message.which)
        found.deliver(msgspec.structs.replace(message, ask=found.ask.ask))

    def _ends(self, number: int, which: int) -> None:
        found = self._open[number]
        found.left.discard(which)
        if not found.left:
            del self._open[number]
        if not self._open and self._process is not None:
            self._idle = asyncio.get_running_loop().call_later(self._settings.idle_seconds, self._rest)

    def _rest(self) -> None:
        """Nothing has been asked for a while."""
        self._idle = None
        process = self._process
        if process is not None and process.stdin is not None and not self._open:
            log.info("the probe is idle, and ends")
            process.stdin.close()
            self._process = None

    def _fail(self, number: int, problem: str) -> None:
        found = self._open[number]
        for which in sorted(found.left):
            self._ends(number, which)
            name = found.ask.checkpoints[which]
            found.deliver(p.ProbeEnd(ask=found.ask.ask, which=which, checkpoint=name, finish="failed", problem=problem))

    def _last_words(self) -> str:
        """The last line that this process has logged."""
        file = self._paths.logs / LOG_NAME
        with contextlib.suppress(OSError), file.open("rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(self._log_from, size - LAST_BYTES))
            lines = opened.read().decode(errors="replace").strip().splitlines()
            if lines:
                return f": {safe(lines[-1])[:MOST_SAID]} ({file})"
        return f" ({file})"


def _how(status: int) -> str:
    if status < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"
