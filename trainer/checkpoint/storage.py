"""Checkpoints on disk: what `torch.distributed.checkpoint` plans, in files of our own, without pickle.

The format, version 2. A checkpoint is a directory.

    rank-00000.bin      tensors' bytes as rank 0 had them, and so on for each rank that had any
    manifest.msgpack    what they are

A data file holds chunks: each a box of one tensor, row-major, little-endian, beginning at a multiple of 4096 bytes; zeros
between. The manifest is msgpack of

    {"format": 2,
     "files": {name: {"bytes": int, "xxh3": hex}},
     "tensors": {name: {"shape": [int], "dtype": "float32" and the like,
                        "chunks": [{"offsets": [int], "sizes": [int], "file": name, "start": int, "bytes": int, "xxh3": hex}]}},
     "state": {...}, "generation": int, "id": str, "world": int}

Hashes are xxh3_128 in hex: of whole files, so that anybody can verify a directory, and of each chunk, so that a rank verifies
just what it reads. The chunks of a tensor cover it without overlap, whatever number of ranks wrote them; empty ones are left
out. `state` is small and plain. The manifest's own hash, `digest`, names the checkpoint's whole content.

Hashes are computed while writing. Loading reads all that this rank needs, verifies it, agrees with all other ranks that
theirs is well too, and only then overwrites the first tensor. Nothing that is read is ever executed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from midwatch.checkpoint_format.manifest import FILE_NAME, CheckpointError, Manifest, MismatchError
from trainer.checkpoint.dcp_files import Abandoned, DcpFileReader, Writer, dtype_name

__all__ = ["Abandoned", "load", "save"]

assert sys.byteorder == "little", "checkpoints are little-endian, and so must the machine be"


def save(
    directory: Path,
    layout: dict[str, Tensor],
    parts: dict[str, Tensor],
    head: Manifest,
    group: dist.ProcessGroup,
    abandoned: Callable[[], bool],
) -> tuple[str, int]:
    """Writes a checkpoint from all ranks of the group; the manifest's digest and the bytes written, both 0 but on rank 0.

    layout: tensors (DTensors where sharded), for their shapes only. parts: this rank's part of each, contiguous, on the CPU.
    Raises CheckpointError on all ranks if one of them fails, naming the first.
    """
    writer = Writer(directory, head, dist.get_rank(group), abandoned)
    try:
        save_state(dict(layout), storage_writer=writer, planner=_PartsPlanner(parts), process_group=group)
    except CheckpointException as error:
        raise _first(error) from None
    return writer.digest, writer.bytes


def load(
    directory: Path,
    manifest: Manifest,
    targets: dict[str, Tensor],
    agree: Callable[[str | None], str | None],
    group: dist.ProcessGroup,
) -> None:
    """Reads the targets, by any number of ranks, in place.

    `agree` takes this rank's problem and gives the same answer on all. Raises CheckpointError before any tensor is touched,
    RuntimeError when it broke off later.
    """
    problem = agree(_mismatch(directory, manifest, targets))
    if problem:
        raise MismatchError(problem)
    reader = DcpFileReader(directory, manifest, agree)
    try:
        load_state(dict(targets), storage_reader=reader, planner=_PlainLoadPlanner(flatten_state_dict=False), process_group=group)
    except CheckpointException as error:
        found = _first(error)
        if reader.overwriting:
            raise RuntimeError(f"loading broke off half-way: {found}") from error
        raise found from None


def _mismatch(directory: Path, manifest: Manifest, targets: dict[str, Tensor]) -> str | None:
    for name, tensor in targets.items():
        entry = manifest.tensors.get(name)
        if entry is None:
            return f"{directory / FILE_NAME}: has no tensor {name!r} (it is of another model)"
        if entry.shape != tuple(tensor.shape) or entry.dtype != dtype_name(tensor.dtype):
            has, needs = f"{entry.dtype} {list(entry.shape)}", f"{dtype_name(tensor.dtype)} {list(tensor.shape)}"
            return f"{directory / FILE_NAME}: tensor {name!r} is {has}, the model's is {needs}"
    return None


class _PartsPlanner(DefaultSavePlanner):
    """Plans from the live tensors' layout, writes the copies staged for it."""

    _planned: ClassVar[list[tuple[str, torch.Size, torch.Size, torch.dtype]] | None] = None
    """The layout of DCP's cached plan."""

    def __init__(self, parts: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False, enable_plan_caching=True)
        self._parts = parts

    def create_local_plan(self) -> SavePlan:
        # DCP plans anew each time only to find that nothing has changed, holding Python's lock, which training waits for.
        self._layout = [(name, tensor.shape, self._parts[name].shape, tensor.dtype) for name, tensor in self.state_dict.items()]
        if self._layout == _PartsPlanner._planned and self._cached_plans_key in SavePlanner._cached_save_plan:
            return SavePlan([], usable=False)
        return super().create_local_plan()

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        finished = super().finish_plan(new_plan)
        _PartsPlanner._planned = self._layout
        return finished

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return self._parts[write_item.index.fqn]


class _PlainLoadPlanner(DefaultLoadPlanner):
    """Never reads anything but tensors."""

    def load_bytes(self, read_item: ReadItem, value: Any) -> None:
        raise CheckpointError(f"{read_item.dest_index.fqn}: is no tensor")


def _first(error: CheckpointException) -> CheckpointError:
    """The lowest rank's error out of the bundle that DCP makes on every rank."""
    rank, (cause, _) = min(error.failures.items())
    if isinstance(cause, CheckpointError):
        return cause
    return CheckpointError(f"rank {rank}: {type(cause).__name__}: {cause}")
