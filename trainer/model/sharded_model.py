"""The decoder over the ranks of a mesh: who holds what of it, and how a batch passes through.

Every rank of a replica is given the same rows. Blocks are divided among tensor-parallel ranks and sharded by FSDP2 over the data
ranks; what is outside the blocks is sharded over both, since there each tensor-parallel rank has tokens of its own. With a
pipeline each of its ranks holds one or more parts of the layers.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.pipelining import Schedule1F1B, ScheduleInterleaved1F1B
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from midwatch.recipe.model import Model
from midwatch.recipe.stage import Stage
from trainer.batches import DeviceRows
from trainer.distributed.mesh import World, box, local
from trainer.distributed.sequence_parallel import RankGroup, SequenceSharding
from trainer.document_offsets import joined
from trainer.model.decoder import Block, ColumnParallelLinear, Decoder, MemoryOptions, PipelineChunk, RowParallelLinear
from trainer.model.float8 import float8_product
from trainer.model.pipeline_stage import UnbufferedPipelineStage as Relay

_DIVIDED: dict[str, Placement] = {
    "attention.qkv.weight": Shard(0),
    "attention.qkv.bias": Shard(0),
    "attention.out.weight": Shard(1),
    "mlp.gate.weight": Shard(0),
    "mlp.gate.bias": Shard(0),
    "mlp.up.weight": Shard(0),
    "mlp.up.bias": Shard(0),
    "mlp.down.weight": Shard(1),
}
"""Of a block's parameters those that tensor-parallel ranks divide: Shoeybi et al. 2019, section 3."""


