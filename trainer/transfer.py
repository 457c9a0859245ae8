"""Between host and device without waiting for what the device has been asked before.

On CUDA a copy out of pageable memory, and `tolist` or `item` on a tensor of the device, waits for all that is queued. Both go
through pinned memory here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def on_device(values: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers of the host's: a list, a list of lists, or an array."""
    return sent(torch.as_tensor(values, dtype=dtype), device)


def sent(values: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's to the device. torch keeps the pinned memory until the copy is done."""
    return (values.pin_memory() if device.type == "cuda" else values).to(device, non_blocking=True)


class HostCopy:
    """A tensor of the device's on its way to the host. `tolist` waits for that copy alone, not for what was queued after it."""

    def __init__(self, values: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._values = values
        if values.device.type == "cuda":
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record(torch.cuda.current_stream(values.device))

    def tolist(self) -> Any:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._values.tolist()
