"""What becomes of a command in each state of a run."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from midwatch.protocol import State


class Doing(enum.Enum):
    """What the controller does with a command that it has accepted."""

    NOW = "now"
    """It is carried out: sent to the ranks, or done by the controller if it concerns no rank."""
    QUEUE = "queued"
    """It waits until the ranks train or hold, and is sent then."""
    SHAPE = "shapes the next start"
    """The controller carries it out without ranks: it decides what the next generation starts from."""
    REFUSE = "refused"


Cell = tuple[Doing, str]
"""What is done, and the reason of a refusal."""
NOW: Cell = (Doing.NOW, "")
QUEUE: Cell = (Doing.QUEUE, "")
SHAPE: Cell = (Doing.SHAPE, "")


def no(reason: str) -> Cell:
    return (Doing.REFUSE, reason)


OVER = no("the run has finished; start a new one")
NO_STEPS = no("the data is still being built and there are no steps yet; wait, or stop the run")
NO_RANKS = no("the ranks are released; resume first")
FAILED = no("no ranks are alive; resume, or roll back, first")


def states(
    *,
    building: Cell,
    starting: Cell,
    training: Cell,
    paused: Cell,
    recovering: Cell,
    released: Cell,
    failed: Cell,
    finished: Cell = OVER,
) -> dict[State, Cell]:
    """One cell for each state."""
    return {
        "building": building,
        "starting": starting,
        "training": training,
        "paused": paused,
        "recovering": recovering,
        "released": released,
        "finished": finished,
        "failed": failed,
    }


ALWAYS = states(building=NOW, starting=NOW, training=NOW, paused=NOW, recovering=NOW, released=NOW, failed=NOW, finished=NOW)
STATES: tuple[State, ...] = tuple(ALWAYS)
