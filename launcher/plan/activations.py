"""What a forward keeps for its backward, tensor by tensor as the trainer's decoder saves them; nothing is computed again.

Korthikanti et al. 2022, section 4, count the same way; their 34 bytes a token and width are of another block (dropout, GELU, no
float32 inside the norms). All functions give bytes a token; `time` is the row's length, in tokens.
"""

from __future__ import annotations

from typing import Literal

from launcher.plan.flops import compute_bytes
from launcher.recipe import Model, Stage

Kernel = Literal["fused", "masked", "scores"]
"""How attention is computed. fused: scores are never whole. masked: nor here, but a matrix of what each position may see (or of
ALiBi's costs) is, once a row. scores: a matrix a head and row, in float32; memory grows with the square of the context."""


def attention_kernel(model: Model, stage: Stage, on_cpu: bool) -> Kernel:
    """The one that torch's scaled_dot_product_attention takes, or flash-attention's (the extra `gpu`) for bfloat16 on a GPU.

    For float32 on a GPU torch has no fused kernel in which groups of heads share keys, and computes the scores whole.
    """
    if not on_cpu and model.dtype == "bfloat16":
        return "fused"
    if not on_cpu and model.key_value_heads != model.heads:
        return "scores"
    return "masked" if stage.documents_masked or model.position == "alibi" else "fused"


def needs_flash_attention(model: Model, stage: Stage) -> bool:
    """Whether, on a GPU, it is only flash-attention that computes this without a matrix of the context's square."""
    return model.dtype == "bfloat16" and (stage.documents_masked or model.position == "alibi")


def norm(model: Model) -> int:
    """Input and output; RMSNorm computes in float32 and keeps the normalized input besides. A number or two a token."""
    each, width = compute_bytes(model), model.width
    if model.norm == "layernorm":
        return 2 * each * width + 8
    return (4 + 2 * each) * width + 4


def attention(model: Model, time: int, kernel: Kernel) -> int:
    """Queries, keys and values, the mix of values, and the kernel's own.

    Rotation makes new queries and keys; the values are a view of what the fused projection gave, which they keep alive.
    """
    each, rotary = compute_bytes(model), model.position == "rope"
    queries, keys = model.heads * model.head, model.key_value_heads * model.head
    angles = 2 * each * model.head if rotary and model.dtype == "bfloat16" else 0
    if kernel == "scores":
        return (3 * 4 + each) * queries + 4 * model.heads * time + angles
    projected, rotated = queries + 2 * keys, queries + keys if rotary else 0
    mask = each * time if kernel == "masked" and model.position != "alibi" else 0
    return each * (projected + rotated + queries) + 4 * model.heads + mask + angles


def mlp(model: Model) -> int:
    """SwiGLU: the gate, its SiLU, the other branch and their product. GELU: its input and output. ReLU: its output."""
    return {"swiglu": 4, "gelu": 2, "relu": 1}[model.mlp] * compute_bytes(model) * model.hidden_width


def block(model: Model, time: int, kernel: Kernel) -> int:
    return 2 * norm(model) + attention(model, time, kernel) + mlp(model)


def saved(model: Model, time: int, kernel: Kernel) -> int:
    """All blocks, what is before and after them, and what they share: token ids, the positions' angles."""
    each = compute_bytes(model)
    ends = norm(model) if model.norm_place == "before" else each * model.width
    if model.embedding_norm:
        ends += norm(model) - each * model.width
    angles = 8 * model.head if model.position == "rope" and model.dtype == "float32" else 0
    return model.layers * block(model, time, kernel) + ends + 8 + angles


def alibi_costs(model: Model, stage: Stage, rows: int, kernel: Kernel) -> int:
    """Bytes, not a token but in all: one matrix a head for all blocks, and for all rows where documents are not masked."""
    if model.position != "alibi" or kernel != "masked":
        return 0
    return compute_bytes(model) * model.heads * stage.context**2 * (rows if stage.documents_masked else 1)


def logits(vocabulary: int) -> int:
    """One copy of the logits, which are float32; the loss keeps one, their log-probabilities."""
    return 4 * vocabulary


def working(model: Model, time: int, kernel: Kernel) -> int:
    """What a block's backward makes beyond what it has freed by then: in the MLP, or where scores are whole their gradients."""
    wide = {"swiglu": 2, "gelu": 1, "relu": 1}[model.mlp] * model.hidden_width
    scores = 2 * 4 * model.heads * time if kernel == "scores" else 0
    return max(compute_bytes(model) * (wide + 2 * model.width), scores)
