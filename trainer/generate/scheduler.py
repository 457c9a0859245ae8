"""What passes through the model next: a token of each sequence that is being continued, and as much of new prompts as fits.

First come, first served. Where pages run out, the sequence that came last gives its own back and waits; its tokens are kept, and
what was in its pages is computed again.
"""

from __future__ import annotations

from collections import deque

from trainer.generate.block_manager import BlockManager
from trainer.generate.request import Finish, Sequence, TokenChunk


class Scheduler:
    def __init__(self, blocks: BlockManager, most_running: int, most_tokens: int) -> None:
        """most_running: sequences at a time. most_tokens: that pass through the model in a step."""
        self._blocks, self._most_running, self._most_tokens = blocks, most_running, most_tokens
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []
        """In the order in which they came."""
        self.preemptions = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def cached(self) -> int:
        """Tokens in the pages of running sequences."""
        return sum(sequence.cached for sequence in self._running)

    @property
    def slots(self) -> int:
        """Tokens for which these pages have room."""
        return sum(len(sequence.pages) for sequence in self._running) * self._blocks.size

    def add(self, sequence: Sequence) -> None:
        self._waiting.append(sequence)

    def plan(self) -> list[TokenChunk]:
        """The next step's chunks, those of one token first; empty when nothing is left."""
        chunks = self._continued()
        left = self._most_tokens - sum(chunk.stop - chunk.start for chunk in chunks)
        while self._waiting and left > 0 and len(self._running) < self._most_running:
            sequence = self._waiting[0]
            self._blocks.share(sequence)
            # A page is kept for each that runs, or the newcomer would soon be sent back.
            room = self._blocks.free - self._blocks.needed(len(sequence.tokens)) + len(sequence.pages)
            if room < len(self._running) or not self._blocks.grow(sequence, len(sequence.tokens)):
                self._blocks.release(sequence)
                break
            self._running.append(self._waiting.popleft())
            chunks.append(self._chunk(sequence, left))
            left -= chunks[-1].stop - chunks[-1].start
        return sorted(chunks, key=lambda chunk: chunk.stop - chunk.start > 1)

    def _continued(self) -> list[TokenChunk]:
        chunks: list[TokenChunk] = []
        left, at = self._most_tokens, 0
        while at < len(self._running) and left > 0:
            sequence = self._running[at]
            while not self._blocks.grow(sequence, len(sequence.tokens)):
                last = self._running.pop()
                self._blocks.release(last)
                self._waiting.appendleft(last)
                self.preemptions += 1
                if last is sequence:
                    return chunks
            chunks.append(self._chunk(sequence, left))
            left -= chunks[-1].stop - chunks[-1].start
            at += 1
        return chunks

    def _chunk(self, sequence: Sequence, left: int) -> TokenChunk:
        stop = min(len(sequence.tokens), sequence.cached + left)
        chunk = TokenChunk(sequence, sequence.cached, stop)
        # In each layer the step's keys and values are there before anybody looks, so others may share them in this very step.
        self._blocks.know(sequence, stop)
        return chunk

    def passed(self, chunks: list[TokenChunk]) -> None:
        """These have gone through the model."""
        for chunk in chunks:
            chunk.sequence.cached = chunk.stop

    def finish(self, sequence: Sequence, how: Finish) -> None:
        sequence.finish = how
        self._blocks.release(sequence)
        if sequence in self._running:
            self._running.remove(sequence)
        else:
            self._waiting.remove(sequence)

    def restart(self) -> None:
        """All that run begin again, in their order, with the tokens that they have: what their pages hold is of older weights."""
        for sequence in reversed(self._running):
            self._blocks.release(sequence)
            self._waiting.appendleft(sequence)
        self._running.clear()
        self._blocks.forget()
