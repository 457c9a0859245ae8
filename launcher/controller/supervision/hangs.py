"""A hang, told by an agent: every node writes down where its ranks are, then the ranks are ended and gathered anew."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from launcher.controller.core.context import ControllerContext
from launcher.controller.supervision.node_pool import Pool
from midwatch.protocol import Hung, StacksTaken, TakeStacks

STACKS_SECONDS = 15.0
"""That the other nodes have to write down their ranks' stacks."""


class Hanging:
    """The hang of the living generation, if there is one."""

    def __init__(self, context: ControllerContext, pool: Pool, ranks_hang: Callable[[str, str, bool], None]) -> None:
        """`ranks_hang` is called with the node to name, in words what happened, and whether that node is to blame."""
        self._context, self._pool, self._ranks_hang = context, pool, ranks_hang
        self._first: tuple[str, Hung] | None = None
        self._taken: dict[str, tuple[int, ...]] = {}
        """Nodes that have written, and which of their ranks did not answer."""
        self._timer: asyncio.TimerHandle | None = None

    def told(self, node: str, message: Hung | StacksTaken) -> None:
        context = self._context
        nodes = context.ledger.generation_nodes
        if message.generation != context.ledger.generation or not context.ledger.generation_live or node not in nodes:
            return
        if message.file:
            context.note("warning", f"where the ranks of {node} are: {message.file}", context.live.step)
        self._taken[node] = message.stuck
        if isinstance(message, Hung) and self._first is None:
            self._first = (node, message)
            context.note(
                "alarm",
                f"the ranks hang: no progress in {message.phase} for {message.seconds:.0f} s (the limit is {message.limit:.0f} s); "
                "H shows the stacks",
                context.live.step,
            )
            for other in nodes:
                if other != node:
                    self._pool.send(other, TakeStacks(generation=message.generation))
            self._timer = asyncio.get_running_loop().call_later(STACKS_SECONDS, self._end)
        if self._first is not None and all(n in self._taken or not self._pool.connected(n) for n in nodes):
            self._end()

    def forget(self) -> None:
        """A new generation has begun."""
        if self._timer is not None:
            self._timer.cancel()
        self._first, self._taken, self._timer = None, {}, None

    def _end(self) -> None:
        first, taken = self._first, self._taken
        self.forget()
        if first is None:
            return
        node, hung = first
        blamed = next((n for n, stuck in taken.items() if stuck), None)
        words = f"they hung in {hung.phase} for {hung.seconds:.0f} s"
        if blamed is not None:
            words += f"; rank {', '.join(map(str, taken[blamed]))} does not answer"
        self._ranks_hang(blamed or node, words, blamed is not None)
