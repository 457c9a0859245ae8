"""Weights out of a Hugging Face directory, straight to the ranks: each reads, by slices, the rows that it keeps, and no others."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from midwatch.checkpoint_format.manifest import CheckpointError
from midwatch.recipe.huggingface.files import Directory, DirectoryError, open_directory
from midwatch.recipe.huggingface.weights_map import MappedParameter, layout
from midwatch.recipe.model import Model
from midwatch.recipe.pretrained import directory_of
from trainer.distributed.mesh import World, box, first_problem, local, together
from trainer.model.sharded_model import ShardedModel

log = logging.getLogger("trainer")

ROWS = {"embedding.weight", "head.weight"}
"""Parameters with a row for each id; they have more rows than the directory's where the tokenizer has more ids."""


def load(model: ShardedModel, config: Model, world: World, seed: int) -> int:
    """Fills this rank's part of the model from what the recipe names; the bytes that this rank has read.

    Rows for ids that the directory's model does not have are drawn from the seed. Raises CheckpointError on all ranks alike.
    """
    opened: list[Directory] = []
    problem = together(lambda: opened.append(_open(config)), world, CheckpointError)
    if problem:
        raise CheckpointError(problem)
    try:
        read, found = _fill(model.parameters(), config, opened[0], seed), None
    except CheckpointError as error:
        read, found = 0, str(error)
    problem = first_problem(found, world)
    if problem:
        raise CheckpointError(problem)
    log.info("read %.1f MB of %s", read / 1e6, opened[0].path)
    return read


def _open(config: Model) -> Directory:
    assert config.source is not None
    try:
        import safetensors  # noqa: F401  # whether it is there
    except ImportError:
        raise CheckpointError(f"{config.source}: needs the package `safetensors` (pip install 'midwatch[train]')") from None
    try:
        directory = open_directory(directory_of(config.source))
    except DirectoryError as error:
        raise CheckpointError(str(error)) from None
    if config.source_digest is not None and directory.digest != config.source_digest:
        way = "put back what was there, or start a new run from it"
        raise CheckpointError(f"{directory.path}: is no longer what the recipe was made from ({way})")
    return directory


@torch.no_grad()
def _fill(parameters: Mapping[str, Tensor], config: Model, directory: Directory, seed: int) -> int:
    rows = int(directory.keys["vocabulary"])
    parts = layout(config, directory.family, rows)
    with ExitStack() as files:
        reader = TensorReader(directory, files)
        for name, parameter in parameters.items():
            mine, (own, *columns) = local(parameter), box(parameter)
            first = own.start
            for start, tensor in reader.rows(parts[name], first, first + len(mine), *columns):
                mine[start - first : start - first + len(tensor)].copy_(tensor)
            if name in ROWS and first + len(mine) > rows:
                drawn = _drawn(parameter.shape[0] - rows, parameter.shape[1], seed)
                begin = max(first, rows)
                mine[begin - first :].copy_(drawn[begin - rows : first + len(mine) - rows])
        return reader.bytes


def _drawn(rows: int, width: int, seed: int) -> Tensor:
    """Embeddings of new ids, the same on every rank: as wide as those that a model begins with."""
    return torch.empty(rows, width).normal_(0.0, 0.02, generator=torch.Generator().manual_seed(seed))


class TensorReader:
    """Slices of the directory's tensors. `bytes` counts what was read."""

    def __init__(self, directory: Directory, files: ExitStack) -> None:
        self.bytes = 0
        self._directory, self._files = directory, files
        self._open: dict[Path, Any] = {}

    def rows(self, part: MappedParameter, start: int, stop: int, columns: slice = slice(None)) -> Iterator[tuple[int, Tensor]]:
        """Rows [start, stop) of a parameter of ours, in pieces, each with its first row. Raises CheckpointError."""
        at = 0
        for piece in part.pieces:
            low, high = max(start, at), min(stop, at + piece.length)
            if low < high:
                begin = piece.start + low - at
                yield low, self._read(piece.tensor, slice(begin, begin + high - low), columns, part.transposed)
            at += piece.length

    def _read(self, name: str, rows: slice, columns: slice, transposed: bool) -> Tensor:
        from safetensors import SafetensorError, safe_open

        stored = self._directory.tensors[name]
        try:
            if stored.file not in self._open:
                self._open[stored.file] = self._files.enter_context(safe_open(stored.file, framework="pt"))
            whole = self._open[stored.file].get_slice(stored.name)
            flat = len(whole.get_shape()) == 1
            found: Tensor = whole[rows] if flat else whole[columns, rows] if transposed else whole[rows, columns]
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{stored.file}: tensor {stored.name!r} cannot be read: {error} (fetch it again)") from None
        self.bytes += found.numel() * found.element_size()
        return found.T if transposed else found
