"""Memory of one rank, by part, and its peak in a step: what the trainer under FSDP2 really holds.

Weights, gradients and AdamW's two moments are float32, sharded over the data-parallel ranks (Rajbhandari et al. 2020, ZeRO stage
3; Zhao et al. 2023, FSDP), or over `shard` of them, what is left when tensor and pipeline parallelism have taken their parts. Not
counted: the CUDA context, NCCL's buffers, kernels' workspaces and what the allocator leaves unused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from launcher.plan import activations
from launcher.plan.activations import BlockActivations, Kernel, MicrobatchShape
from launcher.plan.auxiliary_memory import beside
from launcher.plan.flops import block_matrices, block_parameters, compute_bytes
from launcher.plan.mesh import Batches, Mesh, PipelineShare, batches_of, mesh_of, part_of_forward, share_of, waiting_forwards
from launcher.plan.peak import FLOAT32, OptimizerShape, moments
from midwatch.recipe import Model, Parallel, Stage
from midwatch.recipe.generate import Generate

MOMENTS = 2


class Memory(msgspec.Struct, frozen=True):
    """Bytes on one rank. Parts are at their largest, which they are not all at once; `peak_bytes` is the most at any moment."""

    pipeline_rank: int
    weights_bytes: int
    gradients_bytes: int
    gradients_whole: bool
    """Micro-batches accumulate: gradients of all that the rank has a part of lie on it until the last one's are reduced."""
    optimizer_bytes: int
    reference_bytes: int
    """And the reward model's, where one scores responses."""
    critic_bytes: int
    """PPO's value model: weights, gradients, moments."""
    engine_bytes: int
    """What writes responses: a whole copy of the model, its KV cache, and the responses."""
    """DPO's frozen copy."""
    gathered_bytes: int
    """Parameters that FSDP2 holds whole, in the compute type: all that is outside the blocks, and two blocks."""
    activations_bytes: int
    """Of all micro-batches that wait for their backward at once; outside a pipeline that is one."""
    micro_batch_bytes: int
    """Of one micro-batch, through all layers that the rank has."""
    waiting_forwards: int
    """Forwards of a part of the layers that wait for their backward at once."""
    again_bytes: int
    """Activations of one block that its backward computes again."""
    logits_bytes: int
    """Of a tile of tokens: logits and log-probabilities, in whose place their gradient comes."""
    attention_kernel: Kernel
    staging_bytes: int
    """Copy of weights and optimizer that a checkpoint is written from, in the host's memory."""
    host_bytes: int
    """Of all these parts but the staging copy, what is kept in the host's memory; on a CPU it is in the peak."""
    peak_bytes: int
    """On the rank's device; on a CPU that is the host, and the staging copy is in it."""
    peak_moment: str


class Setting(NamedTuple):
    """What the memory of a stage's ranks follows from."""

    model: Model
    vocabulary: int
    """Rows of the embedding."""
    stage: Stage
    mesh: Mesh
    batches: Batches
    offload: Literal["none", "optimizer", "parameters"]
    on_cpu: bool
    generate: Generate = Generate()
    neighbours: int = 0
    """Ranks over which a block's parameters stay sharded after its forward: 1, gathered; 0, all that share the state."""

    @property
    def alone(self) -> bool:
        """Whether the rank has nobody to share the model with and computes in float32: it goes without FSDP2."""
        mesh = self.mesh
        return mesh.data * mesh.tensor * mesh.pipeline == 1 and self.model.dtype == "float32" and self.offload != "parameters"

    @property
    def to_host(self) -> str:
        """What is kept elsewhere than on the rank's device; a CPU has one memory."""
        return "none" if self.on_cpu else self.offload

    @property
    def kernel(self) -> Kernel:
        return activations.attention_kernel(self.model, self.stage, self.on_cpu)

    @property
    def piece(self) -> MicrobatchShape:
        return activations.piece_of(self.mesh, self.stage, self.batches.micro_batch)

    @property
    def block(self) -> BlockActivations:
        """Activations of one micro-batch in one block."""
        kind = self.stage.activation_checkpointing
        there = "block" if kind == "offloaded" and self.on_cpu else kind
        return activations.block(self.model, self.piece, self.kernel, there, self.stage.mlp_chunk_tokens)


