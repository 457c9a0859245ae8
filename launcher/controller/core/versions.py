"""Versions of what a run depends on, without importing any of it."""

from __future__ import annotations

import functools
import platform
from importlib import metadata

_PACKAGES = ("midwatch", "torch", "numpy", "sentencepiece", "flash-attn", "nvidia-ml-py")


@functools.cache
def installed_versions() -> dict[str, str]:
    """Version of each package that is installed, of Python, and of the NVIDIA driver where there is one."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    driver = _driver()
    if driver:
        found["driver"] = driver
    return found


def _driver() -> str:
    try:
        with open("/proc/driver/nvidia/version", encoding="utf-8") as file:
            words = file.readline().split()
    except OSError:
        return ""
    return next((w for w in words if w[:1].isdigit() and "." in w), "")
