"""One annotator at work: whose decisions, which prompts are left, which pairs are ready."""

from __future__ import annotations

import asyncio
from collections import deque

from launcher.controller.annotation.records import Pair, Prompt
from launcher.controller.annotation.store import Store
from midwatch import protocol as p


class Session:
    """What is kept of an annotator while the screen is there."""

    def __init__(self, begin: p.PreferenceBegin, author: str, store: Store, queue: list[tuple[Prompt, bool]]) -> None:
        self.begin, self.author, self.store = begin, author, store
        self.queue = deque(queue)
        self.ready: deque[tuple[Pair, bool]] = deque()
        """Drawn and not decided, and whether shared; the first is what is shown."""
        self.problem = "; ".join(store.notes)
        self.news = asyncio.Event()
        """Set when there is something to tell."""
        self.room = asyncio.Event()
        """Set when another pair may be drawn."""
        self.drawing: asyncio.Task[None] | None = None
        self.drawn_now = 0
        """Prompts that are taken out of the queue and not ready yet: one, or none."""

    @property
    def shown(self) -> p.PreferencePair | None:
        """What the annotator is to decide next, the answers on their sides."""
        if not self.ready:
            return None
        pair, shared = self.ready[0]
        left, right = (pair.second, pair.first) if pair.swapped(self.begin.annotator) else (pair.first, pair.second)
        prompt = tuple(p.ProbeTurn(turn.role, turn.content) for turn in pair.prompt)
        return p.PreferencePair(pair=pair.id, prompt=prompt, left=left.text, right=right.text, shared=shared)