class RankParameters(NamedTuple):
    """Of one rank's part of the model, before they are sharded over the data-parallel ranks."""

    block: int
    """Of a block, on a tensor-parallel rank."""
    root: int
    """Outside the blocks; sharded over the tensor-parallel ranks as well."""
    output: int
    """Of `root`, those of the output layer, which the embedding shares where they are tied."""
    table_gradients: int
    """Embedding's and output layer's as backward ends; a table that is tied has both its uses', and their sum."""


def memory(model: Model, vocabulary: int, stage: Stage, ranks: int, on_cpu: bool, parallel: Parallel | None = None) -> Memory:
    """Of the rank that holds the most in a step of the stage, once a checkpoint has been written. Raises PlanError."""
    parallel = parallel or Parallel()
    mesh = mesh_of(parallel, stage.context_parallel, ranks)
    batches = batches_of(mesh, stage)
    return worst_rank(Setting(model, vocabulary, stage, mesh, batches, parallel.offload, on_cpu, neighbours=parallel.neighbours))


def worst_rank(setting: Setting) -> Memory:
    """Of the pipeline rank with the highest peak; the ranks beside it hold the same."""
    return max((rank_memory(setting, rank) for rank in range(setting.mesh.pipeline)), key=lambda held: held.peak_bytes)


