"""What ended a generation first, and on which node: the other ranks and nodes are mostly its victims."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass

from midwatch.protocol import CERTAIN_STATUS, RankExit, RanksEnded

ENDED_BY_US = "ended by the controller"
_CONNECTION = re.compile(
    r"gloo|NCCL|nccl|DistNetworkError|DistStoreError|TCPStore|ProcessGroup|Socket Timeout"
    r"|Connection (closed|reset|refused)|Broken pipe"
)
"""How a collective fails whose other end has gone."""

_KILLED, _CERTAIN, _ERROR, _GONE, _UNTOLD, _VICTIM, _TOLD_TO_END = range(7)
"""Kinds of ends, the likeliest first cause first."""


@dataclass(frozen=True)
class Failure:
    """Why a generation ended."""

    node: str
    reason: str
    hard: bool = False
    """The node itself is to blame."""
    certain: bool = False
    """The next start would end in the same way."""


def first_failure(told: Mapping[str, RanksEnded], gone: Mapping[str, str] | None = None) -> Failure:
    """The first cause in what nodes have told of the end of their ranks; `gone`: nodes that can tell no more, and in words why.

    A rank that was killed, or that its device failed, comes before one that left by itself: its end broke the others' collectives.
    Errors of connections come last: they are what the end of another rank looks like. What has ended all nodes alike is no node's
    fault.
    """
    ends = [(node, *end) for node, message in told.items() if (end := _end_of(message)) is not None]
    ends += [(node, _GONE, words) for node, words in (gone or {}).items()]
    if not ends:
        return Failure(next(iter(told), ""), "they ended without giving a reason")
    node, kind, words = min(ends, key=lambda end: end[1])
    several = len(told) + len(gone or {}) > 1
    alike = (
        several and len(ends) == len(told) + len(gone or {}) and len({(kind, _signal_of(words)) for _, kind, words in ends}) == 1
    )
    hard = kind in (_KILLED, _GONE) and not alike
    reason = words if kind == _GONE or not several else f"{words} (on {node})"
    if alike and kind in (_KILLED, _GONE):
        reason += "; it was the same on every node"
    return Failure(node, reason, hard, kind == _CERTAIN)


def only_victims(told: Mapping[str, RanksEnded]) -> bool:
    """Whether nobody has told anything yet but what the end of another rank looks like."""
    return all((end := _end_of(message)) is None or end[0] in (_VICTIM, _TOLD_TO_END) for message in told.values())


def _end_of(message: RanksEnded) -> tuple[int, str] | None:
    """The kind of a node's end, and in words; None where its ranks ended as they should."""
    exits = [(kind, failed) for failed in message.exits if (kind := _kind(failed)) is not None]
    if exits:
        kind, failed = min(exits, key=lambda each: each[0])
        return kind, _describe(failed)
    if message.ok:
        return None
    if message.certain:
        return _CERTAIN, message.reason
    return (
        _TOLD_TO_END if message.reason == ENDED_BY_US else _VICTIM if _is_connection(message.reason) else _UNTOLD
    ), message.reason


def _kind(failed: RankExit) -> int | None:
    if failed.code == 0:
        return None
    if failed.code == CERTAIN_STATUS:
        return _CERTAIN
    if "CUDA error" in failed.message:
        return _KILLED
    if failed.code == -signal.SIGABRT:  # NCCL's watchdog ends a rank so when another one is gone
        return _VICTIM
    if failed.code < 0:
        return _KILLED
    return _VICTIM if _is_connection(failed.message) else _ERROR


def _is_connection(text: str) -> bool:
    return _CONNECTION.search(text) is not None


def _signal_of(words: str) -> str:
    found = re.search(r"killed by signal \d+", words)
    return found.group() if found else ""


def _describe(failed: RankExit) -> str:
    if failed.rank < 0:
        return failed.message
    how = f"was killed by signal {-failed.code}" if failed.code < 0 else f"ended with status {failed.code}"
    return f"rank {failed.rank} {how}" + (f": {failed.message}" if failed.message else "")
