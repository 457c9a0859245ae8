"""Commands from acceptance to outcome: journaled, checked against the table, sent in order, ended once.

Commands are sent one after the other: the next is looked at when the ranks have acknowledged the one before, so that each meets the
state that the one before left behind. Marks, cancellations and `stop --now` do not wait in line.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Literal, cast

import msgspec

from launcher.controller.core.checkpoints import Commits
from launcher.controller.core.context import ControllerContext
from launcher.controller.core.events import (
    AgentsStopped,
    NodesToSpare,
    RanksStopped,
    RanksTrain,
    RolledBack,
    RunFailed,
    StateChanged,
)
from launcher.controller.supervision.generations import Generations
from midwatch.commands import BY_VERB, Doing, check_arguments
from midwatch.commands.orders import OPS
from midwatch.commands.states import Cell
from midwatch.journal import entries as j
from midwatch.journal.journal import JournalError, Ousted
from midwatch.protocol import CheckpointView, Command, CommandView, Committed, Hold, Lineage, Message, Op, Order, Outcome
from midwatch.recipe import Stage
from midwatch.recipe.live_settings import check_setting

log = logging.getLogger("launcher.controller")

STOP_NOW_SECONDS = 5.0
HOLD_SECONDS = 60.0
"""That nothing can be journaled before the run is held."""
LEAST_COMMITS = 3
"""Commits that wait for the journal before it is held all the same, where the recipe keeps fewer: nothing is pruned meanwhile."""

_NODE_MARKS: dict[str, Literal["in use", "drained", "quarantined"]] = {
    "node-add": "in use",
    "node-drain": "drained",
    "node-quarantine": "quarantined",
}
_REGROUPING = ("regroup", "node-drain")
"""Commands after which the ranks leave with a checkpoint, to be gathered anew."""
_STOPPING = ("stop", "stop-now", "release")
"""Commands that a stopped run has carried out."""


class Dispatch:
    """The queue of commands and the order in flight."""

    def __init__(self, context: ControllerContext, commits: Commits, generations: Generations) -> None:
        self._context, self._commits, self._generations = context, commits, generations
        self._rank: Callable[[Message], None] | None = None
        """What sends to rank 0, while it is connected."""
        self._wake = asyncio.Event()
        self.holding = False
        """The ranks are to wait until the journal can be written again."""
        self._stopped_at: tuple[int, dict[str, Any]] | None = None
        """Step and checkpoint at which the ranks leave for a stop or a release that is not done yet."""
        self.at_once: dict[str, Callable[[CommandView], None]] = {
            "golden": self._mark_checkpoint,
            "ungolden": self._mark_checkpoint,
            "acknowledge": self._acknowledge,
            "cancel": self._cancel,
            "stop-now": self._stop_now,
        }
        """What carries out the commands that do not wait in line."""
        self.shaping: dict[str, Callable[[CommandView], Awaitable[bool]]] = {
            "resume": self._shape_resume,
            "set": self._shape_set,
            "rollback": self._shape_rollback,
        }
        """What decides, without ranks, what the next generation starts from. False: not in this state. A node's mark is all that
        its command does then."""
        context.events.subscribe(RanksTrain, self._ranks_train)
        context.events.subscribe(RanksStopped, self._stopping)
        context.events.subscribe(AgentsStopped, self._stopped)
        context.events.subscribe(RunFailed, self._start_failed)
        context.events.subscribe(NodesToSpare, self._grow)
        # A command that waits may be refused now, or be due.
        context.events.subscribe(StateChanged, lambda _: self._wake.set())

    # From clients and rules

    def accept(self, command: Command, author: str) -> CommandView:
        """Takes a command in, or finds it again by its id; journaled before anything is done. Raises JournalError."""
        context = self._context
        known = context.ledger.by_id.get(command.id)
        if known is not None:
            return context.ledger.commands[known]
        number = context.ledger.newest_command + 1
        context.promise(
            j.CommandAccepted(
                time=context.clock(), author=author, number=number, id=command.id, verb=command.verb, arguments=command.arguments
            )
        )
        view = context.ledger.commands[number]
        problem = check_arguments(command.verb, command.arguments)
        doing, why = self._cell(view)
        if problem:
            self._end(view, "refused", reason=problem)
        elif doing is Doing.REFUSE and not self._later_allows(view):
            self._end(view, "refused", reason=why)
        elif command.verb in self.at_once:
            self.at_once[command.verb](view)
        self._wake.set()
        return context.ledger.commands[number]

    def _cell(self, command: CommandView) -> Cell:
        """What becomes of the command in the present state. One of another version, from the journal, is refused."""
        spec = BY_VERB.get(command.verb)
        return spec.states[self._context.state] if spec is not None else (Doing.REFUSE, check_arguments(command.verb, {}))

    def _grow(self, event: NodesToSpare) -> None:
        """There are nodes that the generation could have and has not."""
        ledger = self._context.ledger
        if not any(c.verb in _REGROUPING for c in ledger.open_commands()):
            id = f"regroup/{ledger.term}/{ledger.generation}/{ledger.newest_command}"
            self._context.note("info", f"restarting the ranks, with {event.names}", self._context.live.step)
            try:
                self.accept(Command(id=id, verb="regroup"), "")
            except Ousted:
                raise
            except JournalError as error:
                log.warning("the ranks are not restarted: %s", error)

    def _later_allows(self, view: CommandView) -> bool:
        """Whether commands still in line may bring about a state in which this one makes sense."""
        return any(c.number < view.number for c in self._context.ledger.open_commands())

    def _mark_checkpoint(self, view: CommandView) -> None:
        name = str(view.arguments["checkpoint"])
        problem = self._commits.mark(name, view.verb == "golden", view.author)
        found = self._commits.find(name)
        detail = {"checkpoint": found.id} if isinstance(found, CheckpointView) else {}
        self._end(view, "refused" if problem else "done", reason=problem, detail=detail)

    def _cancel(self, view: CommandView) -> None:
        context = self._context
        wanted = str(view.arguments["id"]).removeprefix("#")
        target = next(
            (c for c in context.ledger.open_commands() if wanted in (c.id, str(c.number)) and c.number != view.number), None
        )
        if target is None:
            self._end(view, "refused", reason=f"no command {wanted!r} is waiting")
        elif target.state != "queued":
            self._end(view, "refused", reason=f"{target.verb} has been sent to the ranks already")
        else:
            self._end(target, "cancelled", reason=f"by {view.author}")
            self._end(view, "done", detail={"cancelled": target.id})

    def _acknowledge(self, view: CommandView) -> None:
        """Marks an alarm, or all that stand, as seen by an operator."""
        wanted = str(view.arguments["alarm"])
        standing = [alarm.key for alarm in self._context.ledger.standing_alarms()]
        keys = standing if wanted == "all" else [key for key in standing if key == wanted]
        if keys:
            self._end(view, "done", detail={"alarms": keys})
        else:
            which = "" if wanted == "all" else f" {wanted!r}"
            names = ", ".join(standing[:8]) or "none"
            self._end(view, "refused", reason=f"there is no unacknowledged alarm{which} (there are: {names})")

    def _stop_now(self, view: CommandView) -> None:
        if self._rank is not None and self._context.state in ("training", "paused"):
            try:
                self._send(view)
            except Ousted:
                raise
            except JournalError:
                return  # it is accepted, and sent in its turn
            asyncio.get_running_loop().call_later(STOP_NOW_SECONDS, self._force_stop, view.number)
        else:
            self._generations.stop()

    def _force_stop(self, number: int) -> None:
        if self._context.ledger.commands[number].state == "sent":
            self._generations.stop(force=True)

    # To and from the ranks

    def rank_came(self, send: Callable[[Message], None]) -> None:
        """Rank 0 is connected: it gets again what it may not have got."""
        self._rank = send
        self._settle_by_restart()
        waiting = {entry.id for entry in self._context.unwritten if isinstance(entry, j.CheckpointCommitted)}
        for id in self._context.ledger.generation_commits:
            if id not in waiting:
                send(Committed(id=id))
        for command in self._context.ledger.open_commands():
            if command.state == "sent":
                send(self._order(command))
        self._wake.set()

    # A journal that cannot be written

    def look(self) -> None:
        """Holds the ranks while nothing can be journaled, once that has lasted: what they do could neither be kept nor told."""
        context = self._context
        waiting = sum(isinstance(entry, j.CheckpointCommitted) for entry in context.unwritten)
        late = context.seconds_unwritten > HOLD_SECONDS or waiting >= max(context.recipe.checkpoint.keep, LEAST_COMMITS)
        holding = bool(context.unwritten) and (self.holding or late)
        if holding != self.holding:
            self.holding = holding
            if holding:
                log.critical("the run is held: %s", context.journal_fault)
            if self._rank is not None:
                self._rank(Hold(on=holding))

    def wake(self) -> None:
        """The state may have changed: look at the line of commands again."""
        self._wake.set()

    def rank_went(self, send: Callable[[Message], None]) -> None:
        if self._rank is send:
            self._rank = None

    def outcome(self, outcome: Outcome, report: int) -> None:
        """What the ranks made of an order."""
        context = self._context
        view = context.ledger.commands.get(outcome.number)
        if view is None or view.state not in ("queued", "sent"):
            return
        if outcome.ok and view.verb in _STOPPING:
            self._stopped_at = (outcome.step, outcome.detail)
            return  # the ranks are about to leave; it is done when they have
        lineage = context.ledger.rollbacks.get(outcome.number)
        before: tuple[j.Entry, ...] = ()
        detail = outcome.detail
        if view.verb == "rollback":
            if outcome.ok:
                detail = with_shown(view, detail)
                context.live.step = outcome.step
                self._context.events.publish(RolledBack())
            elif lineage is not None and lineage == context.ledger.lineage:
                before = (j.LineageAbandoned(time=context.clock(), lineage=lineage),)
        self._end(
            view,
            "done" if outcome.ok else "failed",
            step=outcome.step,
            detail=detail,
            reason=outcome.reason,
            report=report,
            before=before,
        )
        if outcome.ok and view.verb == "pause":
            context.change_state("paused", f"by {view.author}" if view.author else "")
        elif outcome.ok and view.verb == "resume":
            context.change_state("training")
        self._wake.set()

    def _settle_by_restart(self) -> None:
        """Ends the commands that an earlier generation was sent and whose effect this one has started from.

        A rollback: its lineage was journaled, and the restart has followed it. An advance: its stage's end was committed.
        A resume: there are ranks again, and they do not hold.
        """
        context = self._context
        ledger = context.ledger
        start = ledger.checkpoints.get(ledger.start_checkpoint or "")
        for command in ledger.open_commands():
            if command.state != "sent" or ledger.sent_in.get(command.number, 0) >= ledger.generation:
                continue
            lineage = self._lineage_of(command) if command.verb == "rollback" else None
            if lineage is not None:
                detail: dict[str, Any] = {"lineage": lineage.id, "step": lineage.fork_step, "by": "restart"}
                self._end(command, "done", step=lineage.fork_step, detail=detail)
                self._context.events.publish(RolledBack())
            elif command.verb == "resume":
                step = start.step if start is not None else 0
                self._end(command, "done", step=step, detail={"generation": ledger.generation})
            elif (
                command.verb == "advance"
                and start is not None
                and start.ended
                and ledger.committed_after.get(start.id, 0) >= command.number
            ):
                self._end(command, "done", step=start.step, detail={"checkpoint": start.id, "by": "restart"})

    def _settle_without_ranks(self) -> None:
        """Ends the commands that ranks were sent and can answer no more: they are gone, and none are to be gathered.

        A stop is not sent to other ranks either, which would be gathered for it alone.
        """
        context, ledger = self._context, self._context.ledger
        if ledger.generation_live:
            return
        for command in [c for c in ledger.open_commands() if c.state == "sent"]:
            coming = self._generations.gathering and self._waits_for_start(command)
            if command.verb in ("stop", "stop-now"):
                self._generations.stop()
            elif context.state in ("failed", "finished", "released") and not coming:
                self._end_unanswered(command)

    def _end_unanswered(self, command: CommandView) -> None:
        """By what has come of it all the same."""
        context, ledger = self._context, self._context.ledger
        lineage = self._lineage_of(command) if command.verb == "rollback" else None
        ends = [c for c in ledger.checkpoints.values() if c.ended and c.on_line and c.time >= command.time]
        if lineage is not None and lineage.id == ledger.lineage:
            detail: dict[str, Any] = {"lineage": lineage.id, "step": lineage.fork_step, "at": "the next start"}
            self._end(command, "done", step=lineage.fork_step, detail=detail)
        elif command.verb == "advance" and ends:
            self._end(command, "done", step=ends[-1].step, detail={"checkpoint": ends[-1].id, "at": "the next start"})
        elif command.verb == "node-drain":
            self._end(command, "done")
        else:
            self._end(command, "failed", reason=f"the ranks ended without an answer; the run is {context.state}")

    def _ranks_train(self, _: RanksTrain) -> None:
        self._wake.set()

    def _stopping(self, _: RanksStopped) -> None:
        """The ranks have ended for a stop: what else was in line is not done. What comes from now on waits for the agents' end."""
        for command in self._context.ledger.open_commands():
            if command.verb not in _STOPPING:
                self._end(command, "cancelled", reason="the run was stopped")

    def _stopped(self, _: AgentsStopped) -> None:
        """Agents and ranks have ended: what asked for it is done."""
        step, detail = self._stopped_at or (self._context.live.step, {})
        self._stopped_at = None
        for command in self._context.ledger.open_commands():
            if command.verb in _STOPPING:
                self._end(command, "done", step=step, detail=detail)
        self._wake.set()

    def _start_failed(self, event: RunFailed) -> None:
        """No ranks will come: a resume that waits for them has failed."""
        for command in self._context.ledger.open_commands():
            if self._waits_for_start(command):
                self._end(command, "failed", reason=event.reason)
        self._wake.set()

    def _waits_for_start(self, command: CommandView) -> bool:
        """Whether it is a resume that is done when the next ranks are there."""
        ledger = self._context.ledger
        old = not ledger.generation_live or ledger.sent_in.get(command.number, 0) < ledger.generation
        return command.verb == "resume" and command.state == "sent" and old

    def ranks_ended(self, cause: str, step: int, checkpoint: str | None) -> None:
        """The ranks left by themselves: whoever asked for that has got it."""
        if cause in ("stopped", "stopped-now"):
            self._stopped_at = self._stopped_at or (step, {"checkpoint": checkpoint} if checkpoint else {})
            return
        self._stopped_at = None
        verbs = {
            "released": ("release",),
            "regrouped": _REGROUPING,
        }.get(cause, ())
        for command in self._context.ledger.open_commands():
            if command.verb in verbs:
                self._end(command, "done", step=step, detail={"checkpoint": checkpoint} if checkpoint else {})
            elif cause == "finished":
                self._end(command, "refused", reason="the run has finished")

    # The line of commands

    async def run(self) -> None:
        """Works through the line for as long as the controller lives."""
        self._wake.set()  # a controller before this one may have left commands in line
        while True:
            await self._wake.wait()
            self._wake.clear()
            self._settle_without_ranks()
            while (command := self._next()) is not None:
                try:
                    moved = await self._carry_out(command)
                except Ousted:
                    raise
                except JournalError as error:
                    self._end(command, "failed", reason=str(error))
                    moved = True
                if not moved:
                    break

    def _next(self) -> CommandView | None:
        """The first command in line, unless one before it is still in flight."""
        for command in self._context.ledger.open_commands():
            if command.state == "queued":
                return command
            if self._waits_for_start(command):
                return self._next_beside_a_start()
            if command.verb != "checkpoint":
                return None
        return None

    def _next_beside_a_start(self) -> CommandView | None:
        """The first command that need not wait for the ranks that are being started, as a stop, or a node that is added."""
        for command in self._context.ledger.open_commands():
            if command.state == "queued" and self._cell(command)[0] in (Doing.NOW, Doing.SHAPE):
                return command
        return None

    async def _carry_out(self, command: CommandView) -> bool:
        """Does what the table says; False where it has to wait."""
        context = self._context
        verb = command.verb
        doing, why = self._cell(command)
        if doing is not Doing.QUEUE and verb in _NODE_MARKS and self._mark_node(command):
            return True
        if doing is Doing.QUEUE and verb == "stop" and not context.ledger.generation_live:
            self._generations.stop()  # nodes may never come: there is nothing to wait for
            return False
        if doing is Doing.QUEUE:
            return False
        if doing is Doing.REFUSE:
            self._end(command, "refused", reason=why)
            return True
        if doing is Doing.SHAPE:
            return await self.shaping[verb](command)
        reachable = self._rank is not None and context.state in ("training", "paused")
        if (verb == "stop" and context.state not in ("training", "paused")) or (verb == "stop-now" and not reachable):
            self._generations.stop()
            return False  # it ends with the ranks
        if self._rank is None:
            return False
        problem = self._check(command)
        if problem:
            self._end(command, "refused", reason=problem)
        elif verb == "rollback":
            return await self._send_rollback(command)
        else:
            self._send(command)
        return True

    def _mark_node(self, command: CommandView) -> bool:
        """Marks the node; whether that is all, and the ranks need not be gathered anew for it."""
        verb, node = command.verb, str(command.arguments["node"])
        problem = self._generations.mark(node, _NODE_MARKS[verb], command.author)
        if problem:
            self._end(command, "refused", reason=problem)
        elif verb == "node-quarantine" and self._generations.uses(node):
            # What a bad node has a share in is not saved: back to the newest checkpoint, without it.
            self._end(command, "done", detail={"ranks": "restarted without it"})
            self._generations.restart()
        elif verb == "node-drain" and self._generations.uses(node) and self._context.state in ("training", "paused"):
            return False
        else:
            self._end(command, "done")
        return True

    def _check(self, command: CommandView) -> str:
        """What only the run's present can tell about the arguments."""
        context = self._context
        stage = self._stage()
        if command.verb == "set":
            try:
                check_setting(context.recipe, stage, str(command.arguments["key"]), float(command.arguments["value"]))
            except ValueError as error:
                return str(error)
        if command.verb == "advance" and command.arguments.get("to"):
            names = [s.name for s in context.recipe.stage]
            later = names[names.index(stage.name) + 1 :]
            if command.arguments["to"] not in later:
                return f"advance: there is no later stage {command.arguments['to']!r} (later ones: {', '.join(later) or 'none'})"
        return ""

    def _stage(self) -> Stage:
        """The stage that runs, or that the next start will run."""
        context = self._context
        phase = context.live.phase
        restart = context.ledger.restart_point()
        name = phase.stage if phase is not None else restart.stage if restart is not None else context.recipe.stage[0].name
        index = context.recipe.stage_index(name)
        if phase is None and restart is not None and restart.ended:
            index = min(index + 1, len(context.recipe.stage) - 1)
        return context.recipe.stage[index]

    async def _target(self, command: CommandView) -> CheckpointView | None:
        """The checkpoint of a rollback, verified; None, and the command refused, where it cannot be used."""
        found = self._commits.find(str(command.arguments["checkpoint"]))
        if isinstance(found, str):
            self._end(command, "refused", reason=found)
            return None
        problem = await self._commits.verify(found)
        if problem:
            self._context.note("alarm", f"rollback to {found.id} is refused: {problem}", self._context.live.step)
            self._end(command, "refused", reason=problem)
            return None
        if found.id not in self._context.ledger.checkpoints:
            self._end(command, "refused", reason=f"{found.id} was deleted meanwhile")
            return None
        return found

    def _open_lineage(self, command: CommandView, target: CheckpointView, *before: j.Entry) -> Lineage:
        """Journals the lineage that a rollback begins, and `before` in the same breath. Raises JournalError."""
        context = self._context
        lineage = Lineage(
            id=context.ledger.newest_lineage + 1,
            parent=target.lineage,
            fork=target.id,
            fork_step=target.step,
            cause="rollback",
            skip=int(command.arguments.get("skip") or 0),
            lr_scale=float(command.arguments.get("lr_scale") or 1.0),
            author=command.author,
            time=context.clock(),
        )
        undone = max(0, context.live.step - target.step)
        context.promise(
            *before,
            j.LineageOpened(time=context.clock(), author=command.author, lineage=lineage, number=command.number, undone=undone),
        )
        return lineage

    async def _send_rollback(self, command: CommandView) -> bool:
        target = await self._target(command)
        if target is None or not self._waits(command):
            return True
        if self._cell(command)[0] is not Doing.NOW or self._rank is None:
            self._wake.set()  # the state has changed while every byte was read: the line is looked at again
            return False
        sent = j.CommandSent(time=self._context.clock(), number=command.number, generation=self._context.ledger.generation)
        self._open_lineage(command, target, sent)
        self._rank(self._order(command))
        return True

    def _waits(self, command: CommandView) -> bool:
        """Whether it is still in line: it may have been taken back, or ended with the run, while something was awaited."""
        return self._context.ledger.commands[command.number].state == "queued"

    # Without ranks: what the next generation starts from

    async def _shape_resume(self, command: CommandView) -> bool:
        context = self._context  # it is done when the ranks are there
        context.promise(j.CommandSent(time=context.clock(), number=command.number, generation=context.ledger.generation))
        self._generations.restart()
        return True

    async def _shape_set(self, command: CommandView) -> bool:
        context = self._context
        if context.ledger.generation_live:
            return False  # what these ranks start from is decided already; they get the order when they train
        restart = context.ledger.restart_point()
        key, value = str(command.arguments["key"]), float(command.arguments["value"])
        if problem := self._check(command):
            self._end(command, "refused", reason=problem)
        else:
            detail = {"key": key, "old": context.ledger.settings.get(key), "new": value, "at": "the next start"}
            self._end(command, "done", step=restart.step if restart is not None else 0, detail=detail)
        return True

    async def _shape_rollback(self, command: CommandView) -> bool:
        context = self._context
        target = await self._target(command)
        if target is None or not self._waits(command):
            return True
        if self._cell(command)[0] is not Doing.SHAPE:
            self._wake.set()
            return False
        undone = max(0, context.live.step - target.step)
        lineage = self._open_lineage(command, target)
        context.live.step = target.step
        detail = {"lineage": lineage.id, "step": target.step, "undone": undone, "at": "the next start"}
        self._end(command, "done", step=target.step, detail=with_shown(command, detail))
        context.events.publish(RolledBack())
        if context.state in ("failed", "recovering"):
            self._generations.restart()
        return True

    def _send(self, command: CommandView) -> None:
        context = self._context
        context.promise(j.CommandSent(time=context.clock(), number=command.number, generation=context.ledger.generation))
        assert self._rank is not None
        self._rank(self._order(command))

    def _order(self, command: CommandView) -> Order:
        arguments: dict[str, Any] = dict(command.arguments)
        if command.verb == "rollback":
            lineage = self._lineage_of(command)
            assert lineage is not None and lineage.fork is not None
            arguments = {
                "checkpoint": lineage.fork,
                "lineage": msgspec.to_builtins(lineage),
                "skip": lineage.skip,
                "lr_scale": lineage.lr_scale,
            }
        return Order(number=command.number, op=int(OPS.get(command.verb, Op.NONE)), arguments=arguments)

    def _lineage_of(self, command: CommandView) -> Lineage | None:
        ledger = self._context.ledger
        number = ledger.rollbacks.get(command.number)
        return ledger.lineages.get(number) if number is not None else None

    def _end(
        self,
        view: CommandView,
        state: str,
        *,
        step: int | None = None,
        detail: dict[str, Any] | None = None,
        reason: str = "",
        report: int = 0,
        before: tuple[j.Entry, ...] = (),
    ) -> None:
        context = self._context
        context.record(
            *before,
            j.CommandEnded(
                time=context.clock(),
                author=view.author,
                number=view.number,
                state=cast(Any, state),
                step=step,
                detail=detail or {},
                reason=reason,
                report=report,
            ),
        )


def with_shown(command: CommandView, detail: dict[str, Any]) -> dict[str, Any]:
    """The outcome of a rollback, with the steps that its dialog had shown where it has undone others: the run went on meanwhile."""
    shown, undone = command.arguments.get("shown"), detail.get("undone")
    return detail if shown is None or undone is None or shown == undone else {**detail, "shown": shown}
