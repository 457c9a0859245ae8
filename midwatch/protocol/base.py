"""What all messages share: version, limits, verbs, states, and the strict and the lenient kind of struct."""

from __future__ import annotations

import enum
from typing import Literal

import msgspec

VERSION = 2
MAX_FRAME = 16 * 1024 * 1024
"""Bytes of the largest frame that is accepted."""

CERTAIN_STATUS = 78
"""Exit status of a rank whose next start would end in the same way: the recipe or the software is wrong."""

State = Literal["building", "starting", "training", "paused", "recovering", "released", "finished", "failed"]
Verb = str
"""A command's name; midwatch.commands has them all."""


class Op(enum.IntEnum):
    """What ranks do at a boundary; the word that rank 0 broadcasts."""

    NONE = 0
    PAUSE = 1
    RESUME = 2
    CHECKPOINT = 3
    ROLLBACK = 4
    ADVANCE = 5
    SET = 6
    STOP = 7
    STOP_NOW = 8
    RELEASE = 9
    REGROUP = 10
    HOLD = 11
    """No command, and without a number: `Hold` is on, and off."""
    UNHOLD = 12


PHASES = ("loading", "training", "evaluating", "sampling", "generating", "scoring", "saving", "paused", "ending")
"""What ranks can be at."""
PHASE_WORDS = {"generating": "writing responses", "scoring": "scoring responses"}
"""What an operator is told of a phase, where its name does not say it."""


class StrictMessage(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag=True, kw_only=True):
    """A message in which an unknown field is an error."""


class LenientMessage(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """A message in which unknown fields are passed over."""
