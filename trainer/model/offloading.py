"""Tensors that autograd keeps for the backward wait in the host's memory, and neither way there waits for the device.

As `torch.autograd.graph.save_on_cpu`, which rounds pinned memory up to a power of two, and whose copies to the host are waited for.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from trainer.transfer import host_memory


class HostBuffers:
    """Pinned memory that is used again from step to step, as pinning takes longer than copying.

    All copies must be on one stream: a buffer that is taken again is then filled after it was read.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """A buffer of `size` bytes or more, uint8. There are never more of them than were in use at a time."""
        fitting = [buffer for buffer in self._free if len(buffer) >= size]
        if not fitting:
            if self._free:  # all too small: a larger one takes the place of one of them
                self._finish()
                self._free.pop()
            return host_memory(size, pinned=self.device.type == "cuda")
        found = min(fitting, key=len)
        self._free = [buffer for buffer in self._free if buffer is not found]
        return found

    def give_back(self, buffer: Tensor) -> None:
        self._free.append(buffer)

    def _finish(self) -> None:
        """Waits for copies from buffers that are about to be unpinned."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()


class _Waiting:
    """A tensor in the host's memory; its buffer is given back with it."""

    @torch.no_grad()
    def __init__(self, x: Tensor, buffer: Tensor, buffers: HostBuffers) -> None:
        self._device, self._buffer, self._buffers = x.device, buffer, buffers
        self._values = buffer[: x.nbytes].view(x.dtype).view(x.shape)
        self._values.copy_(x, non_blocking=True)

    def fetch(self) -> Tensor:
        return self._values.to(self._device, non_blocking=True, copy=True)

    def __del__(self) -> None:
        self._buffers.give_back(self._buffer)


def on_host(buffers: HostBuffers) -> saved_tensors_hooks:
    """Within it, what autograd keeps of the buffers' device waits on the host."""

    def pack(x: Tensor) -> Tensor | _Waiting:
        return _Waiting(x, buffers.take(x.nbytes), buffers) if x.device == buffers.device and x.numel() else x

    def unpack(kept: Tensor | _Waiting) -> Tensor:
        return kept.fetch() if isinstance(kept, _Waiting) else kept

    return saved_tensors_hooks(pack, unpack)


@functools.cache
def buffers_of(device: torch.device) -> HostBuffers:
    """This process's, for a device."""
    return HostBuffers(device)
