"""A play of faults over one run: each at a random moment, perhaps with a command under way, then undone and outlived."""

from __future__ import annotations

import os
import random
import time
from typing import NamedTuple

from midwatch.journal import entries as j
from midwatch.transport.client import ClientError
from tests.system.chaos.faults import MILD, Fault, Theatre

RECOVER_SECONDS = 90.0 * float(os.environ.get("CHAOS_PATIENCE", "1"))


class Cost(NamedTuple):
    """What faults cost, in seconds from the moment they struck; None where the ranks were not restarted."""

    faults: tuple[Fault, ...]
    seen: float | None
    """Until the generation was over."""
    agreed: float | None
    """Until the next one was decided upon."""
    restarted: float | None
    """Until its ranks trained."""
    stepped: float
    """Until a step was taken again."""
    repeated: int
    """Steps that were taken again."""


class Play:
    """Faults one after the other, by the dice."""

    def __init__(self, theatre: Theatre, seed: int) -> None:
        self._theatre, self._dice = theatre, random.Random(seed)
        self.costs: list[Cost] = []

    def act(self, *kinds: str | None) -> Cost:
        """Faults of these kinds (None: any) at once; returns when the run steps again and all is mended."""
        theatre, dice, run = self._theatre, self._dice, self._theatre.run
        before = run.wait(lambda s: s.state == "training" and s.step > 0, RECOVER_SECONDS)
        run.wait_step(before.step + 3, RECOVER_SECONDS)
        time.sleep(dice.uniform(0.0, 1.5))
        self._command()
        faults = theatre.draw_all(dice, kinds)
        struck, known = time.time(), len(list(run.entries()))
        for fault in faults:
            theatre.inflict(fault)
        waited = 0.0
        for fault in sorted(faults, key=lambda f: f.seconds):
            time.sleep(max(0.0, fault.seconds - waited))
            waited = max(waited, fault.seconds)
            theatre.undo(fault)
        self._recover(before.step, faults)
        cost = self._cost(faults, struck, known)
        self.costs.append(cost)
        if {f.kind for f in faults} <= MILD and cost.seen is not None:
            raise AssertionError(f"{faults[0]} cost the ranks' lives\n{run.story()}")
        return cost

    def _command(self) -> None:
        """Sometimes a command is under way when the fault strikes."""
        verb = self._dice.choice(("", "", "checkpoint", "pause", "golden", "rollback"))
        if verb == "":
            return
        run = self._theatre.run
        arguments: tuple[str, ...] = ()
        if verb in ("golden", "rollback"):
            there = [c for c in run.snapshot().checkpoints if c.on_line]
            if not there:
                return
            arguments = (there[-1].id,)
        run.midwatch(verb, str(run.root), *arguments, "--no-wait")

    def _recover(self, step: int, faults: tuple[Fault, ...]) -> None:
        """A few steps beyond the newest there were; a run that was paused, or moved and ended, is resumed, as an operator would."""
        run = self._theatre.run
        told = ", ".join(map(str, faults))
        deadline = time.monotonic() + RECOVER_SECONDS
        goal: int | None = None
        while time.monotonic() < deadline:
            try:
                seen = run.wait(lambda s: s.state in ("training", "paused", "failed", "finished", "released"), 30)
            except (AssertionError, ClientError, TimeoutError):
                continue
            if seen.state == "paused" or (seen.state == "released" and any(f.kind == "directory moved" for f in faults)):
                run.midwatch("resume", str(run.root), timeout=60)
            elif seen.state != "training":
                raise AssertionError(f"after {told} the run is {seen.state}: {seen.reason}\n{run.story()}")
            elif any(c.state in ("queued", "sent") for c in seen.commands):
                time.sleep(0.2)
            else:
                goal = goal if goal is not None else seen.step + 3
                if seen.step >= goal:
                    return
                time.sleep(0.1)
        raise AssertionError(f"after {told} the run does not train again\n{run.story()}")

    def _cost(self, faults: tuple[Fault, ...], struck: float, known: int) -> Cost:
        """known: entries of the journal before the faults. Times do not tell what came after: some faults set the clock."""
        run = self._theatre.run
        entries = [e for _, e in run.entries()][known:]

        def first(kind: type[j.JournalEntry], after: int = 0, **fields: str) -> tuple[int, float] | None:
            for place, e in enumerate(entries[after:], after):
                if isinstance(e, kind) and all(getattr(e, k) == v for k, v in fields.items()):
                    return place, e.time - struck
            return None

        ended, began = first(j.GenerationEnded), first(j.GenerationBegan)
        trained = first(j.StateChanged, began[0], state="training") if began is not None else None
        seen, agreed, restarted = (None if each is None else each[1] for each in (ended, began, trained))
        since = struck + (restarted if restarted is not None else 0.0)
        rows = [row for row in run.rows("train/loss") if row.time > since]
        stepped = min((row.time - struck for row in rows), default=float("nan"))
        repeated = sum(e.undone for e in entries if isinstance(e, j.LineageOpened) and e.lineage.cause == "crash")
        return Cost(faults, seen, agreed, restarted, stepped, repeated)
