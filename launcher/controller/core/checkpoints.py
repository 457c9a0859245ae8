"""Checkpoints from ready to committed, their pruning, and what an operator calls them by."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import msgspec

from launcher.controller.core import recovery
from launcher.controller.core.context import ControllerContext
from midwatch.checkpoint_format import directory as files
from midwatch.checkpoint_format import verify
from midwatch.checkpoint_format.manifest import CheckpointError
from midwatch.journal import entries as j
from midwatch.journal.journal import JournalError, Ousted
from midwatch.protocol import CheckpointReady, CheckpointView, CommitRefused, Committed
from midwatch.run_directory import PUBLIC_FILE
from shards.common.files import write_atomically

log = logging.getLogger("launcher.controller")


class Commits:
    """Only the controller commits, marks and deletes checkpoints."""

    def __init__(self, context: ControllerContext) -> None:
        self._context = context

    def take(self, ready: CheckpointReady, report: int) -> Committed | CommitRefused:
        """Commits a checkpoint that the ranks have written: checks generation and manifest, renames, journals."""
        context = self._context
        ledger = context.ledger
        if ready.id in ledger.checkpoints:
            self._answer(ready, True, "")
            return Committed(id=ready.id)
        root = context.paths.checkpoints
        try:
            if ready.generation != ledger.generation:
                raise CheckpointError(f"{ready.id}: written by generation {ready.generation}, which is over")
            if "/" in ready.directory or "/" in ready.id or ready.id.startswith("."):
                raise CheckpointError(f"{ready.id!r}: not a checkpoint's name")
            if fault := recovery.look_now(context):  # what is there instead of the storage would hide it when that is back
                raise CheckpointError(fault)
            written = ready.directory if (root / ready.directory).exists() else ready.id
            manifest = verify.check_sizes(root / written, ready.digest)
            if manifest.id != ready.id:
                raise CheckpointError(f"{ready.directory}: its manifest says {manifest.id}")
            committed = self._entry(ready, report)
            self._leave_record(root / written, committed)
            files.commit(root, ready.directory, ready.id)
        except CheckpointError as error:
            self._answer(ready, False, str(error))
            context.note("alarm", f"checkpoint {ready.id} is refused: {error}", ready.step, report)
            return CommitRefused(id=ready.id, reason=str(error))
        context.record(*self._answers(ready, True, ""), committed)
        self.prune()
        return Committed(id=ready.id)

    def _entry(self, ready: CheckpointReady, report: int) -> j.CheckpointCommitted:
        return j.CheckpointCommitted(
            time=self._context.clock(),
            report=report,
            id=ready.id,
            digest=ready.digest,
            step=ready.step,
            lineage=ready.lineage,
            stage=ready.stage,
            stage_step=ready.stage_step,
            ended=ready.ended,
            generation=ready.generation,
            bytes=ready.bytes,
            suspect=ready.suspect,
            seconds=ready.seconds,
            stall_seconds=ready.stall_seconds,
            loss=ready.loss,
            settings=ready.settings,
        )

    def _leave_record(self, directory: Path, entry: j.CheckpointCommitted) -> None:
        """What the journal is about to say, beside the files themselves, should the journal be lost."""
        try:
            write_atomically(directory / files.RECORD, msgspec.json.encode(entry), mode=PUBLIC_FILE)
        except OSError as error:
            log.warning("%s: what the journal says of it cannot be written beside it: %s", directory, error)

    def _answer(self, ready: CheckpointReady, ok: bool, reason: str) -> None:
        answers = self._answers(ready, ok, reason)
        if answers:
            self._context.record(*answers)

    def _answers(self, ready: CheckpointReady, ok: bool, reason: str) -> list[j.CommandEnded]:
        """The ends of the commands that asked for the checkpoint."""
        context = self._context
        found = []
        for number in ready.numbers:
            command = context.ledger.commands.get(number)
            if command is not None and command.state in ("queued", "sent") and command.verb == "checkpoint":
                found.append(
                    j.CommandEnded(
                        time=context.clock(),
                        author=command.author,
                        number=number,
                        state="done" if ok else "failed",
                        step=ready.step,
                        detail={"checkpoint": ready.id} if ok else {},
                        reason=reason,
                    )
                )
        return found

    def kept(self) -> set[str]:
        """Checkpoints that are never pruned, those that the recipe keeps, and those that an operator may want to go back to."""
        ledger = self._context.ledger
        undone_since = self._context.clock() - 3600 * self._context.recipe.checkpoint.undone_hours
        keep = {c.id for c in ledger.checkpoints.values() if c.golden or c.ended}
        keep |= {line.fork for line in ledger.lineages.values() if line.fork is not None}
        keep |= self._context.live.verifying
        keep |= set(self._context.live.probed.values())
        for command in ledger.open_commands():
            if command.verb == "rollback":
                target = self.find(str(command.arguments.get("checkpoint")))
                keep |= {target.id} if isinstance(target, CheckpointView) else set()
        # A lineage that is not known was in a part of the journal that is lost: an operator decides about its checkpoints.
        keep |= {c.id for c in ledger.checkpoints.values() if c.lineage not in ledger.lineages}
        there = [c for c in ledger.checkpoints.values() if c.on_line and c.id not in ledger.missing]
        on_line = sorted(there, key=lambda c: (c.step, c.time))
        keep |= {c.id for c in on_line[-self._context.recipe.checkpoint.keep :]}
        good = [c.id for c in on_line if not c.suspect and c.id not in ledger.damaged]
        keep |= set(good[-1:])
        keep |= {c.id for c in ledger.trusted()[-1:]}  # an alarm that stands: the last one before it
        keep |= {id for id, left in ledger.left_line.items() if left > undone_since}
        return keep

    def prune(self) -> None:
        """Deletes what need not be kept, each once its deletion is durable in the journal."""
        context = self._context
        root, keep = context.paths.checkpoints, self.kept()
        if context.unwritten or context.live.storage_fault:
            return
        for name in [c for c in context.ledger.checkpoints if c not in keep and (root / c).is_dir()]:
            if files.is_golden(root, name):  # the journal may have lost the mark
                recovery.keep_goldens(context)
                continue
            try:
                context.promise(j.CheckpointPruned(time=context.clock(), id=name))
            except Ousted:
                raise
            except JournalError as error:
                log.warning("nothing is pruned: %s", error)
                return
            files.remove(root, name)

    def mark(self, name: str, golden: bool, author: str) -> str:
        """Marks or unmarks a checkpoint as golden; why not, or empty."""
        context = self._context
        view = self.find(name)
        if isinstance(view, str):
            return view
        doubt = "its step's metrics were not finite" if view.suspect else context.ledger.doubt(view)
        if golden and doubt and not author:
            return f"{view.id} is suspect ({doubt}); no rule may trust it"
        context.record(j.GoldenMarked(time=context.clock(), author=author, id=view.id, golden=golden))
        try:
            files.mark_golden(context.paths.checkpoints, view.id, golden)
        except OSError as error:
            context.note("warning", f"{view.id}: the mark in its directory cannot be written: {error.strerror}")
        return ""

    def find(self, name: str) -> CheckpointView | str:
        """The checkpoint an operator means; else why there is none."""
        return self._context.ledger.find(name)

    async def verify(self, view: CheckpointView) -> str:
        """Reads every byte of a checkpoint in a thread; what is wrong with it, or empty."""
        context = self._context
        context.live.verifying.add(view.id)
        try:
            digest = context.ledger.digests.get(view.id)
            await asyncio.to_thread(verify.verify, context.paths.checkpoints / view.id, digest)
        except CheckpointError as error:
            return str(error)
        finally:
            context.live.verifying.discard(view.id)
        if view.id in context.ledger.damaged:  # what could not be read is there again
            context.record(j.CheckpointDamaged(time=context.clock(), id=view.id, reason=""))
        return ""
