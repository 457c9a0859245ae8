"""The directories of checkpoints: how one gets its name, loses it, is marked golden, and what is left of a killed writer."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from midwatch.checkpoint_format.manifest import FILE_NAME, CheckpointError
from shards.common.files import sync_directory

RECORD = "record.json"
"""A checkpoint's journal entry, in its own directory: it outlives the journal."""
GOLDEN = "GOLDEN"


def commit(root: Path, directory: str, name: str) -> None:
    """Gives a complete checkpoint its name, durably. Harmless when it has it already. Raises CheckpointError."""
    source, target = root / directory, root / name
    if target.exists() and not source.exists():
        return
    try:
        os.rename(source, target)
        sync_directory(root)
    except OSError as error:
        raise CheckpointError(f"{source}: cannot become {target.name}: {error.strerror}") from None


def mark_golden(root: Path, name: str, golden: bool) -> None:
    """Leaves or takes away the mark in the checkpoint's directory."""
    mark = root / name / GOLDEN
    if golden:
        mark.touch()
    else:
        mark.unlink(missing_ok=True)


def discard(root: Path, name: str) -> None:
    """Deletes a writer's directory that came to nothing."""
    shutil.rmtree(root / name, ignore_errors=True)


def remove(root: Path, name: str) -> None:
    """Deletes a checkpoint: first it loses its name, so that a half-deleted one is never mistaken for a whole one."""
    doomed = root / f".deleting-{name}"
    try:
        os.rename(root / name, doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def is_golden(root: Path, name: str) -> bool:
    """Whether the checkpoint's directory says so."""
    return (root / name / GOLDEN).exists()


def listed(root: Path) -> frozenset[str] | None:
    """Names of all directories in the checkpoint directory; None where it cannot be read."""
    try:
        return frozenset(entry.name for entry in os.scandir(root) if entry.is_dir())
    except OSError:
        return None


def unfinished(root: Path, name: str) -> bool:
    """Whether a directory is no whole checkpoint's: half written or half deleted."""
    return name.startswith(".deleting-") or (name.startswith(".") and not (root / name / FILE_NAME).exists())


def sweep(root: Path) -> list[str]:
    """Deletes what is half written or half deleted; the names of those deleted. Nobody may be writing."""
    swept = [name for name in sorted(listed(root) or ()) if unfinished(root, name)]
    for name in swept:
        shutil.rmtree(root / name, ignore_errors=True)
    return swept
