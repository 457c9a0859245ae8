"""A run directory that was copied from another run's, at its first controller: the copy waits until somebody resumes it."""

from __future__ import annotations

import logging

from launcher.controller.core.context import ControllerContext
from midwatch.journal import entries as j

log = logging.getLogger("launcher.controller")

_AT_WORK = ("building", "starting", "training", "paused", "recovering")


def settle_copy(context: ControllerContext, path: str) -> None:
    """Journals that this is a copy. Agents, ranks and open commands of the journal are the original's and end here; `path`: its."""
    ledger, now = context.ledger, context.clock()
    named = f" of {path}" if path else ""
    log.warning("this directory is a copy%s: from now on it is a run of its own, %s", named, context.run)
    context.record(j.RunCopied(time=now, id=context.run, original=ledger.run, path=path))
    if ledger.generation_live:
        context.record(j.GenerationEnded(time=now, generation=ledger.generation, cause="the directory was copied", step=0))
    for command in ledger.open_commands():
        reason = f"it was given to the run{named}, which this one was copied from"
        context.record(j.CommandEnded(time=now, number=command.number, state="cancelled", reason=reason))
    if ledger.state in _AT_WORK:
        context.change_state("released", f"a copy{named}, made while it trained; resume continues from the newest checkpoint")
    context.note("info", f"this directory is a copy{named} and a run of its own")
