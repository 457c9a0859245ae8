"""The link of a run without a controller: metrics as JSON lines, checkpoints committed here and now."""

from __future__ import annotations

import logging
import queue
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import msgspec

from midwatch.checkpoint_format import directory as files
from midwatch.checkpoint_format import manifest, verify
from midwatch.checkpoint_format.directory import GOLDEN
from midwatch.protocol import CheckpointReady, CommitRefused, Committed, Metrics, Order, RankBody

log = logging.getLogger("trainer")

SUSPECT = "suspect"
"""File in a checkpoint whose step's loss or gradient was not finite."""


class LogLink:
    """Implements `trainer.control.reporting.ControllerLink`; takes no orders."""

    def __init__(self, root: Path, keep: int) -> None:
        self._checkpoints, self._keep = root / "checkpoints", keep
        self._answers: queue.SimpleQueue[Committed | CommitRefused] = queue.SimpleQueue()
        (root / "logs").mkdir(exist_ok=True)
        self._log: TextIO = (root / "logs" / "metrics.jsonl").open("a", encoding="utf-8")

    def send(self, body: RankBody) -> None:
        if isinstance(body, Metrics):
            self._log.write(msgspec.json.encode(body).decode() + "\n")
            self._log.flush()
        elif isinstance(body, CheckpointReady):
            self._commit(body)

    def next_order(self) -> Order | None:
        return None

    def next_answer(self) -> Committed | CommitRefused | None:
        try:
            return self._answers.get_nowait()
        except queue.Empty:
            return None

    def flush(self, timeout: float) -> bool:
        self._log.flush()
        return True

    def close(self) -> None:
        self._log.close()

    def _commit(self, body: CheckpointReady) -> None:
        place = self._checkpoints / body.directory
        try:
            if body.suspect:
                (place / SUSPECT).touch()
            files.commit(self._checkpoints, body.directory, body.id)
        except (OSError, manifest.CheckpointError) as error:
            self._answers.put(CommitRefused(id=body.id, reason=str(error)))
            return
        self._answers.put(Committed(id=body.id))
        prune(self._checkpoints, self._keep)


def committed(checkpoints: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Committed checkpoints with their states, the newest last; those whose manifest cannot be read are left out."""
    found = []
    for directory in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if directory.name.startswith(".") or not directory.is_dir():
            continue
        try:
            state = manifest.read(directory)[0].state
            order = (int(state["lineage"]), int(state["step"]), bool(state["ended"]))
        except (manifest.CheckpointError, KeyError, TypeError, ValueError):
            continue
        found.append((order, directory, state))
    return [(directory, state) for _, directory, state in sorted(found, key=lambda each: (each[0], each[1].name))]


def prune(checkpoints: Path, keep: int) -> None:
    """Deletes all but the newest `keep`, stage ends, and goldens."""
    passing = [directory for directory, state in committed(checkpoints) if not state["ended"] and not (directory / GOLDEN).exists()]
    for directory in passing[:-keep]:
        files.remove(checkpoints, directory.name)


def newest(checkpoints: Path, show: Callable[[str], None] = log.warning) -> str | None:
    """The newest committed checkpoint that verifies and is not suspect; says why others are passed over."""
    for directory, _ in reversed(committed(checkpoints)):
        if (directory / SUSPECT).exists():
            show(f"checkpoint {directory.name} is suspect: its step's loss was not finite; going back to an earlier one")
            continue
        problems = verify.problems(directory)
        if not problems:
            return str(directory.name)
        show(f"checkpoint {directory.name} is damaged, going back to an earlier one: " + "; ".join(problems))
    return None


def sweep(checkpoints: Path) -> None:
    """Removes what earlier generations left unfinished."""
    for directory in checkpoints.iterdir() if checkpoints.is_dir() else ():
        if directory.name.startswith((".g", ".deleting-")):
            shutil.rmtree(directory, ignore_errors=True)
