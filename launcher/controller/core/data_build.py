"""The data stage: builds tokenizer and shards in a process of its own, and shows how far it is."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import tempfile
from pathlib import Path

import msgspec

from launcher.controller.core.context import ControllerContext
from midwatch.journal import entries as j
from midwatch.recipe import Recipe
from midwatch.recipe.data_sufficiency import shortages
from midwatch.run_directory import SECRET_FILE
from midwatch.signals import send_signal
from shards.build.marker import is_built
from shards.build.report import left_out
from shards.commands import BUSY
from shards.common.decoding import DecodeError, json_as
from shards.common.errors import ShardError
from shards.common.files import write_atomically
from shards.spec import Build


class BuildError(Exception):
    """The data cannot be built; the message says where and why."""


class ShortageError(Exception):
    """What is built does not last for the run's stages; the message says which, and the way out."""


def build_of(recipe: Recipe) -> Build:
    """What `shards` is to build for a recipe whose data directory is known."""
    assert recipe.data.dir is not None
    return recipe.build(recipe.data.dir)


class Building:
    """At most one build, ended with the controller."""

    def __init__(self, context: ControllerContext) -> None:
        self._context = context
        self._process: asyncio.subprocess.Process | None = None

    async def ensure(self) -> None:
        """Returns when the data is there, at once if it was built before, and lasts. Raises BuildError and ShortageError."""
        await self._there()
        if self._context.ledger.generation == 0:  # later on it is the operator's, who may have changed the mixture
            await self._lasts()

    async def _there(self) -> None:
        context = self._context
        build = build_of(context.recipe)
        if await asyncio.to_thread(is_built, build):
            if context.ledger.data_seconds is None:
                context.record(j.DataBuilt(time=context.clock(), directory=build.out, seconds=0.0))
            return
        context.live.building_since = context.clock()
        while not await self._built(build):
            context.live.building = (0.0, "another run is building the same data; waiting for it")
            context.touch()
            await asyncio.sleep(1.0)
        seconds = context.clock() - context.live.building_since
        context.record(j.DataBuilt(time=context.clock(), directory=build.out, seconds=seconds))
        with contextlib.suppress(ShardError):  # what cannot be read is said where it is used
            for said in await asyncio.to_thread(lambda: list(left_out(Path(build.out)))):
                context.note("warning", f"data: {said}")

    async def _lasts(self) -> None:
        recipe = self._context.recipe
        try:
            found = await asyncio.to_thread(shortages, recipe, Path(build_of(recipe).out))
        except ShardError as error:
            raise ShortageError(str(error)) from None
        if found:
            raise ShortageError("; ".join(found))

    async def _built(self, build: Build) -> bool:
        """Builds; False where somebody else is at it. Raises BuildError."""
        spec = Path(tempfile.mkdtemp(prefix="midwatch-")) / "build.json"
        write_atomically(spec, msgspec.json.encode(build), SECRET_FILE)
        try:
            return await self._run(spec)
        finally:
            spec.unlink()
            spec.parent.rmdir()

    async def _run(self, spec: Path) -> bool:
        self._process = process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "shards", "build", "--spec", str(spec), "--json"),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )
        assert process.stdout is not None and process.stderr is not None
        errors = asyncio.create_task(process.stderr.read())
        try:
            async for line in process.stdout:
                self._progress(line)
            status = await process.wait()
            said = (await errors).decode(errors="replace").strip()
        except asyncio.CancelledError:
            send_signal(process, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 5)
            raise
        if status == BUSY:
            return False
        if status:
            raise BuildError(said.splitlines()[-1] if said else f"the build of the data ended with status {status}")
        return True

    def _progress(self, line: bytes) -> None:
        try:
            said = json_as(line, _ProgressLine)
        except DecodeError:
            return
        text = f"{said.phase}: {said.message or ''}".strip(" :")
        part = _overall(said.phase, said.message or "", said.done / said.total if said.done and said.total else 0.0)
        before = self._context.live.building[0] if self._context.live.building else 0.0
        self._context.live.building = (max(part, before), text)  # a build that cleans goes through some phases sooner
        self._context.touch()


class _ProgressLine(msgspec.Struct):
    """A line of the build's progress."""

    phase: str
    message: str | None = None
    done: float | None = None
    total: float | None = None


_PHASES = {"read": (0.0, 0.2), "tokenizer": (0.2, 0.45), "encode": (0.45, 0.95), "verify": (0.95, 1.0)}
"""Share of the whole at which each phase of the build begins and ends."""
_STEPS = {
    "reading": (0.0, 0.1),
    "hashing": (0.1, 0.2),
    "finding exact duplicates": (0.2, 0.21),
    "finding near duplicates": (0.21, 0.23),
    "comparing texts": (0.23, 0.25),
    "training filter models": (0.25, 0.26),
    "cleaning": (0.26, 0.4),
    "making long documents": (0.4, 0.42),
    "encoding": (0.5, 0.85),
}
"""The same of the steps of phase `clean`."""


def _overall(phase: str, message: str, part: float) -> float:
    begin, end = _PHASES.get(phase, (0.0, 1.0) if phase != "done" else (1.0, 1.0))
    if phase == "clean":
        begin, end = _STEPS.get(message, (0.0, 0.0))
    return begin + (end - begin) * min(1.0, max(0.0, part))
