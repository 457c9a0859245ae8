"""The errors that a user of shards can meet; their text names the thing, the place and the way out."""

from __future__ import annotations

from shards.common.decoding import brief


class ShardError(Exception):
    """Data is damaged, missing or of another kind than stated, or a build failed."""

    def __init__(self, message: object) -> None:
        super().__init__(brief(message))


class SpecError(ShardError):
    """The request is wrong: a bad spec, a missing path, arguments that contradict each other."""


class BusyError(ShardError):
    """Another build is writing to the directory; the caller can wait for it."""
