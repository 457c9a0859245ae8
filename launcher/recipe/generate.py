"""`[generate]`: the engine that writes what the model would say."""

from __future__ import annotations

import msgspec


class Generate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every rank has an engine with a whole copy of the model, and writes its share of the responses."""

    running: int = 64
    """Sequences that a rank continues at a time."""
    step_tokens: int = 2048
    """Tokens that pass through the model at a time."""
    cache_mb: int = 1024
    """Megabytes of a rank's KV cache at the most; never less than one whole sequence needs."""
    page: int | None = None
    """Tokens of a page of the KV cache: 16, or 256 on a GPU, where it is left out."""

    def problems(self) -> list[tuple[str, str]]:
        keys = ("running", "step_tokens", "cache_mb", "page")
        return [(key, "must be at least 1") for key in keys if getattr(self, key) is not None and getattr(self, key) < 1]
