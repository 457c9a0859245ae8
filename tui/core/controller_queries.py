"""What views ask of the controller, with the answers that cannot change kept."""

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from midwatch import protocol
from midwatch.metrics.m4_columns import Columns

if TYPE_CHECKING:
    from midwatch.transport.client import Client

Reply = TypeVar("Reply", bound=protocol.Message)

KEPT = 256
"""Answers about lineages that are over; some kilobytes each."""


class ControllerQueries:
    """Questions to the controller. Every method returns None where it is out of reach or refuses."""

    def __init__(self) -> None:
        self.client: Client | None = None
        self.refusal = ""
        """Why the last question was refused."""
        self.lost = False
        """Whether it was not refused but came to nobody, or nobody's answer came back."""
        self._ended: OrderedDict[tuple[str, int, int, int, int], Columns] = OrderedDict()

    async def columns(self, metric: str, start: int, stop: int, width: int, lineage: int | None = None) -> Columns | None:
        """A metric's columns on the line in force, or those of one lineage that is over."""
        key = (metric, start, stop, width, -1 if lineage is None else lineage)
        if key in self._ended:
            self._ended.move_to_end(key)
            return self._ended[key]
        question = protocol.ChartQuery(id=0, metric=metric, start=start, stop=stop, width=width, lineage=lineage)
        reply = await self.ask(question, protocol.ChartReply)
        if reply is None:
            return None
        columns = Columns.decode(reply.columns)
        if lineage is not None:
            self._ended[key] = columns
            if len(self._ended) > KEPT:
                self._ended.popitem(last=False)
        return columns

    async def ask(self, question: protocol.Message, expect: type[Reply], timeout: float = 20.0) -> Reply | None:
        from midwatch.transport.client import ClientError, LostError

        self.lost = self.client is None
        if self.client is None:
            self.refusal = "the controller is out of reach"
            return None
        try:
            return await self.client.ask(question, expect, timeout=timeout)
        except ClientError as error:
            self.refusal, self.lost = str(error), isinstance(error, LostError)
            return None

    async def probe(self, ask: protocol.ProbeAsk, take: Callable[[protocol.ProbeAnswer], None]) -> str:
        """Has checkpoints answer, each message handed to `take` as it comes; why that could not be asked, or nothing."""
        from midwatch.transport.client import ClientError

        if self.client is None:
            return "the controller is out of reach; nothing was asked"
        try:
            async with contextlib.aclosing(self.client.probe(ask)) as answers:
                async for answer in answers:
                    take(answer)
        except ClientError as error:
            return str(error)
        return ""

    async def all_columns(
        self, metrics: list[str], start: int, stop: int, width: int, lineage: int | None = None
    ) -> list[Columns | None]:
        return list(await asyncio.gather(*(self.columns(metric, start, stop, width, lineage) for metric in metrics)))
