"""A cluster's recipe made small enough for a test: what is tested is what is written.

    miniature(recipe, SOURCES, length=512, ...)

- Every context, and every `original_context`, is divided by `length`; factors, bases and all else of positions stay as they are.
- A stage takes `steps` steps of `batch` rows, one at a time, and is evaluated every `eval_every` and where stages always are.
- Its rate is multiplied by `rate`, for a small model learns little at a large one's.
- Every source is read from this Python's standard library instead of its path; its name, kind and part in the mixtures stay.
- Two ranks on this machine's processors, in float32. At the most two share a row, and tiles are divided as the context
  is; recomputing stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from midwatch.recipe import Cluster, Recipe, Rope, Stage


def miniature(
    recipe: Recipe,
    sources: Mapping[str, dict[str, Any]],
    *,
    length: int,
    steps: int,
    batch: int,
    rate: float,
    eval_every: int = 1000,
) -> Recipe:
    """sources: by the name that the recipe gives them, the keys that take the place of origin and path."""
    replace = msgspec.structs.replace

    def rope(whole: Rope | None) -> Rope | None:
        return whole and replace(whole, original_context=whole.original_context and whole.original_context // length)

    def stage(whole: Stage) -> Stage:
        small = replace(whole, context=whole.context // length, rope=rope(whole.rope), steps=steps, global_batch=batch)
        small = replace(small, micro_batch=1, lr=whole.lr * rate, warmup_steps=0, eval_every=eval_every, eval_samples=2)
        tile = whole.mlp_chunk_tokens and max(1, whole.mlp_chunk_tokens // length)
        small = replace(small, mlp_chunk_tokens=tile, loss_chunk_tokens=max(1, whole.loss_chunk_tokens // length))
        return replace(small, context_parallel=min(2, whole.context_parallel))

    return replace(
        recipe,
        model=replace(recipe.model, dtype="float32"),
        data=replace(recipe.data, held_out=0.1, source=tuple(replace(s, path=None, **sources[s.name]) for s in recipe.data.source)),
        cluster=Cluster(ranks_per_node=2, device="cpu"),
        checkpoint=replace(recipe.checkpoint, every=1000),
        report=replace(recipe.report, seconds=0.2),
        stage=tuple(stage(whole) for whole in recipe.stage),
    )
