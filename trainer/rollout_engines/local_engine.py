"""What the ranks write together: each has an engine with the whole policy in it, and answers a share of the prompts.

Ranks look for orders together, every few steps of their engines, so that a pause holds here as it does between two updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch.distributed as dist

from midwatch.recipe import Recipe, Stage
from midwatch.recipe.kv_cache import kv_bytes_per_token, kv_cache_pages
from shards.tokenization.tokenizer import Tokenizer
from trainer.batches import share
from trainer.distributed.mesh import World, gather, reduce
from trainer.generate import Engine, Request, Response, Usage
from trainer.generate.engine import page_tokens
from trainer.model.sharded_model import ShardedModel
from trainer.rollout_engines.rollout_engine import Peek, Score

ROUND = 8
"""Steps of the engines between two looks for orders."""


class LocalRolloutEngine:
    def __init__(self, recipe: Recipe, stage: Stage, model: ShardedModel, world: World, tokenizer: Tokenizer) -> None:
        """For a stage's context and positions; `refresh` before anything is asked."""
        self._world, self._model = world, model
        config, given = recipe.model, recipe.generate
        page = given.block_size or page_tokens(world.device)
        size = 2 if config.dtype == "bfloat16" else 4
        token = kv_bytes_per_token(config.num_layers, config.key_value_heads, config.head, size)
        pages = kv_cache_pages(stage.context, page, given.max_num_seqs, given.cache_mb << 20, token)
        self.engine = Engine(
            config,
            model.vocabulary,
            world.device,
            stage.context,
            pages=pages,
            page=page,
            running=given.max_num_seqs,
            step_tokens=given.max_num_batched_tokens,
            decode=tokenizer.decode,
        )
        self.engine.set_rope(stage.rope or config.rope, recipe.stage[0].context, stage.position_factor)
        self._version: int | None = None
        self.usage: list[Usage] = []
        """Of this rank's engine, at each round of the newest call."""

    def refresh(self, version: int) -> None:
        """The policy's weights of now; by all ranks. A version that is there already is not copied again."""
        if self._version != version:
            self.engine.refresh(self._model.whole(), version)
            self._version = version

    @property
    def serves_from(self) -> str | None:
        return None

    def hand_over(self, prompts: Sequence[tuple[int, ...]], score: Score, peek: Peek) -> bool:
        """The weights are there since `refresh`."""
        return True

    def forget(self) -> None:
        """The engine cannot have others."""

    def respond(self, requests: Sequence[Request], peek: Callable[[], bool]) -> list[Response] | None:
        """Answers to all of them, in their order, on every rank; None if `peek` said to leave off. By all ranks alike."""
        world, engine = self._world, self.engine
        start, stop = share(0, len(requests), world.rank, world.size)
        ids = [engine.add(request) for request in requests[start:stop]]
        mine: dict[int, Response] = {}
        self.usage = []
        while reduce([int(engine.busy)], world.control, dist.ReduceOp.MAX)[0]:
            if peek():
                engine.clear()
                return None
            for _ in range(ROUND):
                mine |= engine.step_responses()
            self.usage.append(engine.usage())
        told = msgspec.msgpack.encode([mine[id] for id in ids])
        decoder: Any = msgspec.msgpack.Decoder(list[Response])
        return [response for body in gather(told, world.control) for response in decoder.decode(body)]
