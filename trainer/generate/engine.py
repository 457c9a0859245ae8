"""The engine: requests in, tokens out, step by step; many at once, each joining and leaving when it will.

engine = Engine(config, vocabulary, device, context=1024)
engine.refresh(model.named_parameters(), version=1)
responses = engine.generate([Request(prompt=(1, 17, 4), limit=64, stops=frozenset([2]))])
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

import torch
from torch import Tensor

from midwatch.recipe.model import Model, Rope
from trainer.generate.block_manager import BlockManager
from trainer.generate.model_runner import Runner
from trainer.generate.paged_attention import PAGE_UNIT
from trainer.generate.request import Event, Finish, Request, RequestError, Response, Sequence
from trainer.generate.sampling import sample_tokens
from trainer.generate.scheduler import Scheduler

RUNNING = 64
STEP_TOKENS = 2048
_BEHIND = 8
"""Tokens before a new one that are decoded with it, to look for stop strings: of a piece cut off there comes no text."""


def page_tokens(device: torch.device) -> int:
    """Tokens of a page: kernels that follow pages on a GPU take no smaller ones."""
    return PAGE_UNIT if device.type == "cuda" else 16


@dataclass(frozen=True)
class Usage:
    """How the KV cache is used at the moment."""

    pages: int
    held: int
    tokens: int
    """In pages of running sequences."""
    slots: int
    """For which these have room."""
    padded: int
    """For which there would be room, had each the length of the longest that it may become."""
    running: int
    waiting: int
    preemptions: int
    """Since the beginning."""


class Engine:
    """Not thread-safe. Its weights are its own; `refresh` fills them before anything is asked."""

    def __init__(
        self,
        config: Model,
        vocabulary: int,
        device: torch.device,
        context: int,
        *,
        pages: int | None = None,
        page: int | None = None,
        running: int = RUNNING,
        step_tokens: int = STEP_TOKENS,
        decode: Callable[[Items[int]], str] | None = None,
        kernel: bool | None = None,
        replays: bool | None = None,
    ) -> None:
        """context: tokens of a prompt and its response together at the most. pages: of the cache, each of `page` tokens.

        running: sequences at a time. step_tokens: that pass through the model in a step. decode: ids to text, for stop strings.
        kernel, replays: as Runner has them. Raises ValueError where the cache has no room for one whole sequence.
        """
        page = page or page_tokens(device)
        most = -(-context // page)
        pages = most * running if pages is None else pages
        if pages < most:
            raise ValueError(f"a cache of {pages} pages of {page} tokens has no room for a context of {context} (give it {most})")
        self.context, self.vocabulary, self.version = context, vocabulary, 0
        self.runner = Runner(config, vocabulary, device, context, pages, page, kernel=kernel, replays=replays)
        self._blocks = BlockManager(pages, page)
        self._scheduler = Scheduler(self._blocks, running, max(step_tokens, running))
        self._decode = decode
        self._sequences: dict[int, Sequence] = {}
        self._next = 0

    def set_rope(self, rope: Rope, original_context: int, factor: float = 1.0) -> None:
        """Positions as a stage has them, from its beginning."""
        self.runner.set_rope(rope, original_context, factor)
        self._scheduler.restart()

    def refresh(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Other weights, under the names of the trainer's parameters; what is running goes on with them, from its tokens so far."""
        self.runner.load(weights)
        self.version = version
        self._scheduler.restart()

    def add(self, request: Request) -> int:
        """Its number. Raises RequestError."""
        problem = request.problem(self.context, self.vocabulary)
        if problem is None and request.stop_strings and self._decode is None:
            problem = "stop strings need a tokenizer"
        if problem is not None:
            raise RequestError(problem)
        self._next += 1
        limit = min(request.limit, self.context - len(request.prompt))
        sequence = Sequence(self._next, request, list(request.prompt), limit)
        self._sequences[self._next] = sequence
        self._scheduler.add(sequence)
        return self._next

    def abort(self, id: int) -> None:
        """Ends a request where it is; nothing if it has ended."""
        sequence = self._sequences.pop(id, None)
        if sequence is not None:
            self._scheduler.finish(sequence, "aborted")

    def clear(self) -> None:
        for id in list(self._sequences):
            self.abort(id)

    @property
    def busy(self) -> bool:
        return bool(self._sequences)

    def usage(self) -> Usage:
        blocks, scheduler = self._blocks, self._scheduler
        padded = scheduler.running * max((len(each.request.prompt) + each.limit for each in self._sequences.values()), default=0)
        return Usage(
            pages=blocks.count,
            held=blocks.held,
            tokens=scheduler.cached,
            slots=scheduler.slots,
            padded=padded,
            running=scheduler.running,
            waiting=scheduler.waiting,
            preemptions=scheduler.preemptions,
        )

    def step_responses(self) -> dict[int, Response]:
        """A step; the responses that it finished, by their requests' numbers."""
        known = dict(self._sequences)
        return {event.id: self._response(known[event.id]) for event in self.step() if event.finish is not None}

    def step(self) -> list[Event]:
        """One pass through the model: a token for each sequence whose tokens have all passed."""
        chunks = self._scheduler.plan()
        if not chunks:
            return []
        logits = self.runner.run(chunks)
        self._scheduler.passed(chunks)
        drawing = [chunk.sequence for chunk in chunks if chunk.draws]
        if not drawing:
            return []
        drawn = sample_tokens(logits, drawing)
        events = []
        for at, sequence in enumerate(drawing):
            if sequence.first_version < 0:
                sequence.first_version = self.version
            sequence.tokens.append(drawn.tokens[at])
            sequence.log_probs.append(drawn.log_probs[at])
            finish = self._finish(sequence)
            if finish is not None:
                self._scheduler.finish(sequence, finish)
                del self._sequences[sequence.id]
            events.append(Event(sequence.id, drawn.tokens[at], drawn.log_probs[at], finish, drawn.alternatives[at]))
        return events

    def _finish(self, sequence: Sequence) -> Finish | None:
        request = sequence.request
        if sequence.tokens[-1] in request.stops:
            return "stop"
        if request.stop_strings and self._decode is not None:
            longest = max(len(each.encode()) for each in request.stop_strings)
            text = self._decode(sequence.response[-(longest + _BEHIND) :])
            if any(each in text for each in request.stop_strings):
                return "stop"
        return "length" if sequence.drawn >= sequence.limit else None

    def generate(self, requests: Items[Request], interrupted: Callable[[], bool] = lambda: False) -> list[Response] | None:
        """Serves them all, in this order; None, and nothing is left, once `interrupted`, asked before each step, says so."""
        ids = [self.add(request) for request in requests]
        found: dict[int, Response] = {}
        while self.busy:
            if interrupted():
                self.clear()
                return None
            found |= self.step_responses()
        return [found[id] for id in ids]

    def _response(self, sequence: Sequence) -> Response:
        return Response(sequence.response, sequence.log_probs, sequence.finish or "aborted", self.version, sequence.first_version)
