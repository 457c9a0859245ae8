"""The errors that a user of shards can meet; their text names the thing, the place and the way out."""

from __future__ import annotations

from shards.common.decoding import brief


class ShardError(Exception):
    """Data that is damaged, missing or not what it is said to be, or a build that could not go on."""

    def __init__(self, message: object) -> None:
        super().__init__(brief(message))


class SpecError(ShardError):
    """What was asked for is wrong: a bad spec, a missing path, arguments that contradict each other."""


class BusyError(ShardError):
    """Another build is writing to the directory; it can be waited for."""
