"""Prompts of clients: which checkpoints they mean, that these are kept meanwhile, and who gets the answers."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from launcher.controller.core.checkpoints import Commits
from launcher.controller.core.context import ControllerContext
from launcher.controller.probe.process import Prober
from midwatch import protocol as p

MOST_ASKS = 16
"""Of a client, under way at a time."""

Send = Callable[[p.ProbeAnswer], bool]
"""Hands an answer on; False where the client reads too slowly for it."""


class Probing:
    """One process for all clients. A client is whatever tells it from the others."""

    def __init__(self, context: ControllerContext, commits: Commits) -> None:
        self._context, self._commits = context, commits
        self._prober = Prober(context.paths, context.recipe)
        self._asks: dict[tuple[object, int], int] = {}
        """The process's number of each client's ask."""
        self.close = self._prober.close

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return self._prober.pid

    async def ask(self, client: object, ask: p.ProbeAsk, send: Send) -> None:
        """Answers by `send`, also when it cannot be answered."""
        ids: list[str] = []
        problem = ""
        if not 1 <= len(ask.checkpoints) <= 2:
            problem = f"{len(ask.checkpoints)} checkpoints are asked (ask one, or two side by side)"
        elif (client, ask.ask) in self._asks or sum(key[0] is client for key in self._asks) >= MOST_ASKS:
            problem = f"number {ask.ask} is under way, or {MOST_ASKS} others (wait for their ends)"
        for name in ask.checkpoints if not problem else ():
            found = self._commits.find("latest" if name == "newest" else name)
            if isinstance(found, str):
                problem = found
                break
            ids.append(found.id)
        if problem:
            for which, name in enumerate(ask.checkpoints or ("",)):
                send(p.ProbeEnd(ask=ask.ask, which=which, checkpoint=name, finish="failed", problem=problem))
            return
        key = (client, ask.ask)
        kept = self._context.live.probed
        left = set(range(len(ids)))

        def deliver(answer: p.ProbeAnswer) -> None:
            if isinstance(answer, p.ProbeEnd):
                left.discard(answer.which)
                del kept[client, ask.ask, answer.which]
            if not left:
                del self._asks[key]
            if not send(answer):
                self.stop(client, ask.ask)

        self._asks[key] = 0
        for which, id in enumerate(ids):
            kept[client, ask.ask, which] = id
        number = await self._prober.ask(msgspec.structs.replace(ask, checkpoints=tuple(ids)), deliver)
        if key in self._asks:
            self._asks[key] = number

    def stop(self, client: object, ask: int) -> None:
        self._prober.stop(self._asks.get((client, ask), 0))

    def left(self, client: object) -> None:
        """The client has gone: nobody waits for its answers."""
        for key in [key for key in self._asks if key[0] is client]:
            self.stop(*key)
