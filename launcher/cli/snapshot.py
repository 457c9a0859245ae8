"""What a screen would show of a run, for commands that print it."""

from __future__ import annotations

import asyncio
from pathlib import Path

from midwatch import protocol as p
from midwatch.journal.journal import JournalError
from midwatch.recipe import RecipeError
from midwatch.run_directory import RunPaths
from midwatch.transport.client import Client, ClientError
from midwatch.transport.discovery import SilentError
from midwatch.transport.ssh_url import RemoteRun

SNAPSHOT_SECONDS = 15.0
"""That a controller has to draw up the run for one look."""


async def snapshot_of(root: Path | RemoteRun) -> p.Snapshot:
    """What a screen would show now; where no controller runs, what the run's files say."""
    arrived = asyncio.Event()
    async with Client(root, subscribe=True, read_only=True, looks="always", on_snapshot=lambda _: arrived.set()) as client:
        try:
            await asyncio.wait_for(arrived.wait(), SNAPSHOT_SECONDS)
        except TimeoutError:
            raise SilentError("the controller received the question but does not answer") from None
        assert client.snapshot is not None
        return client.snapshot


async def archived_snapshot(root: Path, reason: str) -> p.Snapshot:
    """What the run's files say, and why its controller does not say it."""
    from launcher.controller.archive import Archive

    try:
        archive = Archive(RunPaths(root))
    except (RecipeError, JournalError, OSError) as error:
        raise ClientError(f"{reason}; nor can the run's files be read: {error}") from None
    try:
        return archive.snapshot(reason)
    finally:
        archive.close()
