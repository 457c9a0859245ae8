"""The moment between two steps, where all ranks learn of the same command and apply it together.

Rank 0 takes orders from its link without waiting and broadcasts one word, (number, operation), over a group of its own; the
length of the arguments rides in the operation's upper bits. A boundary without an order costs that one broadcast of 16 bytes.
"""

from __future__ import annotations

import collections
import logging
import time
from collections.abc import Callable
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from midwatch.protocol import Op, Order, Outcome
from trainer.control.rank_log import describe_order
from trainer.control.reporting import ControllerLink
from trainer.distributed.mesh import World, reduce

log = logging.getLogger("trainer")

HOLD_SECONDS = 0.025
"""Between two looks for orders while paused."""
RETRY_SECONDS = 5.0
"""Between two tries of what a run that holds is waiting for."""
_RETRY = 254
"""Not an order: what the run holds for is to be tried again."""
_LEAVE = 255
"""Not an order: what is being done between boundaries is to end, because an order waits that only a boundary can apply."""
REMEMBERED = 256
"""Newest commands of a generation whose outcomes are kept, to answer again; of older ones only that they are done with."""
_AT_ONCE = (Op.PAUSE, Op.RESUME, Op.STOP_NOW, Op.HOLD, Op.UNHOLD)


class StopNow(Exception):
    """The operator wants the ranks to end at once."""


