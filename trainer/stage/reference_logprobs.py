"""The reference's log-probabilities of a stage's preference pairs, worked out once and kept as columns, as shards are.

With them a stage trains without the reference in memory, and without its forward at each step. They lie in
RUN/made/reference/KEY, the key being of what decides them: the reference's checkpoint, the shards, the context. Each file holds,
for each pair of a source, the summed log-probabilities of the chosen response and of the rejected one; float32, as the bits of
uint32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import xxhash

from midwatch.recipe import Stage
from shards.common.errors import ShardError
from shards.format.seekable_zstd import ColumnWriter
from shards.sampling.batches import Batch
from trainer.batches import may_trim, micro_batches, samples_a_replica, share
from trainer.checkpoint.dcp_files import make_below
from trainer.distributed.mesh import share as share_bytes
from trainer.distributed.mesh import together
from trainer.model.sharded_model import ShardedModel
from trainer.objectives.preference_pairs import responses
from trainer.stage.reference_sums import FRAME_ITEMS, ReferenceSums
from trainer.stage.training import Training


def prepare(training: Training) -> bool:
    """Sees to it that `training.sums` is there; whether it is: else it was broken off, or put off. By all ranks alike."""
    stage, run = training.stage.stage, training.stage
    if training.sums is not None:
        return True
    place = training.root / "made" / "reference" / _key(training)
    wanted: list[tuple[tuple[str, str], int, Callable[[int, int], Batch]]] = []
    for name in run.feed.named:
        wanted.append(((name, "train"), run.feed.samples_per_epoch(name), _of_source(training, name)))
    for task in run.tasks:
        if task.pairs and task.stage is stage:
            wanted.append(((task.name, "held_out"), len(task.samples), task.samples.read))
    files = {at: place / f"{at[0]}-{at[1]}.zst" for at, _, _ in wanted}
    there = _led(training, lambda: all(file.is_file() for file in files.values()))
    if not there:
        reference = training.reference or training.load_reference()
        training.phase("scoring")
        for at, count, read in wanted:
            if not _write(training, reference, files[at], count, read):
                return False
        training.phase("training")
    found: list[ReferenceSums] = []
    problem = together(lambda: found.append(ReferenceSums(files)), training.world, ShardError)
    if problem:
        training.hold_for_data(problem)
        return False
    training.sums = found[0]
    training.roles = replace(training.roles, reference=None, reference_key="")
    return True


def _key(training: Training) -> str:
    stage, digests = training.stage.stage, sorted(training.stage.feed.digests.items())
    tasks = [task for task in training.stage.tasks if task.pairs and task.stage is stage]
    held = [(task.name, task.samples.digest, len(task.samples)) for task in tasks]
    return xxhash.xxh3_64_hexdigest(repr((training.progress.reference, digests, held, stage.context, _positions(stage))).encode())


def _positions(stage: Stage) -> tuple[object, ...]:
    return stage.rope, stage.position_factor


def _of_source(training: Training, name: str) -> Callable[[int, int], Batch]:
    return lambda start, stop: training.stage.feed.samples(name, start, stop)


def _append(to: list[Batch], read: Callable[[int, int], Batch], first: int, last: int) -> None:
    to.append(read(first, last))


def _led(training: Training, ask: Callable[[], bool]) -> bool:
    """What rank 0 sees, for all of them."""
    return bool(share_bytes(b"1" if training.world.is_rank_zero and ask() else b"", training.world.control))


@torch.no_grad()
def _write(training: Training, reference: ShardedModel, file: Path, count: int, read: Callable[[int, int], Batch]) -> bool:
    """One source's; whether it was written."""
    world, stage = training.world, training.stage.stage
    if _led(training, file.is_file):
        return True
    stride, trims = stage.micro_batch * reference.replicas, may_trim(training.recipe, stage)
    with ExitStack() as kept:
        writer = None
        if world.is_rank_zero:
            make_below(training.root, file.parent)
            writer = kept.enter_context(ColumnWriter(file, "uint32", FRAME_ITEMS))
        for start in range(0, count, stride):
            if training.boundary.peek():
                return False
            length = min(stride, count - start)
            first, last = share(start, length, reference.replica, reference.replicas)
            batches: list[Batch] = []
            bound = partial(_append, batches, read, first, last)
            problem = together(bound, world, ShardError)
            if problem:
                training.hold_for_data(problem)
                return False
            samples = samples_a_replica(length, reference.replicas)
            (rows,) = micro_batches(batches[0], 2, samples, samples, world.device, trims)
            sums = responses(reference.log_probs(rows), rows).view(2, -1)[:, : last - first]
            every = torch.zeros(length, 2, device=world.device)
            if reference.is_replica_leader:
                every[first - start : last - start] = sums.t()
            dist.all_reduce(every)
            if writer is not None:
                writer.append(every.cpu().numpy().reshape(-1).view("<u4"))
        if writer is not None:
            writer.close()
    reference.reshard()
    return _led(training, lambda: True)
