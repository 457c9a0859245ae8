"""What happens inside a controller, as typed events: a part publishes what it has done, and others subscribe to the type.

Handlers are called at once, in the order in which they subscribed. An event is published after the state that it tells of is in
force, and after its journal entry where it has one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from midwatch.journal import entries as j

Event = TypeVar("Event")


@dataclass(frozen=True)
class StateChanged:
    """The run's state or its reason is another."""


@dataclass(frozen=True)
class CommandEnded:
    """A command's end is durable."""

    entry: j.CommandEnded


@dataclass(frozen=True)
class GenerationBegan:
    """A generation is journaled, and its agents are about to be told."""

    generation: int


@dataclass(frozen=True)
class RanksTrain:
    """The ranks of a generation have reported for the first time that they train or hold."""


@dataclass(frozen=True)
class RanksStopped:
    """The ranks have ended for a stop; their agents are being sent away."""


@dataclass(frozen=True)
class AgentsStopped:
    """After a stop, the agents have ended as well, or are out of reach."""


@dataclass(frozen=True)
class RunFailed:
    """Nothing starts until an operator decides."""

    reason: str


@dataclass(frozen=True)
class NodesToSpare:
    """There are nodes that the generation could have and has not."""

    names: str


@dataclass(frozen=True)
class RolledBack:
    """A rollback has begun: steps after its checkpoint are not in force."""


class Events:
    """The handlers of one controller."""

    def __init__(self) -> None:
        self._handlers: defaultdict[type, list[Callable[[Any], None]]] = defaultdict(list)

    def subscribe(self, kind: type[Event], handler: Callable[[Event], None]) -> None:
        self._handlers[kind].append(handler)

    def publish(self, event: object) -> None:
        for handler in self._handlers[type(event)]:
            handler(event)
