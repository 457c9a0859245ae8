"""How the ranks of a stage are laid out, and which layers each of them has: pipeline x data x tensor, tensor innermost.

Context parallelism takes its ranks out of the data-parallel ones, and hybrid sharding divides those into copies of the state.
"""

from __future__ import annotations

import msgspec

from launcher.plan.units import PlanError
from midwatch.recipe import Model, Parallel, Stage
from midwatch.recipe.parallel import multiple_of


class Mesh(msgspec.Struct, frozen=True):
    """Sizes for one stage; `pipeline` x `data` x `tensor` are all ranks."""

    pipeline: int
    data: int
    tensor: int
    context: int
    """Ranks among which each row's tokens are divided; they divide `data`."""
    shard: int
    """Data-parallel ranks over which one copy of the state is spread; they divide `data`."""
    parts: int
    """Parts of the layers on one pipeline rank; 1 unless interleaved."""

    @property
    def ranks(self) -> int:
        return self.pipeline * self.data * self.tensor

    @property
    def replicas(self) -> int:
        """Groups of ranks that each have rows of their own."""
        return self.data // self.context


class PipelineShare(msgspec.Struct, frozen=True):
    """What one pipeline rank has of the model."""

    layers: tuple[int, ...]
    """Of each of its parts."""
    first: bool
    """Its first part begins with the embedding."""
    last: bool
    """Its last part ends with the output layer."""


class Batches(msgspec.Struct, frozen=True):
    """What one replica computes in a step."""

    samples: int
    """With what fills up unequal shares."""
    micro_batch: int
    count: int
    """Micro-batches."""


def mesh_of(parallel: Parallel, context: int, ranks: int) -> Mesh:
    """context: the stage's `context_parallel`. Raises PlanError for a number of ranks that does not divide so."""
    multiple = multiple_of(parallel, (context,))
    if ranks < 1 or ranks % multiple:
        sizes = {
            "pipeline": parallel.pipeline,
            "tensor": parallel.tensor,
            "context": context,
            "shard": parallel.hsdp_shard_size or 1,
        }
        needed = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        ways = " or ".join(str(n) for n in (ranks // multiple * multiple, -(-ranks // multiple) * multiple) if n)
        raise PlanError(f"{ranks} GPUs are not a multiple of {multiple}, for {needed} (use --gpus {ways})")
    data = ranks // parallel.model_ranks
    return Mesh(parallel.pipeline, data, parallel.tensor, context, parallel.hsdp_shard_size or data, parallel.parts)


def share_of(mesh: Mesh, model: Model, rank: int) -> PipelineShare:
    """Of a pipeline rank: part k of the layers is on rank k % pipeline; where they are uneven the first parts have one more."""
    parts = mesh.pipeline * mesh.parts
    fewest, more = divmod(model.num_layers, parts)
    layers = tuple(fewest + (part < more) for part in range(rank, parts, mesh.pipeline))
    return PipelineShare(layers, rank == 0, rank == mesh.pipeline - 1)


def batches_of(mesh: Mesh, stage: Stage, count: int | None = None) -> Batches:
    """count: micro-batches instead of the stage's own.

    In a pipeline all micro-batches are of one size, and interleaved they are a multiple of its ranks.
    """
    samples = -(-stage.global_batch // mesh.replicas)
    micro_batch = min(stage.micro_batch, samples)
    found = -(-samples // micro_batch)
    if mesh.parts > 1:
        found = -(-found // mesh.pipeline) * mesh.pipeline
    if mesh.pipeline > 1:
        samples = found * micro_batch
    return Batches(samples, micro_batch, count if count is not None else found)


def waiting_forwards(mesh: Mesh, rank: int, count: int) -> int:
    """Forwards of a part whose activations wait for their backward on a pipeline rank, at the most; of `count` micro-batches.

    1F1B: as many micro-batches as ranks from here to the last (Narayanan et al. 2021, section 2.2.1). Interleaved: those of its
    warm-up (section 2.2.2, as Megatron-LM orders it), and the one that computes.
    """
    behind = mesh.pipeline - rank - 1
    if mesh.parts == 1:
        return min(behind + 1, count)
    return min(2 * behind + (mesh.parts - 1) * mesh.pipeline + 1, count * mesh.parts)


def part_of_forward(mesh: Mesh, number: int) -> int:
    """Which of its parts a rank's forward is of: interleaved, `pipeline` micro-batches go through one part, then the next."""
    return number // mesh.pipeline % mesh.parts
