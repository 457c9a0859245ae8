"""Pairs of answers, drawn with the probe: the same pair for whoever is to get it, kept as soon as it is whole."""

from __future__ import annotations

import asyncio

from launcher.controller.annotation.records import CandidateResponse, Pair, Prompt, key_of, utc
from launcher.controller.annotation.store import SampledPairs
from launcher.controller.core.context import ControllerContext
from launcher.controller.probe.sessions import Probing
from midwatch import protocol as p

TRIES = 3
"""Seeds that are tried where both answers are the same."""
DRAW_SECONDS = 600.0
"""For an answer, the loading of its checkpoint included."""


class DrawError(Exception):
    """Why there is no pair."""


class Drawing:
    """Draws each pair once, however many annotators wait for it."""

    def __init__(self, context: ControllerContext, probing: Probing) -> None:
        self._context, self._probing = context, probing
        self._drawn: SampledPairs | None = None
        self._under_way: dict[tuple[Prompt, tuple[str, ...]], asyncio.Task[Pair]] = {}

    @property
    def drawn(self) -> SampledPairs:
        """Raises OSError."""
        if self._drawn is None:
            self._drawn = SampledPairs(self._context.paths.preferences)
        return self._drawn

    def checkpoints(self, asked: tuple[str, ...]) -> tuple[str, str]:
        """The ids of who answers first and second. Raises DrawError."""
        ledger = self._context.ledger
        if not asked:
            scalar = {stage.name for stage in self._context.recipe.stage if stage.scalar}
            able = [each for each in ledger.checkpoints.values() if each.on_line and each.stage not in scalar]
            if not able:
                raise DrawError("there is no checkpoint yet that could answer")
            newest = max(able, key=lambda each: (each.step, each.time)).id
            return newest, newest
        found = [ledger.find("latest" if name == "newest" else name) for name in asked]
        for each in found:
            if isinstance(each, str):
                raise DrawError(each)
        ids = [each.id for each in found if not isinstance(each, str)]
        return ids[0], ids[-1]

    async def pair(self, prompt: Prompt, asked: tuple[str, ...], temperature: float, limit: int) -> Pair:
        """The pair that was drawn for the prompt, by these checkpoints where they are asked for by name; else a new one.

        Raises DrawError, and OSError where it cannot be kept.
        """
        names = self.checkpoints(asked) if asked else ()
        for pair in self.drawn.of(prompt):
            if not names or pair.checkpoints == names:
                return pair
        key = (prompt, names)
        if key not in self._under_way:
            task = asyncio.create_task(self._draw(prompt, asked, temperature, limit), name="draw")
            self._under_way[key] = task
            task.add_done_callback(lambda _: self._under_way.pop(key, None))
        return await asyncio.shield(self._under_way[key])

    async def close(self) -> None:
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._drawn is not None:
            self._drawn.close()
            self._drawn = None

    async def _draw(self, prompt: Prompt, asked: tuple[str, ...], temperature: float, limit: int) -> Pair:
        names = self.checkpoints(asked)
        seed = int(key_of(prompt)[:6], 16)
        for attempt in range(TRIES):
            seeds = seed + 2 * attempt, seed + 2 * attempt + 1
            asks = [self._answer(prompt, name, own, temperature, limit) for name, own in zip(names, seeds, strict=True)]
            first, second = await asyncio.gather(*asks)
            if first.text != second.text:
                break
        else:
            raise DrawError(f"both answers are the same, {TRIES} times (a higher --temperature makes them differ)")
        id = key_of(prompt)[:16] + f"-{len(self.drawn.of(prompt))}"
        now = utc(self._context.clock())
        pair = Pair(id=id, time=now, prompt=prompt, first=first, second=second, temperature=temperature, limit=limit)
        self.drawn.add(pair)
        return pair

    async def _answer(self, prompt: Prompt, checkpoint: str, seed: int, temperature: float, limit: int) -> CandidateResponse:
        ask = p.ProbeAsk(
            ask=0,
            checkpoints=(checkpoint,),
            prompt=prompt[-1].content,
            turns=(tuple(p.ProbeTurn(turn.role, turn.content) for turn in prompt[:-1]),),
            limit=limit,
            temperature=temperature,
            seed=seed,
            alternatives=0,
        )
        answers: asyncio.Queue[p.ProbeAnswer] = asyncio.Queue()

        def take(answer: p.ProbeAnswer) -> bool:
            answers.put_nowait(answer)
            return True

        client = object()  # each answer is a client of its own, so that annotators together are not one that asks too much
        await self._probing.ask(client, ask, take)
        parts: list[str] = []
        try:
            async with asyncio.timeout(DRAW_SECONDS):
                while True:
                    told = await answers.get()
                    if isinstance(told, p.ProbeToken):
                        parts.append(told.text)
                    elif isinstance(told, p.ProbeEnd):
                        break
        except TimeoutError:
            raise DrawError(f"no answer after {DRAW_SECONDS:g} s") from None
        finally:
            self._probing.stop(client, ask.ask)
        if told.problem or told.finish == "aborted":
            raise DrawError(told.problem or "the answer was stopped")
        return CandidateResponse(
            text="".join(parts) + told.text,
            checkpoint=told.checkpoint,
            seed=seed,
            tokens=told.tokens,
            finish=told.finish,
            score=told.score,
        )
