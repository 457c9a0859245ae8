"""`[probe]`: the process that answers an operator's prompts while the run goes on."""

from __future__ import annotations

import re

import msgspec

from midwatch.recipe.bounds import MOST_COUNT, bounded


class Probe(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    device: str = "cpu"
    """Where it computes, on the controller's machine: `cpu`, `cuda` or `cuda:N`; a GPU's memory is then shared with the ranks."""
    threads: int = 1
    """Torch threads on a CPU."""
    idle_seconds: float = 600.0
    """Time without a prompt after which it ends."""
    checkpoints: int = 2
    """Kept loaded: those used last."""

    def problems(self) -> list[tuple[str, str]]:
        found = bounded(self, 1, MOST_COUNT, ("threads", "checkpoints"))
        if not self.idle_seconds > 0:
            found.append(("idle_seconds", "must be above 0"))
        if not re.fullmatch(r"cpu|cuda(:\d+)?", self.device):
            found.append(("device", f'must be "cpu", "cuda" or "cuda:N", but it is "{self.device}"'))
        return found
