"""Checkpoints on disk against checkpoints in the journal: what is out of sight, what the journal does not know, what is golden.

The journal may be incomplete: it could not be written, or a part of it is lost. The storage may be away for a while. So nothing is
forgotten because it is not seen, and of two statements about a checkpoint the safer one holds.

a directory that the journal does not know: every byte is verified, then it is adopted; as suspect where its metrics are unknown
a checkpoint whose directory is not there:  it is in `Ledger.missing` until it is back; all at once: the storage is away
a directory with a golden mark:             the checkpoint is golden
"""

from __future__ import annotations

import asyncio
import logging
import math

import msgspec

from launcher import checkpoints as files
from launcher import journal as j
from launcher.controller.office import Office
from launcher.metrics.columns import Segment
from launcher.paths import RunPaths, mount_of, read_address
from shards.decoding import DecodeError, json_as

log = logging.getLogger("launcher.controller")

UNKNOWN = "it was found on disk, and the metrics of its step are not known"


def floors(paths: RunPaths) -> j.Floors:
    """The highest numbers that the run directory speaks of outside the journal."""
    address = read_address(paths.address)
    term = address.term if address is not None else 0
    generation = address.generation if address is not None else 0
    lineage = 0
    for name in files.listed(paths.checkpoints) or ():
        try:
            manifest = files.read_manifest(paths.checkpoints / name)
        except files.CheckpointError:
            continue
        generation, lineage = max(generation, manifest.generation), max(lineage, manifest.state.lineage)
    return j.Floors(term=term, generation=generation, lineage=lineage)


def report_losses(office: Office) -> None:
    """Alarms about what the journal has lost, each once in the run's life."""
    for text in (*(f"a journal entry is damaged: {place}" for place in office.journal.damaged), *office.journal.lost):
        office.note_once(text)


def look(office: Office, names: frozenset[str] | None) -> str:
    """Compares the checkpoints that the journal knows with the directories that there are (None: that could not be read).

    Returns why all of them are out of sight; empty where they are not.
    """
    ledger, live, root = office.ledger, office.live, office.paths.checkpoints
    missing = frozenset(id for id in ledger.checkpoints if names is None or id not in names)
    away = bool(missing) and len(missing) == len(ledger.checkpoints)
    if away and not live.storage_fault:
        live.storage_fault = (
            f"none of the {len(missing)} checkpoints is in {root} ({mount_of(root)}): is the storage mounted? "
            "They are used again as soon as they are back"
        )
        office.note("alarm", live.storage_fault, office.live.step)
    elif not away and live.storage_fault:
        live.storage_fault = ""
        office.note("info", f"the checkpoints in {root} are back", office.live.step)
    if not away and (gone := missing - ledger.missing):
        office.note("alarm", f"not in {root} any more: {', '.join(sorted(gone))}; used again when back", office.live.step)
    if missing != ledger.missing:
        ledger.missing = missing
        office.touch()
    return live.storage_fault


def look_now(office: Office) -> str:
    """The same, with the directories that there are at this moment."""
    return look(office, files.listed(office.paths.checkpoints))


async def look_for(office: Office) -> str:
    """The same, from a thread: storage that is away may take long to say so."""
    return look(office, await asyncio.to_thread(files.listed, office.paths.checkpoints))


def keep_goldens(office: Office) -> None:
    """A directory with a golden mark is golden, whatever the journal says; one without gets the mark that the journal knows."""
    ledger, root = office.ledger, office.paths.checkpoints
    for view in list(ledger.checkpoints.values()):
        if view.id in ledger.missing:
            continue
        marked = files.is_golden(root, view.id)
        if marked and not view.golden:
            office.note("warning", f"{view.id} is golden by the mark in its directory, not by the journal; it is kept as golden")
            office.record(j.GoldenMarked(time=office.clock(), id=view.id, golden=True))
        elif view.golden and not marked:
            try:
                files.mark_golden(root, view.id, True)
            except OSError as error:
                log.warning("%s: the golden mark cannot be written: %s", view.id, error)


async def adopt(office: Office) -> None:
    """Takes checkpoints into the journal that lie there whole; deletes what was never finished, where no ranks can be writing."""
    ledger, root = office.ledger, office.paths.checkpoints
    names = await asyncio.to_thread(files.listed, root) or frozenset()
    for name in sorted(names):
        hidden = name.startswith(".")
        if name in ledger.checkpoints or (hidden and (ledger.generation_live or files.unfinished(root, name))):
            continue
        try:
            manifest = await asyncio.to_thread(files.verify, root / name)
        except files.CheckpointError as error:
            _reject(office, name, str(error))
            continue
        if hidden and (manifest.generation != ledger.generation or name != f".g{manifest.generation}-{manifest.id}"):
            _reject(office, name, f"it is of generation {manifest.generation}")
        elif not hidden and manifest.id != name:
            _reject(office, name, f"its manifest says {manifest.id}")
        elif manifest.id not in ledger.checkpoints:
            try:
                files.commit(root, name, manifest.id)
                _record(office, manifest)
            except files.CheckpointError as error:
                _reject(office, name, str(error))
    if not ledger.generation_live:
        await asyncio.to_thread(files.sweep, root)
    await look_for(office)
    keep_goldens(office)


def _reject(office: Office, name: str, why: str) -> None:
    """What cannot be used: a writer's own directory goes, a checkpoint's stays where it is and is named."""
    root = office.paths.checkpoints
    if name.startswith("."):
        log.info("%s is deleted: %s", root / name, why)
        files.discard(root, name)
    else:
        office.note_once(f"{root / name} is not in the journal and cannot be taken into it: {why}")


def _record(office: Office, manifest: files.Manifest) -> None:
    root, state = office.paths.checkpoints, manifest.state
    digest, size = files.digest_of(root / manifest.id), sum(record.bytes for record in manifest.files.values())
    known = _own_record(office, manifest.id, digest)
    loss, finite = _metrics(office, state.lineage, state.step)
    entry = known or j.CheckpointCommitted(
        time=office.clock(),
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
    now = office.clock()
    office.record(msgspec.structs.replace(entry, time=now, report=0, adopted=True))
    words = f" ({entry.doubt})" if entry.doubt else ""
    office.note("warning", f"checkpoint {manifest.id} was not in the journal; it is whole, and is taken into it{words}", state.step)


def _own_record(office: Office, id: str, digest: str) -> j.CheckpointCommitted | None:
    """What the journal has said of it, by the copy in its directory."""
    try:
        entry = json_as((office.paths.checkpoints / id / files.RECORD).read_bytes(), j.CheckpointCommitted)
    except (OSError, DecodeError):
        return None
    return entry if entry.id == id and entry.digest == digest else None


def _metrics(office: Office, lineage: int, step: int) -> tuple[float | None, bool]:
    """The loss of a step, and whether it and the gradient are known and finite."""
    segments = [Segment(lineage, -1, step)]
    loss = office.metrics.latest("train/loss", segments)
    norm = office.metrics.latest("train/grad_norm", segments)
    there = loss is not None and norm is not None and loss.step == norm.step == step
    finite = there and math.isfinite(loss.value) and math.isfinite(norm.value)  # type: ignore[union-attr]  # `there` says so
    return (loss.value if finite and loss is not None else None), finite