def rank_memory(setting: Setting, rank: int) -> Memory:
    """Of one pipeline rank."""
    mesh, block, count = setting.mesh, setting.block, setting.batches.count
    share = share_of(mesh, setting.model, rank)
    held, layers = rank_parameters(setting, share), sum(share.layers)
    weights = -(-FLOAT32 * (layers * held.block * mesh.tensor + held.root) // (mesh.shard * mesh.tensor))
    optimizer, staging = MOMENTS * weights, (1 + MOMENTS) * weights
    others = beside(setting.model, setting.vocabulary, setting.stage, setting.generate, weights, optimizer)
    reference = others.frozen
    parts = [part_bytes(setting, share, part) for part in range(mesh.parts)]
    waiting = [part_of_forward(mesh, number) for number in range(waiting_forwards(mesh, rank, count))]
    shapes = [_shape(setting, share, held, part, waiting) for part in sorted(set(waiting))]
    peak, moment = max((bytes, moment) for shape in shapes for moment, bytes in moments(shape).items())
    state = {"none": weights + optimizer + reference, "optimizer": weights + reference, "parameters": 0}[setting.to_host]
    kept = kept_blocks(setting, held, layers)
    state += others.critic + others.engine + kept
    staging *= 2 if others.critic else 1
    in_host = {"none": 0, "optimizer": optimizer, "parameters": 2 * weights + optimizer + reference}[setting.to_host]
    return Memory(
        pipeline_rank=rank,
        weights_bytes=weights,
        gradients_bytes=shapes[0].whole_bytes or weights,
        gradients_whole=count > 1,
        optimizer_bytes=optimizer,
        reference_bytes=reference,
        critic_bytes=others.critic,
        engine_bytes=others.engine,
        gathered_bytes=0 if setting.alone else shapes[0].each * (shapes[0].models * held.root + min(2, layers) * held.block) + kept,
        activations_bytes=sum(parts[part] for part in waiting),
        micro_batch_bytes=sum(parts),
        waiting_forwards=len(waiting),
        again_bytes=block.again_bytes,
        logits_bytes=2 * shapes[-1].logits_bytes,
        attention_kernel=setting.kernel,
        staging_bytes=staging,
        host_bytes=in_host + block.host_bytes * sum(share.layers[part] for part in waiting),
        peak_bytes=state + peak + (staging if setting.on_cpu else 0),
        peak_moment=moment,
    )


def kept_blocks(setting: Setting, held: RankParameters, layers: int) -> int:
    """Bytes of blocks that are not dropped after their forward, besides the two that are gathered at any time.

    The reference keeps its own as the model does.
    """
    if setting.alone or not setting.neighbours:
        return 0
    blocks = max(0, layers - 2) if setting.neighbours == 1 else layers
    models = 2 if setting.stage.needs_reference else 1
    return models * compute_bytes(setting.model) * held.block * blocks // setting.neighbours


def rank_parameters(setting: Setting, share: PipelineShare) -> RankParameters:
    """Biases behind a block's two outward matrices are the same on each tensor-parallel rank, as its norms are."""
    model = setting.model
    queries, keys = model.num_heads * model.head, model.key_value_heads * model.head
    divided = block_matrices(model) + (queries + 2 * keys if model.attention_biased else 0)
    divided += (2 if model.mlp == "swiglu" else 1) * model.hidden_width if model.bias else 0
    block = divided // setting.mesh.tensor + block_parameters(model) - divided
    norm, table = model.hidden_size * (2 if model.norm == "layernorm" and model.bias else 1), setting.vocabulary * model.hidden_size
    root = 0
    if share.first:
        root += table + model.position_rows * model.hidden_size + (norm if model.embedding_norm else 0)
    if share.last:
        root += (norm if model.norm_place == "pre" else 0) + (0 if share.first and model.tie_embeddings else table)
    both = 3 if model.tie_embeddings else 2
    tables = both if share.first and share.last else 1 if share.first or share.last else 0
    return RankParameters(block, root, table if share.last else 0, tables * table)


def part_bytes(setting: Setting, share: PipelineShare, part: int) -> int:
    """Activations that one micro-batch keeps in one of a pipeline rank's parts, what is in the host's memory included."""
    model, stage, piece = setting.model, setting.stage, setting.piece
    first, last = share.first and part == 0, share.last and part == setting.mesh.parts - 1
    found = share.layers[part] * setting.block.kept_bytes + activations.ends(model, piece, first=first, last=last)
    found += 0 if first else activations.got(model, piece, stage.activation_checkpointing)
    return found + activations.alibi_costs(model, stage, piece, setting.kernel)


def _shape(setting: Setting, share: PipelineShare, held: RankParameters, part: int, waiting: Sequence[int]) -> OptimizerShape:
    """While the rank computes the part; waiting: the parts of all forwards that wait, this one's included."""
    model, stage, piece, block = setting.model, setting.stage, setting.piece, setting.block
    kept = [part_bytes(setting, share, n) - block.host_bytes * share.layers[n] for n in range(setting.mesh.parts)]
    last = share.last and part == setting.mesh.parts - 1
    each, tile = compute_bytes(model), min(piece.between, stage.loss_chunk_tokens)
    return OptimizerShape(
        shards=0 if setting.to_host == "parameters" else setting.mesh.shard,
        alone=setting.alone,
        layers=share.layers[part],
        other_layers=sum(share.layers) - share.layers[part],
        each=each,
        block=held.block,
        root=held.root,
        table=held.output if last else 0,
        table_gradients=held.table_gradients,
        models=2 if stage.needs_reference else 1,
        accumulates=setting.batches.count > 1,
        saved_bytes=kept[part],
        saved_bytes_per_block=block.device_bytes,
        saved_bytes_after=piece.between * activations.norm(model) if last and model.norm_place == "pre" else 0,
        again_bytes=block.again_bytes,
        waiting_bytes=sum(kept[n] for n in waiting) - kept[part],
        logits_bytes=tile * activations.logits(setting.vocabulary) if last else 0,
        tiled=last and tile < piece.between,
        hidden_bytes=each * model.hidden_size * piece.between,
        working_bytes=activations.working(model, piece, setting.kernel, stage.mlp_chunk_tokens),
        pipelined=setting.mesh.pipeline > 1,
        steady=setting.batches.count * setting.mesh.parts > len(waiting),
    )
