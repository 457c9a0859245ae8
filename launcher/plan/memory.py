"""Memory of one rank, by part, and its peak in a step: what the trainer under FSDP2 really holds.

Weights, gradients and AdamW's two moments are float32, sharded over all ranks (Rajbhandari et al. 2020, ZeRO stage 3; Zhao et
al. 2023, FSDP). Not counted: the CUDA context, NCCL's buffers, kernels' workspaces and what the allocator leaves unused.
"""

from __future__ import annotations

import msgspec

from launcher.plan import activations
from launcher.plan.activations import Kernel
from launcher.plan.flops import block_parameters, compute_bytes, rows_of_a_sample
from launcher.plan.peak import FLOAT32, Shape, moments
from launcher.recipe import Model, Stage

MOMENTS = 2


class Memory(msgspec.Struct, frozen=True):
    """Bytes on one rank. Parts are at their largest, which they are not all at once; `peak_bytes` is the most at any moment."""

    weights_bytes: int
    gradients_bytes: int
    gradients_whole: bool
    """Micro-batches accumulate: all gradients lie on every rank until the last one's are reduced."""
    optimizer_bytes: int
    reference_bytes: int
    """DPO's frozen copy."""
    gathered_bytes: int
    """Parameters that FSDP2 holds whole, in the compute type: all that is outside the blocks, and two blocks."""
    activations_bytes: int
    """Of one micro-batch."""
    logits_bytes: int
    """Log-probabilities, their gradient and the logits', as backward begins."""
    attention_kernel: Kernel
    staging_bytes: int
    """Copy of weights and optimizer that a checkpoint is written from, in the host's memory."""
    peak_bytes: int
    """On the rank's device; on a CPU that is the host, and the staging copy is in it."""
    peak_moment: str


def memory(model: Model, vocabulary: int, stage: Stage, ranks: int, on_cpu: bool) -> Memory:
    """Of a rank in a step of the stage, once a checkpoint has been written."""
    parameters, samples = model.parameters(vocabulary), -(-stage.global_batch // ranks)
    shard = -(-FLOAT32 * parameters // ranks)
    shape = _shape(model, vocabulary, stage, ranks, on_cpu)
    optimizer, reference = MOMENTS * shard, (shape.models - 1) * shard
    staging = shard + optimizer
    at = moments(shape)
    moment = max(at, key=lambda name: at[name])
    return Memory(
        weights_bytes=shard,
        gradients_bytes=shape.whole_bytes or shard,
        gradients_whole=samples > stage.micro_batch,
        optimizer_bytes=optimizer,
        reference_bytes=reference,
        gathered_bytes=shape.each * (shape.models * shape.root + min(2, shape.layers) * shape.block),
        activations_bytes=shape.saved_bytes,
        logits_bytes=3 * shape.logits_bytes,
        attention_kernel=activations.attention_kernel(model, stage, on_cpu),
        staging_bytes=staging,
        peak_bytes=shard + optimizer + reference + at[moment] + (staging if on_cpu else 0),
        peak_moment=moment,
    )


def tokens_at_once(stage: Stage, ranks: int) -> int:
    """Tokens of one micro-batch on a rank."""
    samples = -(-stage.global_batch // ranks)
    return rows_of_a_sample(stage) * min(stage.micro_batch, samples) * stage.context


def _shape(model: Model, vocabulary: int, stage: Stage, ranks: int, on_cpu: bool) -> Shape:
    tokens, each, block = tokens_at_once(stage, ranks), compute_bytes(model), block_parameters(model)
    kernel, time = activations.attention_kernel(model, stage, on_cpu), stage.context
    costs = activations.alibi_costs(model, stage, tokens // time, kernel)
    return Shape(
        ranks=ranks,
        layers=model.layers,
        each=each,
        block=block,
        root=model.parameters(vocabulary) - model.layers * block,
        table=vocabulary * model.width,
        tied=model.tied,
        models=2 if stage.objective == "dpo" else 1,
        accumulates=-(-stage.global_batch // ranks) > stage.micro_batch,
        saved_bytes=tokens * activations.saved(model, time, kernel) + costs,
        saved_bytes_per_block=tokens * activations.block(model, time, kernel),
        saved_bytes_after=tokens * activations.norm(model) if model.norm_place == "before" else 0,
        logits_bytes=tokens * activations.logits(vocabulary),
        working_bytes=tokens * activations.working(model, time, kernel),
    )
