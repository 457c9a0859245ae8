"""The building of tokenizer and shards, which a run's snapshot lists before its stages."""

from __future__ import annotations

BUILD = "data"
"""In the place of an objective."""


def is_build(objective: str) -> bool:
    """Whether what a snapshot lists is the building, not a stage."""
    return objective == BUILD