class ShardedModel:
    """This rank's parts of the decoder, and the ways through all of them."""

    def __init__(self, config: Model, vocabulary: int, world: World, scalar: bool = False) -> None:
        """The parameters are unset. scalar: it gives each token a number, as reward and value models do."""
        self.config, self.vocabulary, self.scalar, self._world = config, vocabulary, scalar, world
        self._sharding, self._memory = SequenceSharding(), MemoryOptions()
        self._schedules: dict[tuple[int, int, int], Schedule1F1B | ScheduleInterleaved1F1B] = {}
        self._loss: Callable[[int, Tensor], Tensor] = lambda number, found: found
        with torch.device("meta"):
            self.parts = [Decoder(config, vocabulary, part, scalar) for part in _parts(config, world, world.pipeline.place)]
        for part in self.parts:
            _apply_float8_and_compile(part, config, world.device)
            _shard(part, config, world)
            part.to_empty(device="cpu" if world.parallel.offload == "parameters" else world.device)

    @contextlib.contextmanager
    def configured(self, *, temperature: float | None = None, documents_masked: bool | None = None) -> Iterator[None]:
        """Within it, logits are divided by `temperature`, and documents masked or not; then both are again as they were.

        None: as they are, which is as the stage trains.
        """
        before = [(part.temperature, part.documents_masked) for part in self.parts]
        for part in self.parts:
            part.temperature = part.temperature if temperature is None else temperature
            part.documents_masked = part.documents_masked if documents_masked is None else documents_masked
        try:
            yield
        finally:
            for part, (old_temperature, were_masked) in zip(self.parts, before, strict=True):
                part.temperature, part.documents_masked = old_temperature, were_masked

    def flops_per_token(self, context: int) -> float:
        """Of the whole decoder, forward and backward."""
        return self.parts[0].flops_per_token(context)

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for part in self.parts for block in part.blocks.values()]

    @property
    def replicas(self) -> int:
        """Into which the global batch is divided."""
        return self._world.data // self._sharding.context.size

    @property
    def replica(self) -> int:
        return self._world.data_place // self._sharding.context.size

    @property
    def is_replica_leader(self) -> bool:
        """Of the ranks of a replica the one that counts what all of them know."""
        return self._world.tensor.place == 0 and self._sharding.context.place == 0 and self.ends_here

    @property
    def ends_here(self) -> bool:
        """Whether the last of the layers are on this rank, and so the losses of a pipeline."""
        return any(part.part.last for part in self.parts)

    def parameters(self) -> dict[str, nn.Parameter]:
        """By name; of a pipeline's, with tied weights, both ends have the embedding."""
        return {name: parameter for part in self.parts for name, parameter in part.named_parameters()}

    def owned(self) -> set[str]:
        """Names of the parameters that count here and not at the pipeline's other end."""
        names = set(self.parameters())
        return names if self._twin() is None or self._world.pipeline.place == 0 else names - {"embedding.weight"}

    @torch.no_grad()
    def initialise(self, seed: int, only: str = "") -> None:
        """Draws the parameters, or the one of that name; each rank keeps its part of each."""
        for part in self.parts:
            for parameter, values in part.drawn(seed, only):
                local(parameter).copy_(values[box(parameter)])

    def copy_from(self, other: ShardedModel) -> None:
        """All parameters that both have; two with other heads do not share these."""
        theirs = other.parameters()
        for name, mine in self.parameters().items():
            if name in theirs:
                local(mine).copy_(local(theirs[name]))

    @torch.no_grad()
    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Each parameter of the whole decoder under its name, one after another; by all ranks, to all of them."""
        self.reshard()
        pipeline, mine = self._world.pipeline, self.parameters()
        if pipeline.size == 1:
            yield from ((name, _whole(parameter, self._world.device)) for name, parameter in mine.items())
            return
        assert pipeline.ranks is not None
        for place in range(pipeline.size):
            parts = list(_parts(self.config, self._world, place))
            with torch.device("meta"):
                theirs = [Decoder(self.config, self.vocabulary, part, self.scalar) for part in parts]
            for name, like in ((name, like) for part in theirs for name, like in part.named_parameters()):
                here = place == pipeline.place
                found = _whole(mine[name], self._world.device) if here else torch.empty(like.shape, device=self._world.device)
                dist.broadcast(found, dist.get_global_rank(pipeline.ranks, place), group=pipeline.ranks)
                yield name, found

    def freeze(self) -> ShardedModel:
        for part in self.parts:
            part.requires_grad_(False)
        return self

    def configure_stage(self, stage: Stage, original_context: int) -> None:
        """Positions, masks, context parallelism and memory as the stage wants them; parameters do not change. By all ranks."""
        self._memory = MemoryOptions(stage.activation_checkpointing, stage.mlp_chunk_tokens, stage.loss_chunk_tokens)
        context, config, tensor = self._world.context(stage.context_parallel), self.config, self._world.tensor
        divides = config.num_heads % (tensor.size * context.size) == config.key_value_heads % (tensor.size * context.size) == 0
        self._sharding = SequenceSharding(tensor, context, ring=context.size > 1 and not divides)
        self._schedules = {}  # what goes from part to part has another size
        for part in self.parts:
            part.set_positions(stage.rope or config.rope, original_context, stage.position_factor)
            part.documents_masked, part.temperature = stage.documents_masked, stage.temperature
            part.sharding, part.memory = self._sharding, self._memory

    # Ways through

    @torch.no_grad()
    def scores(self, rows: DeviceRows) -> Tensor:
        """With a scalar head: what it gives each token, [rows, time]. On all ranks of a replica."""
        return self._through(rows)

    @torch.no_grad()
    def log_probs(self, rows: DeviceRows, entropy: bool = False) -> Tensor:
        """Of the targets, [rows, time]; beside each the entropy where asked for, [rows, time, 2]. On all ranks of a replica."""
        return self._through(rows, entropy)

    def backward(self, rows: Sequence[DeviceRows], loss: Callable[[int, Tensor], Tensor]) -> None:
        """Gradients of the sum of the micro-batches' losses; loss: (number, log-probabilities or scores [rows, time]) to a scalar.

        Ranks of a replica are given the same rows, and must compute the same loss; under a pipeline it is called where the
        layers end. All micro-batches are of one shape. Gradients are summed over the ranks.
        """
        if self._world.pipeline.size == 1:
            (part,) = self.parts
            for number, each in enumerate(rows):
                if isinstance(part, FSDPModule):
                    part.set_requires_gradient_sync(number == len(rows) - 1)
                found = part(each.tokens, each.positions, each.segments, each.targets, documents=each.documents)
                loss(number, found).backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
            return
        self._loss = loss
        schedule = self._schedule(rows)
        first = [torch.cat([each.tokens for each in rows])] if self._world.pipeline.place == 0 else []
        schedule.step(
            *first,
            target=torch.arange(len(rows)),
            positions=torch.cat([each.positions for each in rows]),
            segments=torch.cat([each.segments for each in rows]),
            targets=torch.cat([each.targets for each in rows]),
            documents=joined([each.documents for each in rows]),
            return_outputs=False,
        )
        self._join_twins()

    def bubble(self, count: int) -> float:
        """Part of a step of so many micro-batches in which a pipeline's rank idles: Narayanan et al. 2021, section 2.2."""
        idle = self._world.pipeline.size - 1
        return idle / (len(self.parts) * count + idle)

    def reshard(self) -> None:
        """Drops what a forward without a backward left gathered; else a later forward would use it after the weights changed."""
        for part in self.parts:
            for module in part.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    def _through(self, rows: DeviceRows, entropy: bool = False) -> Tensor:
        """A forward without a backward, from rank to rank of the pipeline; its result goes back to all of them."""
        pipeline, count = self._world.pipeline, len(self.parts) * self._world.pipeline.size
        found: Tensor | None = None
        for number, part in enumerate(self.parts):
            index = number * pipeline.size + pipeline.place
            x = rows.tokens if index == 0 else self._receive(rows.tokens, pipeline)
            found = part(x, rows.positions, rows.segments, rows.targets, entropy, rows.documents)
            if index + 1 < count:
                self._send(found, pipeline)
        assert found is not None
        if pipeline.size == 1:
            return found
        assert pipeline.ranks is not None
        shape = (*rows.tokens.shape, 2) if entropy else rows.tokens.shape
        result = found.contiguous() if self.ends_here else torch.empty(shape, device=self._world.device)
        dist.broadcast(result, dist.get_global_rank(pipeline.ranks, pipeline.size - 1), group=pipeline.ranks)
        return result

    def _between(self, rows: int, time: int, device: torch.device | str) -> Tensor:
        """As large as what goes from one part to the next."""
        length = self._sharding.length(time) // self._sharding.context.size // self._sharding.tensor.size
        dtype = torch.bfloat16 if self.config.dtype == "bfloat16" else torch.float32
        return torch.empty(rows, length, self.config.hidden_size, dtype=dtype, device=device)

    def _receive(self, tokens: Tensor, pipeline: RankGroup) -> Tensor:
        assert pipeline.ranks is not None
        x = self._between(len(tokens), tokens.shape[1], self._world.device)
        dist.recv(x, dist.get_global_rank(pipeline.ranks, (pipeline.place - 1) % pipeline.size), group=pipeline.ranks)
        return x

    def _send(self, x: Tensor, pipeline: RankGroup) -> None:
        assert pipeline.ranks is not None
        dist.send(x.contiguous(), dist.get_global_rank(pipeline.ranks, (pipeline.place + 1) % pipeline.size), group=pipeline.ranks)

    def _schedule(self, rows: Sequence[DeviceRows]) -> Schedule1F1B | ScheduleInterleaved1F1B:
        """By shape: a stage's rows are all of one."""
        key = (len(rows), *rows[0].tokens.shape)
        if key not in self._schedules:
            stages = [self._stage(number, part, *rows[0].tokens.shape) for number, part in enumerate(self.parts)]

            def loss(found: Tensor, number: Tensor) -> Tensor:
                return self._loss(int(number), found)

            if len(stages) == 1:
                made: Schedule1F1B | ScheduleInterleaved1F1B = Schedule1F1B(stages[0], len(rows), loss_fn=loss, scale_grads=False)
            else:
                made = ScheduleInterleaved1F1B(list(stages), len(rows), loss_fn=loss, scale_grads=False)
            self._schedules = {key: made}
        return self._schedules[key]

    def _stage(self, number: int, part: Decoder, rows: int, time: int) -> Relay:
        pipeline = self._world.pipeline
        between = self._between(rows, time, "meta").requires_grad_()
        tokens = torch.empty(rows, time, dtype=torch.int64, device="meta")
        made = Relay(
            part,
            number * pipeline.size + pipeline.place,
            len(self.parts) * pipeline.size,
            self._world.device,
            input_args=tokens if part.part.first else between,
            output_args=torch.empty(rows, time, device="meta", requires_grad=True) if part.part.last else between,
            group=pipeline.ranks,
        )
        made.room = functools.partial(self._between, rows, time, self._world.device)
        return made

    def _twin(self) -> dist.ProcessGroup | None:
        """The ranks that have the embedding as well, where a pipeline's two ends share it."""
        return self._world.ends if self.config.tie_embeddings and not self.scalar else None

    def _join_twins(self) -> None:
        """The embedding's gradient, of what was read and of what was written."""
        group = self._twin()
        if group is None:
            return
        parameter = self.parameters()["embedding.weight"]
        if parameter.grad is None:
            raise RuntimeError("the embedding has no gradient")
        dist.all_reduce(local(parameter.grad), group=group)


