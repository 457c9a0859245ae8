"""`midwatch relay RUN`: passes bytes between standard input and output and the controller's socket, for a client beyond ssh.

It says nothing itself but, on standard error, why it cannot. It ends when either side does.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import socket
import sys
from pathlib import Path

from midwatch.journal.journal import JournalError
from midwatch.recipe import RecipeError
from midwatch.run_directory import Address, RunPaths
from midwatch.transport.discovery import ClientError, Looks, reach_controller
from shards.common.terminal import write_error

ROOM = 256 * 1024
"""Bytes kept for a side that does not take them; then the other is read no further."""
CHUNK = 64 * 1024


def relay(root: Path, *, start: bool = True, looks: Looks = "never") -> int:
    """Starts a controller where none lives, unless it is not to, or the run is to be shown from its files. The exit status."""
    paths = RunPaths(root)
    try:
        with contextlib.ExitStack() as archive:
            wire = asyncio.run(reach_controller(paths, _connect, start=start and looks != "always", looks=looks))
            if wire is None:
                from launcher.controller.archive import serving_in_thread

                wire = asyncio.run(_connect(archive.enter_context(serving_in_thread(paths))))
            with wire:
                pump(sys.stdin.fileno(), sys.stdout.fileno(), wire)
    except (ClientError, RecipeError, JournalError, OSError) as error:
        write_error(f"midwatch: {error}")
        return 1
    return 0


async def _connect(address: Address) -> socket.socket:
    wire = socket.socket(socket.AF_UNIX)
    try:
        wire.settimeout(5)
        wire.connect(address.url.removeprefix("unix:"))
    except BaseException:
        wire.close()
        raise
    return wire


def pump(source: int, sink: int, wire: socket.socket) -> None:
    """Passes on until one side ends, and then what is still on the way to the other."""
    far = wire.fileno()
    out, back = bytearray(), bytearray()
    ended = False
    for handle in (source, sink, far):
        os.set_blocking(handle, False)
    try:
        while not ended or out or back:
            poller = select.poll()
            poller.register(sink, select.POLLOUT if back else 0)  # with nothing to write: whether the other end has gone
            poller.register(far, (select.POLLIN if len(back) < ROOM and not ended else 0) | (select.POLLOUT if out else 0))
            if len(out) < ROOM and not ended:
                poller.register(source, select.POLLIN)
            ready = dict(poller.poll(1000))
            if ready.get(source, 0) & (select.POLLIN | select.POLLHUP):
                ended |= not _take(source, out)
            if ready.get(far, 0) & (select.POLLIN | select.POLLHUP) and not ended and not _take(far, back):
                ended = True
                out.clear()
            if out and not _give(far, out):
                out.clear()
                ended = True
            if (back and not _give(sink, back)) or (ready.get(sink, 0) & select.POLLERR):
                return
            if ended and not ready:
                return  # the side that is left does not take what was meant for it
    finally:
        for handle in (source, sink):
            os.set_blocking(handle, True)


def _take(handle: int, buffer: bytearray) -> bool:
    """Reads what there is; False at the end."""
    try:
        chunk = os.read(handle, CHUNK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    buffer += chunk
    return bool(chunk)


def _give(handle: int, buffer: bytearray) -> bool:
    """Writes what can be written; False where nobody takes it any more."""
    try:
        del buffer[: os.write(handle, buffer[:CHUNK])]
    except BlockingIOError:
        return True
    except OSError:
        return False
    return True
