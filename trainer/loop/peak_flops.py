"""What a GPU could do at best, to say how much of it is used."""

from __future__ import annotations

import functools

import torch

_BFLOAT16 = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "H20": 148e12, "B200": 2250e12, "A100": 312e12, "L40S": 362e12}
"""Dense bfloat16 operations a second by a part of the device's name, from NVIDIA's data sheets; the first that fits."""


@functools.cache
def flops_per_second(device: torch.device, dtype: str) -> float | None:
    """None where it is not known: on a CPU, on other GPUs, at other precisions."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _BFLOAT16.items() if part in name), None)
