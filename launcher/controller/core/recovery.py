"""Checkpoints on disk against checkpoints in the journal: what is out of sight, what the journal does not know, what is golden.

The journal may be incomplete: it could not be written, or a part of it is lost. The storage may be away for a while. So nothing is
forgotten because it is not seen, and of two statements about a checkpoint the safer one holds.

a directory that the journal does not know: every byte is verified, then it is adopted; as suspect where its metrics are unknown
a checkpoint whose directory is not there:  it is in `Ledger.missing` until it is back; all at once: the storage is away
a directory with a golden mark:             the checkpoint is golden
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from pathlib import Path
from typing import NamedTuple

import msgspec

from launcher.controller.core.context import ControllerContext
from midwatch.checkpoint_format import directory as files
from midwatch.checkpoint_format import verify
from midwatch.checkpoint_format.manifest import CheckpointError, ManifestHeader, digest_of, read_header
from midwatch.journal import entries as j
from midwatch.journal.journal import Floors
from midwatch.metrics.m4_columns import LineageSegment
from midwatch.run_directory import RunPaths, mount_of, read_address
from shards.common.decoding import DecodeError, json_as

log = logging.getLogger("launcher.controller")

MARK = ".storage"
"""A file among the checkpoints: where it is, all that is missing was deleted; where it is not, the storage is away."""
UNKNOWN = "it was found on disk, and the metrics of its step are not known"


def floors(paths: RunPaths) -> Floors:
    """The highest numbers that the run directory speaks of outside the journal."""
    address = read_address(paths.address)
    term = address.term if address is not None else 0
    generation = address.generation if address is not None else 0
    for file in (*paths.metrics.glob("*.chunk"), *paths.samples.glob("*.jsonl")):  # named after the term that wrote them
        number = file.name[:6]
        term = max(term, int(number) if number.isascii() and number.isdigit() else 0)
    lineage = 0
    for name in files.listed(paths.checkpoints) or ():
        try:
            manifest = read_header(paths.checkpoints / name)
        except CheckpointError:
            continue
        generation, lineage = max(generation, manifest.generation), max(lineage, manifest.position.lineage)
    return Floors(term=term, generation=generation, lineage=lineage)


def report_losses(context: ControllerContext) -> None:
    """Alarms about what the journal has lost, each once in the run's life."""
    for text in (*(f"a journal entry is damaged: {place}" for place in context.journal.damaged), *context.journal.lost):
        context.note_once(text)


class Listing(NamedTuple):
    """What the checkpoint directory holds."""

    names: frozenset[str] | None
    """Of directories; None: it cannot be read."""
    marked: bool
    """The mark is there that `look` leaves: this is the run's own storage, not what is there while that is not mounted."""


def listing(root: Path) -> Listing:
    return Listing(files.listed(root), (root / MARK).exists())


def look(context: ControllerContext, found: Listing) -> str:
    """Compares the checkpoints that the journal knows with the directories that there are.

    Returns why all of them are out of sight, with the storage that they are on; empty where they are not.
    """
    ledger, live, root = context.ledger, context.live, context.paths.checkpoints
    missing = frozenset(id for id in ledger.checkpoints if found.names is None or id not in found.names)
    away = bool(missing) and len(missing) == len(ledger.checkpoints) and not found.marked
    if ledger.checkpoints and len(missing) < len(ledger.checkpoints) and not found.marked:
        with contextlib.suppress(OSError):
            (root / MARK).touch()
    if away and not live.storage_fault:
        live.storage_fault = (
            f"none of the {len(missing)} checkpoints is in {root} ({mount_of(root)}): is the storage mounted? "
            "They are used again as soon as they are back"
        )
        context.note("alarm", live.storage_fault, context.live.step)
    elif not away and live.storage_fault:
        live.storage_fault = ""
        context.note("info", f"the checkpoints in {root} are back", context.live.step)
    if not away and (gone := missing - ledger.missing):
        context.note("alarm", f"not in {root} any more: {', '.join(sorted(gone))}; used again when back", context.live.step)
    if missing != ledger.missing:
        ledger.missing = missing
        context.touch()
    return live.storage_fault


def look_now(context: ControllerContext) -> str:
    """The same, with the directories that there are at this moment."""
    return look(context, listing(context.paths.checkpoints))


async def look_for(context: ControllerContext) -> str:
    """The same, from a thread: storage that is away may take long to say so."""
    return look(context, await asyncio.to_thread(listing, context.paths.checkpoints))


