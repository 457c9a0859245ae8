"""What a forward keeps for its backward, tensor by tensor as the trainer's decoder saves them, and what is computed again.

Korthikanti et al. 2022, section 4, count the same way; their 34 bytes a token and width are of another block (dropout, GELU, no
float32 inside the norms). Bytes are of one micro-batch on one rank where it says nothing else. Between blocks a rank has its
part of the tokens (sequence parallelism, section 4.2.2); inside them all of its context-parallel part, gathered, with its part
of the heads and of the MLP.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from launcher.plan.flops import compute_bytes, rows_of_a_sample
from launcher.plan.mesh import Mesh
from midwatch.recipe import Model, Stage

Kernel = Literal["fused", "masked", "scores"]
"""How attention is computed. fused: scores are never whole. masked: nor here, but a matrix of what each position may see (or of
ALiBi's costs) is, once a row. scores: a matrix a head and row, in float32; memory grows with the square of the context."""
Checkpointing = Literal["none", "selective", "block", "offloaded"]
RING_TILE = 512
"""Queries, and keys, whose scores are there at a time where keys go round in a ring."""


class MicrobatchShape(msgspec.Struct, frozen=True):
    """A micro-batch's tokens on one rank."""

    rows: int
    context: int
    """Tokens of a row, over all ranks."""
    tensor: int = 1
    context_parallel: int = 1

    @property
    def between(self) -> int:
        """Tokens between the blocks."""
        return self.rows * -(-self.context // (self.tensor * self.context_parallel))

    @property
    def inside(self) -> int:
        """Tokens inside a block."""
        return self.between * self.tensor


class BlockActivations(msgspec.Struct, frozen=True):
    """Bytes of one block's activations."""

    kept_bytes: int
    """From its forward to its backward."""
    host_bytes: int
    """Of it in the host's memory."""
    again_bytes: int
    """Computed again: there besides while its backward lasts, of one block at a time."""

    @property
    def device_bytes(self) -> int:
        return self.kept_bytes - self.host_bytes


def piece_of(mesh: Mesh, stage: Stage, micro_batch: int) -> MicrobatchShape:
    return MicrobatchShape(rows_of_a_sample(stage) * micro_batch, stage.context, mesh.tensor, mesh.context)


def attention_kernel(model: Model, stage: Stage, on_cpu: bool) -> Kernel:
    """The one that torch's scaled_dot_product_attention takes, or for bfloat16 on a GPU one that knows where documents begin.

    For float32 on a GPU torch has no fused kernel in which groups of heads share keys, and computes the scores whole.
    """
    if not on_cpu and model.dtype == "bfloat16":
        return "fused"
    if not on_cpu and model.key_value_heads != model.num_heads:
        return "scores"
    return "masked" if stage.documents_masked or model.position == "alibi" else "fused"


def needs_flash_attention(model: Model, stage: Stage) -> bool:
    """Whether, on a GPU, it is only flash-attn (the extra `gpu`) that computes this without a matrix of the context's square.

    torch has a kernel of its own for documents, but not for ALiBi, nor for heads whose width is no multiple of 8.
    """
    return model.dtype == "bfloat16" and (model.position == "alibi" or (stage.documents_masked and model.head % 8 > 0))


def exchanges_heads(model: Model, tensor: int, context_parallel: int) -> bool:
    """Whether ranks swap tokens for heads before attention (Jacobs et al. 2023, Ulysses); otherwise keys go round in a ring."""
    return not (model.num_heads // tensor % context_parallel or model.key_value_heads // tensor % context_parallel)


def norm(model: Model) -> int:
    """A token's input and output, and LayerNorm's mean and deviation or RMSNorm's root."""
    return 2 * compute_bytes(model) * model.hidden_size + (8 if model.norm == "layernorm" else 4)


def attention(model: Model, piece: MicrobatchShape, kernel: Kernel) -> int:
    """Queries, keys and values, the mix of values, and the kernel's own.

    Rotation makes new queries and keys; the values are a view of what the fused projection gave, which they keep alive. Where
    ranks swap tokens for heads, what they got is kept instead, and the mix of values in both layouts. A ring keeps no scores
    and no mask.
    """
    each, rotary, time = compute_bytes(model), model.position == "rope", piece.context
    queries, keys = _queries(model, piece), _keys(model, piece)
    heads = model.num_heads // piece.tensor
    swapped = piece.context_parallel > 1 and exchanges_heads(model, piece.tensor, piece.context_parallel)
    ring = piece.context_parallel > 1 and not swapped
    if kernel == "scores" and not ring:
        twice = each * queries if swapped else 0
        return piece.inside * ((3 * 4 + each) * queries + 4 * heads * time + twice)
    copied = queries if 1 < model.key_value_heads < model.num_heads else 0  # out of their groups
    again = queries if swapped else queries + keys if rotary else copied
    masked = kernel == "masked" and model.position != "alibi" and not ring
    mask = each * piece.rows * time**2 if masked else 0
    return piece.inside * (each * (queries + 2 * keys + again + queries) + 4 * heads) + mask


def mlp(model: Model, tensor: int = 1) -> int:
    """A token's. SwiGLU: the gate, its SiLU, the other branch and their product. GELU: its input and output. ReLU: its output."""
    return {"swiglu": 4, "gelu": 2, "relu": 1}[model.mlp] * compute_bytes(model) * model.hidden_width // tensor


def block(
    model: Model, piece: MicrobatchShape, kernel: Kernel, checkpointing: Checkpointing = "none", mlp_chunk_tokens: int | None = None
) -> BlockActivations:
    """What one block keeps, and what it computes again."""
    each, tiled = compute_bytes(model), mlp_chunk_tokens is not None
    inputs = each * model.hidden_size * (piece.inside - piece.between)  # gathered for the two linear layers behind the norms
    outer = 2 * (norm(model) * piece.between + inputs) + attention(model, piece, kernel)
    inner = mlp(model, piece.tensor) * min(mlp_chunk_tokens or piece.inside, piece.inside)
    begins = each * model.hidden_size * piece.between
    if checkpointing == "none":
        return BlockActivations(outer if tiled else outer + inner, 0, inner if tiled else 0)
    if checkpointing == "selective":
        products, of_them = _products(model, piece, tiled)
        return BlockActivations(begins + products, 0, max(0, outer + inner - of_them))
    again = outer + inner - (begins if _is_saved(model, piece) else 0)
    if checkpointing == "block":
        return BlockActivations(begins, 0, again)
    return BlockActivations(begins, begins, again + begins)


def _products(model: Model, piece: MicrobatchShape, tiled: bool) -> tuple[int, int]:
    """Outputs of matrix products and of attention with its log-sum-exp; and those of them that a backward asks for anyway.

    Not the MLP's, which a backward asks for only where a norm is behind it. Of what is summed over ranks the sum.
    """
    each, hidden = compute_bytes(model), model.hidden_width // piece.tensor
    queries, keys, heads = _queries(model, piece), _keys(model, piece), model.num_heads // piece.tensor
    into = 0 if tiled else (2 if model.mlp == "swiglu" else 1)
    after = model.norm_place == "post" and not (tiled and piece.tensor == 1)
    ring = piece.context_parallel > 1 and not exchanges_heads(model, piece.tensor, piece.context_parallel)
    mixed = 0 if ring else each * queries + 4 * heads
    every = piece.inside * (each * (queries + 2 * keys + into * hidden) + mixed)
    every += piece.between * each * model.hidden_size * (2 if after else 1)
    projected = queries + 2 * keys if piece.context_parallel == 1 else 0
    wanted = each * (projected + (0 if model.mlp == "relu" else into) * hidden) + mixed
    return every, piece.inside * wanted


def _is_saved(model: Model, piece: MicrobatchShape) -> bool:
    """Whether a block's input, as it comes, is among the tensors that it saves: what its first norm or its first matrix takes."""
    return model.norm_place == "pre" or piece.tensor == 1


def ends(model: Model, piece: MicrobatchShape, *, first: bool, last: bool) -> int:
    """Beside the blocks of a part: what is before and after them, token ids, the positions' angles, what is sent on or was got."""
    each, hidden = compute_bytes(model), compute_bytes(model) * model.hidden_size
    angles = 2 * each * model.head if model.position == "rope" else 0
    found = piece.inside * (8 + angles)
    if last:
        found += piece.between * (norm(model) if model.norm_place == "pre" else each * model.hidden_size)
    else:
        found += piece.between * hidden
    if first and model.embedding_norm:
        found += piece.between * (norm(model) - hidden)
    return found


def got(model: Model, piece: MicrobatchShape, checkpointing: Checkpointing) -> int:
    """What a part got from the rank before it, where its first block does not keep it anyway."""
    kept = checkpointing != "none" or _is_saved(model, piece)
    return 0 if kept else piece.between * compute_bytes(model) * model.hidden_size


def saved(model: Model, time: int, kernel: Kernel) -> int:
    """All blocks and the ends, a token of rows that long, on one rank that computes nothing again; ALiBi's costs left out."""
    piece = MicrobatchShape(1, time)
    return (model.num_layers * block(model, piece, kernel).kept_bytes + ends(model, piece, first=True, last=True)) // time


def alibi_costs(model: Model, stage: Stage, piece: MicrobatchShape, kernel: Kernel) -> int:
    """One matrix a head for all blocks, and for all rows where documents are not masked; in a ring, of a part of the keys."""
    if model.position != "alibi" or kernel != "masked":
        return 0
    heads = model.num_heads // piece.tensor
    if exchanges_heads(model, piece.tensor, piece.context_parallel):
        matrix = heads // piece.context_parallel * piece.context**2
    else:
        matrix = heads * (piece.inside // piece.rows) ** 2
    return compute_bytes(model) * matrix * (piece.rows if stage.documents_masked else 1)


def logits(vocabulary: int) -> int:
    """One copy of a token's logits, which are float32."""
    return 4 * vocabulary


def working(model: Model, piece: MicrobatchShape, kernel: Kernel, mlp_chunk_tokens: int | None = None) -> int:
    """What a block's backward makes beyond what it has freed by then: in the MLP, or in attention where torch has no kernel."""
    each, wide = compute_bytes(model), {"swiglu": 2, "gelu": 1, "relu": 1}[model.mlp] * model.hidden_width // piece.tensor
    in_mlp = each * (wide * min(mlp_chunk_tokens or piece.inside, piece.inside) + 2 * model.hidden_size * piece.inside)
    if not exchanges_heads(model, piece.tensor, piece.context_parallel):
        behind = mlp(model, piece.tensor) * min(mlp_chunk_tokens or piece.inside, piece.inside) + norm(model) * piece.between
        return max(in_mlp, ring(model, piece) - behind)  # what is behind attention is freed by then
    scores = 2 * 4 * (model.num_heads // piece.tensor) * piece.context * piece.inside
    return max(in_mlp, scores if kernel == "scores" else 0)


def ring(model: Model, piece: MicrobatchShape) -> int:
    """Ring attention's backward: two tiles of scores, and in float32 keys, values and their gradients, as they go and as they come,
    the queries' gradient and the one that came."""
    half = -(-piece.inside // (2 * piece.rows))
    scores = piece.rows * (model.num_heads // piece.tensor) * min(RING_TILE, half) ** 2
    wide = _queries(model, piece) * (1 if model.dtype == "float32" else 2) + 2 * 4 * _keys(model, piece)
    return 4 * (2 * scores + wide * piece.inside)


def _queries(model: Model, piece: MicrobatchShape) -> int:
    return model.num_heads * model.head // piece.tensor


def _keys(model: Model, piece: MicrobatchShape) -> int:
    return model.key_value_heads * model.head // piece.tensor
