"""What a generation starts from: the checkpoint, made sure of, the lineage, and the environment to compare with the last one."""

from __future__ import annotations

from launcher.controller.core import recovery
from launcher.controller.core.checkpoints import Commits
from launcher.controller.core.context import ControllerContext
from launcher.controller.core.versions import installed_versions
from midwatch.checkpoint_format.manifest import CheckpointError
from midwatch.checkpoint_format.verify import check_sizes
from midwatch.journal import entries as j
from midwatch.protocol import Lineage, Start


async def check_restart_point(context: ControllerContext, commits: Commits, *, thorough: bool) -> str:
    """Verifies what the ranks will load: its sizes, and where `thorough` every byte. What is wrong, or empty."""
    if context.live.storage_fault:
        return context.live.storage_fault
    if not context.ledger.lineages and context.ledger.checkpoints:
        found = ", ".join(sorted(context.ledger.checkpoints))
        return f"the journal no longer says which checkpoint this run was at: roll back to the one to continue from ({found})"
    while (view := context.ledger.restart_point()) is not None:
        try:
            check_sizes(context.paths.checkpoints / view.id, context.ledger.digests.get(view.id))
            problem = await commits.verify(view) if thorough else ""
        except CheckpointError as error:
            problem = str(error)
        if not problem:
            return ""
        lineage = context.ledger.lineages[context.ledger.lineage]
        if view.id == lineage.fork:
            return f"the checkpoint to restart from is damaged: {problem}; roll back to another one"
        if fault := recovery.look_now(context):
            return fault
        if view.id in context.ledger.missing:
            continue
        context.note("alarm", f"checkpoint {view.id} is damaged and was skipped: {problem}")
        context.record(j.CheckpointDamaged(time=context.clock(), id=view.id, reason=problem))
    line = context.ledger.lineages.get(context.ledger.lineage)
    if line is not None and line.fork is not None:
        return f"the checkpoint to restart from, {line.fork}, is gone; roll back to another one"
    ledger = context.ledger
    away = sorted(c.id for c in ledger.checkpoints.values() if c.lineage == ledger.lineage and c.id in ledger.missing)
    if away:
        return f"no checkpoint of this lineage can be found ({', '.join(away)} were there): put them back and resume, or roll back"
    return ""


def compose(context: ControllerContext, *, repeats: bool) -> Start:
    """Decides what the next generation starts from; opens a lineage where it `repeats` steps. Raises JournalError."""
    ledger = context.ledger
    restart = ledger.restart_point()
    step = restart.step if restart is not None else 0
    if not ledger.lineages:
        first = Lineage(id=ledger.newest_lineage + 1, time=context.clock())
        context.promise(j.LineageOpened(time=context.clock(), lineage=first))
    elif repeats or context.live.step > step:
        context.promise(_crash_lineage(context, restart.id if restart is not None else None, step))
        context.live.step = step  # no ranks are beyond it
    lineage = ledger.lineages[ledger.lineage]
    at_fork = restart is None or restart.id == lineage.fork
    open_numbers = [c.number for c in ledger.open_commands()]
    return Start(
        generation=ledger.generation + 1,
        term=context.term,
        lineage=lineage,
        checkpoint=restart.id if restart is not None else None,
        skip=lineage.skip if at_fork else 0,
        lr_scale=lineage.lr_scale if at_fork else 1.0,
        applied=min(open_numbers) - 1 if open_numbers else ledger.newest_command,
        replays=ledger.replays(step),
        paused=ledger.held and not ledger.resumes(),
    )


def _crash_lineage(context: ControllerContext, fork: str | None, step: int) -> j.LineageOpened:
    parent = context.ledger.lineages[context.ledger.lineage]
    carried = parent if fork == parent.fork else Lineage(id=0)
    now = context.clock()
    lineage = Lineage(
        id=context.ledger.newest_lineage + 1,
        parent=parent.id,
        fork=fork,
        fork_step=step,
        cause="crash",
        skip=carried.skip,
        lr_scale=carried.lr_scale,
        time=now,
    )
    return j.LineageOpened(time=now, lineage=lineage, undone=max(0, context.live.step - step))


def environment_of(nodes: tuple[str, ...], world: int) -> dict[str, str]:
    """What an operator should see changed between two generations."""
    return {**installed_versions(), "nodes": ", ".join(nodes), "ranks": str(world)}
