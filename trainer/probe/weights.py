"""Tensors of a checkpoint, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from midwatch.checkpoint_format import manifest
from midwatch.checkpoint_format.manifest import TensorEntry


class Weights(Mapping[str, Tensor]):
    """Tensors of a checkpoint; each is read, and verified, when it is looked at, so that one at a time is held twice."""

    def __init__(self, directory: Path, entries: Mapping[str, TensorEntry]) -> None:
        self._directory, self._entries = directory, entries

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> Tensor:
        """Raises CheckpointError, naming the file, where it is not what was written."""
        entry = self._entries[name]
        found = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype))
        for chunk in entry.chunks:
            if chunk.bytes:
                raw = torch.empty(chunk.bytes, dtype=torch.uint8)
                manifest.read_chunk(self._directory, chunk, raw.numpy().data)
                box = tuple(slice(offset, offset + size) for offset, size in zip(chunk.offsets, chunk.sizes, strict=True))
                found[box] = raw.view(found.dtype).view(chunk.sizes)
        return found