class Boundary:
    """Gives the loop its orders. Pauses, resumes and stops at once by itself; `next` does not return while the run is paused.

    changed: called with "paused" or "resumed" when that has just happened, on every rank. idle: called at every look for
    orders, also while paused.
    """

    def __init__(
        self,
        world: World,
        link: ControllerLink,
        applied: int,
        step: Callable[[], int],
        changed: Callable[[str], None],
        idle: Callable[[], None],
    ) -> None:
        self._world, self._link, self._step, self._changed, self._idle = world, link, step, changed, idle
        self._applied = applied
        self._waiting: collections.deque[Order] = collections.deque()
        self._outcomes: dict[int, Outcome | None] = {}
        """On rank 0, by the number of each of the newest commands taken in this generation; None while it has no outcome yet."""
        self.ask: Callable[[int], None] = lambda number: None
        """Called with the number of a command that was sent again and whose outcome is somebody else's to tell."""
        self._word = torch.zeros(2, dtype=torch.int64)
        self.paused = False
        self._holds = False
        """Paused by itself, and may go on by itself."""
        self._held = False
        """Paused by the controller, which cannot journal what happens, and nobody has paused or resumed since."""
        self._trying = False
        self.recovered = False
        """Whether it went on by itself when it last did."""
        self._retry_at = 0.0

    def next(self) -> Order | None:
        """The next order that is the caller's to apply; None when there is none and the next step may begin."""
        if self._trying and not self.paused:  # what was tried again went well
            self._trying, self.recovered = False, True
            self._changed("resumed")
        while True:
            self._idle()
            order = self._exchange(tuple(Op), trying=True)
            if order is None:
                if not self.paused:
                    return None
                self._rest()
            elif order.op == _RETRY:
                self.paused, self._holds, self._trying = False, False, True
                return None
            elif order.op in _AT_ONCE:
                self._at_once(order)
            else:
                return order

    def peek(self) -> bool:
        """Looks for orders between two batches of evaluation or sampling: a pause holds here, what changes state waits.

        True: leave off, because the run was paused here and was then told what only a boundary can apply.
        """
        self._idle()
        order = self._exchange(_AT_ONCE)
        if order is None:
            return False
        self._at_once(order)
        while self.paused:
            self._idle()
            order = self._exchange(_AT_ONCE, leaving=True)
            if order is None:
                self._rest()
            elif order.op == _LEAVE:
                return True
            else:
                self._at_once(order)
        return False

    def acknowledge(self, order: Order, ok: bool = True) -> bool:
        """Every rank says how it went; whether it went well on all. Raises RuntimeError if they are not at the same step."""
        step = self._step()
        seen = reduce((order.number, -order.number, step, -step, int(ok)), self._world.control, dist.ReduceOp.MIN)
        if seen[0] != -seen[1] or seen[2] != -seen[3]:
            raise RuntimeError(f"ranks disagree at command {order.number}: steps {seen[2]} to {-seen[3]}")
        return bool(seen[4])

    def settle(self, order: Order, ok: bool, detail: dict[str, Any] | None = None, reason: str = "") -> None:
        """Acknowledges on all ranks and tells the outcome."""
        ok = self.acknowledge(order, ok)
        self.tell(order.number, ok, detail, reason)

    def tell(self, number: int, ok: bool, detail: dict[str, Any] | None = None, reason: str = "", step: int | None = None) -> None:
        """Tells the outcome of a command that every rank has acknowledged; of this step, where it is of none before."""
        outcome = Outcome(number=number, ok=ok, step=self._step() if step is None else step, detail=detail or {}, reason=reason)
        self._remember(number, outcome)
        self._link.send(outcome)

    def learn(self, number: int, ok: bool, detail: dict[str, Any], reason: str, step: int) -> None:
        """Keeps the outcome of a command that the controller knows from elsewhere, in case it asks again."""
        self._remember(number, Outcome(number=number, ok=ok, step=step, detail=detail, reason=reason))

    def pause(self) -> None:
        """Holds at the next look, as if ordered."""
        self.paused = True
        self._changed("paused")

    def hold(self, retries: bool = True) -> None:
        """The same, until it is resumed or, with `retries`, what it waits for, tried every few seconds, goes well.

        Called while the run is paused, it stays so; called by such a try, it holds on without a word.
        """
        tried, self._trying = self._trying, False
        if self.paused:
            return
        self.paused, self._holds = True, retries
        self._retry_at = time.monotonic() + RETRY_SECONDS
        if not tried:
            self._changed("paused")

    def _at_once(self, order: Order) -> None:
        if order.op == Op.HOLD:
            paused, waits = self.paused, self._holds
            if not paused or waits:
                self._world.synchronize()
                self.paused, self._held, self._holds, self._trying = True, True, False, False
            if not paused:
                self._changed("paused")
        elif order.op == Op.UNHOLD:
            if self._held:
                self.paused = self._held = False
                self._changed("resumed")
        elif order.op == Op.PAUSE:
            self._world.synchronize()
            self.paused, self._holds, self._trying, self._held = True, False, False, False
            self.settle(order, ok=True)
            self._changed("paused")
        elif order.op == Op.RESUME:
            self.paused = self._holds = self._trying = self._held = self.recovered = False
            self.settle(order, ok=True)
            self._changed("resumed")
        else:
            self.settle(order, ok=True)
            raise StopNow

    def _rest(self) -> None:
        if self._world.is_rank_zero:
            time.sleep(HOLD_SECONDS)

    def _exchange(self, ops: tuple[Op, ...], leaving: bool = False, trying: bool = False) -> Order | None:
        """One broadcast; the same order on every rank. `leaving`: an order that must wait is told of as _LEAVE.

        trying: when it is time for it, the run is told to try again what it holds for.
        """
        order, body = None, b""
        if self._world.is_rank_zero:
            order = self._take(ops)
            if order is None and leaving and self._waiting:
                order = Order(number=0, op=_LEAVE)
            if order is None and trying and self._holds and time.monotonic() >= self._retry_at:
                order = Order(number=0, op=_RETRY)
            body = msgspec.msgpack.encode(order.arguments) if order and order.arguments else b""
            self._word[0] = order.number if order else 0
            self._word[1] = (order.op | len(body) << 8) if order else 0
        dist.broadcast(self._word, 0, group=self._world.control)
        number, word = (int(value) for value in self._word.tolist())
        op, length = word & 0xFF, word >> 8
        if op == Op.NONE:
            return None
        arguments = {}
        if length:
            buffer = torch.frombuffer(bytearray(body or bytes(length)), dtype=torch.uint8)
            dist.broadcast(buffer, 0, group=self._world.control)
            arguments = msgspec.msgpack.decode(buffer.numpy().tobytes())
        if op not in (_LEAVE, _RETRY):
            order = Order(number=number, op=op, arguments=arguments)
            if self._world.is_rank_zero and number:
                self._remember(number, None)
                log.info("%s", describe_order(order))
            return order
        return Order(number=number, op=op, arguments=arguments)

    def _remember(self, number: int, outcome: Outcome | None) -> None:
        self._outcomes[number] = outcome
        if len(self._outcomes) > REMEMBERED:
            oldest = next(iter(self._outcomes))
            del self._outcomes[oldest]
            self._applied = max(self._applied, oldest)

    def _take(self, ops: tuple[Op, ...]) -> Order | None:
        """The first order of these kinds that waits; the others keep their places."""
        while (order := self._link.next_order()) is not None:
            if not self._is_duplicate(order):
                self._waiting.append(order)
        for order in self._waiting:
            if order.op in ops:
                self._waiting.remove(order)
                return order
        return None

    def _is_duplicate(self, order: Order) -> bool:
        """Sent again because the connection broke: answered again where it has an outcome, applied never.

        One without a number says how things are: it may come any number of times.
        """
        if not order.number:
            return False
        if order.number in self._outcomes:
            outcome = self._outcomes[order.number]
            if outcome is not None:
                self._link.send(outcome)
            else:
                self.ask(order.number)
            return True
        return order.number <= self._applied or any(order.number == waiting.number for waiting in self._waiting)
