"""What must happen in a rank before torch is imported: its name, where its output goes, and that it does not outlive its agent."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping

AGENT_DIED = 70
"""Exit status of a rank whose agent is gone."""


def redirect(environment: Mapping[str, str] = os.environ) -> None:
    """Sends standard output and error to the end of MIDWATCH_LOG, from the first line on; import errors land there too."""
    file = environment.get("MIDWATCH_LOG")
    if not file:
        return
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)


def guard(environment: Mapping[str, str] = os.environ) -> threading.Thread | None:
    """Ends this process when nobody holds the FIFO MIDWATCH_GUARD open for writing any more: an agent killed has no last words."""
    file = environment.get("MIDWATCH_GUARD")
    if not file:
        return None
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
    os.set_blocking(descriptor, True)
    thread = threading.Thread(target=_wait, args=(descriptor,), name="agent-guard", daemon=True)
    thread.start()
    return thread


def _wait(descriptor: int) -> None:
    while os.read(descriptor, 64):
        pass
    os._exit(AGENT_DIED)
