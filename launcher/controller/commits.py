"""Checkpoints from ready to committed, their pruning, and what an operator calls them by."""

from __future__ import annotations

import asyncio

from launcher import checkpoints as files
from launcher import journal as j
from launcher.controller.office import Office
from launcher.protocol import CheckpointReady, CheckpointView, CommitRefused, Committed


class Commits:
    """Only the controller commits, marks and deletes checkpoints."""

    def __init__(self, office: Office) -> None:
        self._office = office

    def take(self, ready: CheckpointReady, report: int) -> Committed | CommitRefused:
        """Commits a checkpoint that the ranks have written: checks generation and manifest, renames, journals."""
        office = self._office
        ledger = office.ledger
        if ready.id in ledger.checkpoints:
            self._answer(ready, True, "")
            return Committed(id=ready.id)
        root = office.paths.checkpoints
        try:
            if ready.generation != ledger.generation:
                raise files.CheckpointError(f"{ready.id}: written by generation {ready.generation}, which is over")
            if "/" in ready.directory or "/" in ready.id or ready.id.startswith("."):
                raise files.CheckpointError(f"{ready.id!r}: not a checkpoint's name")
            written = ready.directory if (root / ready.directory).exists() else ready.id
            manifest = files.check_sizes(root / written, ready.digest)
            if manifest.id != ready.id:
                raise files.CheckpointError(f"{ready.directory}: its manifest says {manifest.id}")
            files.commit(root, ready.directory, ready.id)
        except files.CheckpointError as error:
            self._answer(ready, False, str(error))
            office.note("alarm", f"checkpoint {ready.id} is refused: {error}", ready.step, report)
            return CommitRefused(id=ready.id, reason=str(error))
        office.record(
            *self._answers(ready, True, ""),
            j.CheckpointCommitted(
                time=office.clock(),
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
            ),
        )
        self.prune()
        return Committed(id=ready.id)

    def _answer(self, ready: CheckpointReady, ok: bool, reason: str) -> None:
        answers = self._answers(ready, ok, reason)
        if answers:
            self._office.record(*answers)

    def _answers(self, ready: CheckpointReady, ok: bool, reason: str) -> list[j.CommandEnded]:
        """The ends of the commands that asked for the checkpoint."""
        office = self._office
        found = []
        for number in ready.numbers:
            command = office.ledger.commands.get(number)
            if command is not None and command.state in ("queued", "sent") and command.verb == "checkpoint":
                found.append(
                    j.CommandEnded(
                        time=office.clock(),
                        author=command.author,
                        number=number,
                        state="done" if ok else "failed",
                        step=ready.step,
                        detail={"checkpoint": ready.id} if ok else {},
                        reason=reason,
                    )
                )
        return found

    def adopt(self) -> None:
        """After a takeover: forgets committed checkpoints that are gone, and clears away what was never finished."""
        office = self._office
        root = office.paths.checkpoints
        for view in list(office.ledger.checkpoints.values()):
            if not (root / view.id).is_dir():
                office.note("alarm", f"checkpoint {view.id} is gone from {root}")
                office.record(j.CheckpointPruned(time=office.clock(), id=view.id))
        if not office.ledger.generation_live:
            files.sweep(root, frozenset())

    def kept(self) -> set[str]:
        """Checkpoints that are never pruned, and those that the recipe keeps."""
        ledger = self._office.ledger
        keep = {c.id for c in ledger.checkpoints.values() if c.golden or c.ended}
        keep |= {line.fork for line in ledger.lineages.values() if line.fork is not None}
        keep |= self._office.live.verifying
        keep |= set(self._office.live.probed.values())
        for command in ledger.open_commands():
            if command.verb == "rollback":
                target = self.find(str(command.arguments.get("checkpoint")))
                keep |= {target.id} if isinstance(target, CheckpointView) else set()
        on_line = sorted((c for c in ledger.checkpoints.values() if c.on_line), key=lambda c: (c.step, c.time))
        keep |= {c.id for c in on_line[-self._office.recipe.checkpoint.keep :]}
        good = [c.id for c in on_line if not c.suspect]
        keep |= set(good[-1:])
        return keep

    def prune(self) -> None:
        """Deletes what need not be kept."""
        office = self._office
        keep = self.kept()
        for name in [c for c in office.ledger.checkpoints if c not in keep]:
            office.record(j.CheckpointPruned(time=office.clock(), id=name))
            files.remove(office.paths.checkpoints, name)

    def mark(self, name: str, golden: bool, author: str) -> str:
        """Marks or unmarks a checkpoint as golden; why not, or empty."""
        office = self._office
        view = self.find(name)
        if isinstance(view, str):
            return view
        if golden and view.suspect and not author:
            return f"{view.id} is suspect (its step's metrics were not finite); no rule may trust it"
        office.record(j.GoldenMarked(time=office.clock(), author=author, id=view.id, golden=golden))
        try:
            files.mark_golden(office.paths.checkpoints, view.id, golden)
        except OSError as error:
            office.note("warning", f"{view.id}: the mark in its directory cannot be written: {error.strerror}")
        return ""

    def find(self, name: str) -> CheckpointView | str:
        """The checkpoint an operator means; else why there is none."""
        return self._office.ledger.find(name)

    async def verify(self, view: CheckpointView) -> str:
        """Reads every byte of a checkpoint in a thread; what is wrong with it, or empty."""
        office = self._office
        office.live.verifying.add(view.id)
        try:
            digest = office.ledger.digests.get(view.id)
            await asyncio.to_thread(files.verify, office.paths.checkpoints / view.id, digest)
        except files.CheckpointError as error:
            return str(error)
        finally:
            office.live.verifying.discard(view.id)
        return ""
