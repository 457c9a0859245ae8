"""Commands: the table of what each does in each state, and the reading of their arguments.

The table is the one source of docs/protocol.md's table and of the tests that try each cell.
"""

from __future__ import annotations

import enum
from typing import Any, get_args

from midwatch.protocol import Op, State, Verb


class Doing(enum.Enum):
    """What becomes of a command at once."""

    NOW = "now"
    """Carried out: sent to the ranks, or done by the controller where it concerns no rank."""
    QUEUE = "queued"
    """Kept until the ranks train or hold, then sent."""
    SHAPE = "shapes the next start"
    """Done by the controller without ranks: it decides what the next generation starts from."""
    REFUSE = "refused"


Cell = tuple[Doing, str]
NOW: Cell = (Doing.NOW, "")
QUEUE: Cell = (Doing.QUEUE, "")
SHAPE: Cell = (Doing.SHAPE, "")


def _no(reason: str) -> Cell:
    return (Doing.REFUSE, reason)


STATES: tuple[State, ...] = get_args(State)
VERBS: tuple[Verb, ...] = get_args(Verb)

_OVER = _no("the run has finished; start a new one")
_NO_STEPS = _no("the data is still being built and there are no steps yet; wait, or stop the run")
_NO_RANKS = _no("the ranks are released; resume first")
_FAILED = _no("no ranks are alive; resume, or roll back, first")


def _row(
    building: Cell, starting: Cell, training: Cell, paused: Cell, recovering: Cell, released: Cell, failed: Cell
) -> dict[State, Cell]:
    return {
        "building": building,
        "starting": starting,
        "training": training,
        "paused": paused,
        "recovering": recovering,
        "released": released,
        "finished": _OVER,
        "failed": failed,
    }


TABLE: dict[Verb, dict[State, Cell]] = {
    "pause": _row(QUEUE, QUEUE, NOW, _no("it is paused already"), QUEUE, _no("it is released already"), _FAILED),
    "release": _row(_NO_STEPS, QUEUE, NOW, NOW, QUEUE, _no("it is released already"), _FAILED),
    "resume": _row(
        _no("it is starting already"),
        _no("it is starting already"),
        _no("it is not paused"),
        NOW,
        _no("it restarts by itself"),
        SHAPE,
        SHAPE,
    ),
    "checkpoint": _row(_NO_STEPS, QUEUE, NOW, NOW, QUEUE, _NO_RANKS, _FAILED),
    "golden": dict.fromkeys(STATES, NOW),
    "ungolden": dict.fromkeys(STATES, NOW),
    "rollback": _row(_NO_STEPS, QUEUE, NOW, NOW, SHAPE, SHAPE, SHAPE),
    "advance": _row(_NO_STEPS, QUEUE, NOW, NOW, QUEUE, _NO_RANKS, _FAILED),
    "set": _row(_NO_STEPS, QUEUE, NOW, NOW, SHAPE, SHAPE, SHAPE),
    "cancel": dict.fromkeys(STATES, NOW),
    "stop": _row(NOW, QUEUE, NOW, NOW, NOW, NOW, NOW),
    "stop-now": _row(NOW, NOW, NOW, NOW, NOW, NOW, NOW),
    "regroup": _row(_NO_STEPS, QUEUE, NOW, NOW, _no("the ranks are being gathered anew already"), _NO_RANKS, _FAILED),
    "node-drain": _row(SHAPE, QUEUE, NOW, NOW, SHAPE, SHAPE, SHAPE),
    "node-add": _row(SHAPE, QUEUE, NOW, NOW, SHAPE, SHAPE, SHAPE),
    "node-quarantine": _row(SHAPE, SHAPE, NOW, NOW, SHAPE, SHAPE, SHAPE),
    "acknowledge": dict.fromkeys(STATES, NOW),
}

OPS: dict[Verb, Op] = {
    "pause": Op.PAUSE,
    "release": Op.RELEASE,
    "resume": Op.RESUME,
    "checkpoint": Op.CHECKPOINT,
    "rollback": Op.ROLLBACK,
    "advance": Op.ADVANCE,
    "set": Op.SET,
    "stop": Op.STOP,
    "stop-now": Op.STOP_NOW,
    "regroup": Op.REGROUP,
    "node-drain": Op.REGROUP,
    "node-add": Op.REGROUP,
}
"""The verbs that ranks carry out at a boundary."""

_ARGUMENTS: dict[Verb, dict[str, tuple[type | tuple[type, ...], bool]]] = {
    "golden": {"checkpoint": (str, True)},
    "ungolden": {"checkpoint": (str, True)},
    "rollback": {"checkpoint": (str, True), "skip": (int, False), "lr_scale": ((int, float), False), "shown": (int, False)},
    "advance": {"to": (str, False)},
    "set": {"key": (str, True), "value": ((int, float), True)},
    "cancel": {"id": (str, True)},
    "node-drain": {"node": (str, True)},
    "node-add": {"node": (str, True)},
    "node-quarantine": {"node": (str, True)},
    "acknowledge": {"alarm": (str, True)},
}


def check_arguments(verb: Verb, arguments: dict[str, Any]) -> str:
    """Why the arguments are wrong; empty where they are right."""
    known = _ARGUMENTS.get(verb, {})
    for name in arguments:
        if name not in known:
            return f"{verb}: unknown argument {name!r}"
    for name, (kind, needed) in known.items():
        value = arguments.get(name)
        if value is None:
            if needed:
                return f"{verb}: the argument {name!r} is missing"
        elif not isinstance(value, kind) or isinstance(value, bool):
            return f"{verb}: {name} {value!r} is of the wrong type"
    if arguments.get("skip", 0) < 0:
        return "rollback: skip must not be negative"
    scale = arguments.get("lr_scale", 1.0)
    if not 0 < scale <= 1000:
        return "rollback: the learning rate's scale must be above 0 and at most 1000"
    return ""


def describe(verb: str, arguments: dict[str, Any]) -> str:
    """The command as an operator would type it."""
    words = ["stop --now" if verb == "stop-now" else verb.replace("node-", "node ")]
    words += [str(arguments[k]) for k in ("checkpoint", "id", "key", "value", "node", "alarm") if k in arguments]
    if arguments.get("skip"):
        words.append(f"--skip {arguments['skip']}")
    if arguments.get("lr_scale", 1.0) != 1.0:
        words.append(f"--lr-scale {arguments['lr_scale']:g}")
    if arguments.get("to"):
        words.append(f"--to {arguments['to']}")
    return " ".join(words)