def _whole(parameter: Tensor, device: torch.device) -> Tensor:
    """The whole of a parameter that is sharded over ranks, on the device."""
    parameter = parameter.detach().to(device)
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def _parts(config: Model, world: World, place: int) -> Iterator[PipelineChunk]:
    """Of the layers, as evenly as they divide, a pipeline rank's parts: part k is on pipeline rank k modulo their number."""
    parallel = world.parallel
    count = parallel.pipeline * parallel.parts
    for index in range(place, count, parallel.pipeline):
        each, more = divmod(config.num_layers, count)
        start = index * each + min(index, more)
        yield PipelineChunk(start, start + each + (index < more), index == 0, index == count - 1)


def _shard(part: Decoder, config: Model, world: World) -> None:
    """FSDP2: a group a block, and one for what is left; parameters and their gradients' sums stay in float32.

    A rank that is alone, and computes in float32, has nothing to gather, cast or sum, and goes without.
    """
    if world.size == 1 and config.dtype == "float32" and world.parallel.offload != "parameters":
        return
    precision = MixedPrecisionPolicy()
    if config.dtype == "bfloat16":
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offload = OffloadPolicy()
    if world.parallel.offload == "parameters":
        offload = CPUOffloadPolicy(pin_memory=world.device.type == "cuda")
    wanted = world.parallel.reshard_after_forward
    kept = None if wanted == "auto" else wanted
    for block in part.blocks.values():
        if world.tensor.size > 1:
            _divide(cast(Block, block), world.mesh["tensor"])
        fully_shard(block, mesh=world.inner, mp_policy=precision, offload_policy=offload, reshard_after_forward=kept)
    fully_shard(part, mesh=world.outer, mp_policy=precision, offload_policy=offload)
    for module in part.modules():
        if isinstance(module, FSDPModule):
            # Sums, not means: the loss is divided by the weight of the whole batch.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def _apply_float8_and_compile(part: Decoder, config: Model, device: torch.device) -> None:
    """Float8 and compilation of the blocks, where the recipe wants them."""
    if config.float8 != "none":
        product = float8_product(config.float8, device)
        for module in part.blocks.modules():
            if isinstance(module, ColumnParallelLinear | RowParallelLinear):
                module.product = product
    if config.compile:
        for block in part.blocks.values():
            cast(Block, block).compiled = torch.compile(cast(Block, block).through)


def _divide(block: Block, mesh: DeviceMesh) -> None:
    for path, parameter in list(block.named_parameters()):
        where, _, name = path.rpartition(".")
        placed = distribute_tensor(parameter, mesh, [_DIVIDED.get(path, Replicate())], src_data_rank=None)
        assert isinstance(placed, DTensor)
        setattr(block.get_submodule(where), name, nn.Parameter(placed))
