"""What must hold whatever has gone wrong: told from the run directory alone, as somebody who comes later would."""

from __future__ import annotations

from midwatch.checkpoint_format.manifest import CheckpointError
from midwatch.checkpoint_format.verify import verify
from midwatch.journal import entries as j
from midwatch.journal.journal import read_journal
from midwatch.journal.run_state import Ledger
from tests.system.harness import Run


def broken(run: Run) -> list[str]:
    """Every promise that was not kept; none, if all is well."""
    entries = [e for _, e in run.entries()]
    ledger = run.ledger()
    return [
        *_commands(entries),
        *_commits(entries),
        *_steps(run),
        *_checkpoints(run, ledger),
        *(f"the journal is damaged: {place}" for place in read_journal(run.root / "journal").damaged),
    ]


def _commands(entries: list[j.Entry]) -> list[str]:
    """Each accepted command ends once, and those that ranks applied in the order in which they were accepted."""
    found = []
    accepted = [e.number for e in entries if isinstance(e, j.CommandAccepted)]
    ended = [e for e in entries if isinstance(e, j.CommandEnded)]
    if len(set(accepted)) != len(accepted):
        found.append("a command's number was given twice")
    for number in accepted:
        ends = [e for e in ended if e.number == number]
        if len(ends) != 1:
            found.append(f"command {number} ended {len(ends)} times")
    verbs = {e.number: e.verb for e in entries if isinstance(e, j.CommandAccepted)}
    in_line = [
        e.number for e in ended if e.state == "done" and e.step is not None and verbs.get(e.number) not in ("checkpoint", None)
    ]
    if in_line != sorted(in_line):
        found.append(f"commands were applied out of their order: {in_line}")
    return found


def _commits(entries: list[j.Entry]) -> list[str]:
    """Only the generation that lives, or has just ended, commits; and each checkpoint once."""
    found, newest, seen = [], 0, set()
    for entry in entries:
        if isinstance(entry, j.GenerationBegan):
            if entry.generation != newest + 1:
                found.append(f"generation {entry.generation} follows {newest}")
            newest = entry.generation
        elif isinstance(entry, j.CheckpointCommitted):
            if entry.generation != newest and not entry.adopted:
                found.append(f"generation {entry.generation} committed {entry.id} in the days of generation {newest}")
            if entry.id in seen and not entry.adopted:
                found.append(f"{entry.id} was committed twice")
            seen.add(entry.id)
    return found


def _steps(run: Run) -> list[str]:
    """Along the line in force each step is there once, and each takes the next samples."""
    rows = run.rows("train/loss")
    steps = [row.step for row in rows]
    missing = sorted(set(range(1, max(steps, default=0) + 1)) - set(steps))
    found = [f"steps {missing[:5]} are missing along the line in force"] if missing else []
    if len(set(steps)) != len(steps):
        found.append("a step is there twice along the line in force")
    tokens = [row.tokens for row in rows]
    if tokens != sorted(tokens):
        found.append("tokens run backwards along the line in force")
    return found


def _checkpoints(run: Run, ledger: Ledger) -> list[str]:
    """Every checkpoint that is committed and not pruned is whole; goldens are kept."""
    found = []
    for id, view in ledger.checkpoints.items():
        try:
            verify(run.root / "checkpoints" / id, ledger.digests.get(id))
        except CheckpointError as error:
            if id in run.ledger().checkpoints:  # else it was pruned while we looked
                found.append(f"{'golden ' if view.golden else ''}checkpoint {id}: {error}")
    return found
