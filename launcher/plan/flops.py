"""Floating-point operations of training and the KV cache of generating, from a model's shape.

The convention is that of model FLOPs utilisation (Chowdhery et al. 2022, PaLM, appendix B): a multiply-add is two operations;
backward is twice forward; attention is counted whole, not halved for its causal mask; what is computed again (a fused kernel's
scores in backward) is not counted. A fused kernel that passes over the masked half does about half of attention's part.
"""

from __future__ import annotations

import msgspec

from midwatch.recipe import Model, Stage
from midwatch.recipe.kv_cache import kv_bytes_per_token
from midwatch.recipe.stage_inputs import judged

FORWARD_AND_BACKWARD = 3
"""Backward computes the gradient by the input and by the weights: twice forward (Kaplan et al. 2020, section 2.1)."""


def block_matrices(model: Model) -> int:
    """Weights of one block's matrices: query, key, value, output, and the MLP's three (SwiGLU) or two."""
    attention = 2 * model.hidden_size * model.head * (model.num_heads + model.key_value_heads)
    return attention + (3 if model.mlp == "swiglu" else 2) * model.hidden_size * model.hidden_width


def block_parameters(model: Model) -> int:
    """All parameters of one block: those of a model of two, less those of a model of one."""
    one, two = (msgspec.structs.replace(model, num_layers=layers).parameters(0) for layers in (1, 2))
    return two - one


def matrix_parameters(model: Model, vocabulary: int) -> int:
    """Weights that each token is multiplied with: all matrices and the output layer. Looking an embedding up is none."""
    return model.num_layers * block_matrices(model) + vocabulary * model.hidden_size


def attention_flops_per_token(model: Model, context: int) -> float:
    """Forward and backward of scores and their weighted sum: 12 layers x heads x head width x context (PaLM, appendix B)."""
    return 4.0 * FORWARD_AND_BACKWARD * model.num_layers * model.num_heads * model.head * context


def flops_per_token(model: Model, vocabulary: int, context: int) -> float:
    """Forward and backward: 6 a matrix weight (Kaplan et al. 2020, table 1), and attention's."""
    return 2.0 * FORWARD_AND_BACKWARD * matrix_parameters(model, vocabulary) + attention_flops_per_token(model, context)


def passes(stage: Stage) -> float:
    """Forwards and backwards over a token, as a multiple of one of each: a reference has a forward besides.

    Of a policy that learns from its responses each is drawn, and gone over by everybody, once for all the epochs in which it is
    learned from; what makes data only draws and scores.
    """
    forward = 1.0 / FORWARD_AND_BACKWARD
    if stage.makes:
        return forward * (1 + judged(stage)) * stage.rollout_settings.num_generations
    if not stage.draws:
        return 1.0 + forward * (stage.needs_reference + stage.spec.extra_forwards)
    learners = 2 if stage.spec.critic else 1
    # Drawn; then the policy, the reference, the value model and the reward model, as far as there are any.
    return learners + forward * (2 + learners + judged(stage)) / stage.rollout_settings.epochs


def kv_cache_bytes_per_token(model: Model) -> int:
    """Keys and values of one token in all layers, in the compute type."""
    return kv_bytes_per_token(model.num_layers, model.key_value_heads, model.head, compute_bytes(model))


def compute_bytes(model: Model) -> int:
    """Bytes of an element of the compute type."""
    return {"float32": 4, "bfloat16": 2}[model.dtype]
