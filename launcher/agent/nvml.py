"""Asking NVML for what a card may not give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pynvml


class Gone(Exception):
    """The card answers nothing any more: it is `lost`, or it must be `reset`."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind, self.text = kind, text


def maybe(read: Callable[[], Any]) -> Any:
    """A figure, or None where the card does not give it. Raises Gone where it gives none any more."""
    try:
        return read()
    except pynvml.NVMLError as error:
        if error.value == pynvml.NVML_ERROR_GPU_IS_LOST:
            raise Gone("lost", "it is lost: it has fallen off the bus") from None
        if error.value == pynvml.NVML_ERROR_RESET_REQUIRED:
            raise Gone("reset", "it must be reset before it can be used") from None
        return None
