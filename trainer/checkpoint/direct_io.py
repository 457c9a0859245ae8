"""A file written once, front to back, past the page cache where its file system can: what is too big to be worth caching.

Through the page cache the kernel copies each byte into pages that it must find first, on cores that training could use. With
`O_DIRECT` the device reads our memory; it asks that memory, lengths and places in the file be multiples of a block.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from trainer.transfer import host_memory

BLOCK = 4096
"""Bytes; a multiple of any usual device's block, and a page's divisor."""
_DIRECT = getattr(os, "O_DIRECT", 0)


def block_tensor(shape: torch.Size, dtype: torch.dtype, pinned: bool = False) -> Tensor:
    """An empty tensor whose memory begins at a block's border and goes on, in zeros, to the next border after its end."""
    size = shape.numel() * dtype.itemsize
    padded = size + -size % BLOCK
    # torch's own allocator promises 64 bytes only.
    return host_memory(max(padded, BLOCK), pinned=pinned)[:size].view(dtype).view(shape)


def blocks(tensor: Tensor) -> memoryview:
    """Its bytes, zeros added up to a whole block: its own memory where that is laid out as `block_tensor` does, else a copy's."""
    size = tensor.numel() * tensor.element_size()
    padded = size + -size % BLOCK
    storage = tensor.untyped_storage()
    start = tensor.data_ptr() - storage.data_ptr()
    if tensor.is_contiguous() and tensor.data_ptr() % BLOCK == 0 and start + padded <= storage.nbytes():
        whole = torch.empty(0, dtype=torch.uint8).set_(storage, start, (padded,))  # type: ignore[call-overload]  # its stub knows no storage
        if not whole[size:].any():
            return memoryview(whole.numpy())
    copy = block_tensor(tensor.shape, tensor.dtype)
    copy.copy_(tensor)
    return blocks(copy)


class Sink:
    """Makes a file that must not be there yet. Raises OSError."""

    def __init__(self, file: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        try:
            self._descriptor = os.open(file, flags | _DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            with contextlib.suppress(FileNotFoundError):  # a file system may make it before it refuses
                file.unlink()
            self._descriptor = os.open(file, flags, 0o666)

    def write(self, data: memoryview) -> None:
        """Appends whole blocks that begin at a block's border."""
        while data:
            try:
                data = data[os.write(self._descriptor, data) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._cached():
                    raise

    def finish(self, size: int) -> None:
        """Cuts off the last block's zeros, and returns when all that is left is on the disk."""
        os.ftruncate(self._descriptor, size)
        os.fsync(self._descriptor)

    def _cached(self) -> bool:
        """Goes on through the page cache; whether that is a change."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)
        return bool(flags & _DIRECT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._descriptor)
