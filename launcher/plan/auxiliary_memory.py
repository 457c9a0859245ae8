"""What a rank holds beside the network that is trained: frozen ones, a value model with its optimizer, the engine that writes."""

from __future__ import annotations

from typing import NamedTuple

from launcher.plan import flops
from midwatch.recipe import Model, Stage
from midwatch.recipe.generate import Generate
from midwatch.recipe.kv_cache import kv_cache_pages
from midwatch.recipe.stage_inputs import judged

PAGE = 16
"""Tokens of a page of the KV cache, where the recipe says nothing: on a GPU more, which rounds up by a page."""
NOTED_BYTES = 3 * 8 + 6 * 4
"""Of a response's token: three ids, and what is noted in float32."""


class Beside(NamedTuple):
    """Bytes on one rank."""

    frozen: int
    """Reference and reward model."""
    critic: int
    """The value model: weights, gradients, moments."""
    engine: int
    """A whole copy of the model in the type that it computes in, its KV cache, and the responses that are learned from."""


def beside(model: Model, vocabulary: int, stage: Stage, generate: Generate, weights: int, moments: int) -> Beside:
    """weights, moments: of the network that is trained, on this rank."""
    frozen = weights * (stage.needs_reference + judged(stage))
    critic = 2 * weights + moments if stage.spec.critic else 0
    if not (stage.draws or stage.makes):
        return Beside(frozen, critic, 0)
    page = generate.block_size or PAGE
    token = flops.kv_cache_bytes_per_token(model)
    cache = kv_cache_pages(stage.context, page, generate.max_num_seqs, generate.cache_mb << 20, token) * page * token
    noted = stage.prompts_drawn * stage.rollout_settings.num_generations * stage.context * NOTED_BYTES if stage.draws else 0
    return Beside(frozen, critic, model.parameters(vocabulary) * flops.compute_bytes(model) + cache + noted)
