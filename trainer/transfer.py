"""Between host and device without waiting for what the device has been asked before.

On CUDA a copy out of pageable memory, and `tolist` or `item` on a tensor of the device, waits for all that is queued. Both go
through pinned memory here.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor


def on_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers of the host's: a list, a list of lists, or an array."""
    return sent(torch.as_tensor(values, dtype=dtype), device)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's to the device. torch keeps the pinned memory until the copy is done."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


def host_memory(size: int, *, pinned: bool) -> Tensor:
    """So many bytes of zeros, uint8, that begin at a page's border; pinned: so that copies between them and a GPU need not wait.

    torch's own pinned memory is rounded up to a power of two, which takes up to twice what was asked for. This takes whole pages.
    Raises RuntimeError where they cannot be pinned.
    """
    memory = _Pages(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    found = torch.frombuffer(memory, dtype=torch.uint8)
    if pinned:
        memory.pin(found.data_ptr())
    return found[:size]


class _Pages(mmap.mmap):
    """Memory that a tensor keeps alive, and that is unpinned before it goes."""

    address: int | None = None

    def pin(self, address: int) -> None:
        if status := int(_cudart().cudaHostRegister(address, len(self), 0)):
            raise RuntimeError(f"{len(self):,} bytes of host memory cannot be pinned: CUDA error {status} (see `ulimit -l`)")
        self.address = address

    def __del__(self) -> None:
        if self.address is not None:
            _cudart().cudaHostUnregister(self.address)


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]  # torch leaves it untyped


class HostCopy:
    """A tensor of the device's on its way to the host. `tolist` waits for that copy alone, not for what was queued after it."""

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._values = values
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            self._arrived.record(torch.cuda.current_stream(values.device))

    def tolist(self) -> Any:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()