def keep_goldens(context: ControllerContext) -> None:
    """A directory with a golden mark is golden, whatever the journal says; one without gets the mark that the journal knows."""
    ledger, root = context.ledger, context.paths.checkpoints
    for view in list(ledger.checkpoints.values()):
        if view.id in ledger.missing:
            continue
        marked = files.is_golden(root, view.id)
        if marked and not view.golden:
            context.note("warning", f"{view.id} is golden by the mark in its directory, not by the journal; it is kept as golden")
            context.record(j.GoldenMarked(time=context.clock(), id=view.id, golden=True))
        elif view.golden and not marked:
            try:
                files.mark_golden(root, view.id, True)
            except OSError as error:
                log.warning("%s: the golden mark cannot be written: %s", view.id, error)


async def adopt(context: ControllerContext) -> None:
    """Takes checkpoints into the journal that lie there whole; deletes what was never finished, where no ranks can be writing."""
    async with context.adopting:
        root = context.paths.checkpoints
        for name in sorted(await asyncio.to_thread(files.listed, root) or ()):
            if name not in context.ledger.checkpoints:
                await _adopt_one(context, name)
        if not context.ledger.generation_live:
            await asyncio.to_thread(files.sweep, root)
        await look_for(context)
        keep_goldens(context)


async def _adopt_one(context: ControllerContext, name: str) -> None:
    """A directory that the journal does not know; what its manifest says is looked at before every byte is read."""
    ledger, root, hidden = context.ledger, context.paths.checkpoints, name.startswith(".")
    if hidden and (ledger.generation_live or files.unfinished(root, name)):
        return
    try:
        manifest = read_header(root / name)
        if hidden and (manifest.generation != ledger.generation or name != f".g{manifest.generation}-{manifest.id}"):
            raise CheckpointError(f"it is of generation {manifest.generation}")
        if not hidden and manifest.id != name:
            raise CheckpointError(f"its manifest says {manifest.id}")
        if (name, digest := digest_of(root / name)) in context.rejected:
            return
        try:
            await asyncio.to_thread(verify.verify, root / name)
        except CheckpointError:
            context.rejected.add((name, digest))
            raise
        if manifest.id not in ledger.checkpoints:
            files.commit(root, name, manifest.id)
            _record(context, manifest)
    except CheckpointError as error:
        if not hidden:  # a checkpoint's directory stays where it is
            context.note_once(f"{root / name} is not in the journal and cannot be added to it: {error}")
            return
        log.info("%s is deleted: %s", root / name, error)
        await asyncio.to_thread(files.discard, root, name)


def _record(context: ControllerContext, manifest: ManifestHeader) -> None:
    root, state = context.paths.checkpoints, manifest.position
    digest, size = digest_of(root / manifest.id), sum(record.bytes for record in manifest.files.values())
    known = _own_record(context, manifest.id, digest)
    loss, finite = _metrics(context, state.lineage, state.step)
    entry = known or j.CheckpointCommitted(
        time=context.clock(),
        id=manifest.id,
        digest=digest,
        step=state.step,
        lineage=state.lineage,
        stage=state.stage_name,
        stage_step=state.stage_step,
        ended=state.ended,
        generation=manifest.generation,
        bytes=size,
        suspect=not finite,
        seconds=0.0,
        stall_seconds=0.0,
        loss=loss,
        doubt="" if finite else UNKNOWN,
        settings=state.settings,
    )
    now = context.clock()
    context.record(msgspec.structs.replace(entry, time=now, report=0, adopted=True))
    words = f" ({entry.doubt})" if entry.doubt else ""
    context.note(
        "warning", f"checkpoint {manifest.id} was not in the journal; it is complete and has been added{words}", state.step
    )


def _own_record(context: ControllerContext, id: str, digest: str) -> j.CheckpointCommitted | None:
    """What the journal has said of it, by the copy in its directory."""
    try:
        entry = json_as((context.paths.checkpoints / id / files.RECORD).read_bytes(), j.CheckpointCommitted)
    except (OSError, DecodeError):
        return None
    return entry if entry.id == id and entry.digest == digest else None


def _metrics(context: ControllerContext, lineage: int, step: int) -> tuple[float | None, bool]:
    """The loss of a step, and whether it and the gradient are known and finite."""
    segments = [LineageSegment(lineage, -1, step)]
    loss = context.metrics.latest("train/loss", segments)
    norm = context.metrics.latest("train/grad_norm", segments)
    there = loss is not None and norm is not None and loss.step == norm.step == step
    finite = there and math.isfinite(loss.value) and math.isfinite(norm.value)  # type: ignore[union-attr]  # `there` says so
    return (loss.value if finite and loss is not None else None), finite
