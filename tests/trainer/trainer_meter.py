"""What tests measure the trainer's memory with: any rank of any number, in one process, and all tensors that are alive on it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import msgspec
import torch
import torch.distributed as dist
from objectives_by_name import OBJECTIVES
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from midwatch.recipe import Model, Parallel, Stage
from trainer.batches import DeviceRows, filled
from trainer.distributed import mesh
from trainer.distributed.mesh import World
from trainer.model import pipeline_stage
from trainer.model.sharded_model import ShardedModel
from trainer.optimizer import Optimizer

VOCABULARY = 500
SETTINGS = {"max_grad_norm": 1.0, "beta1": 0.9, "beta2": 0.95, "weight_decay": 0.1, "beta": 0.1, "label_smoothing": 0.0}

MakeWorld = Callable[..., World]


def _all_ranks() -> Any:
    return dist.group.WORLD


@contextlib.contextmanager
def fake_worlds() -> Iterator[MakeWorld]:
    """One rank of so many. Collectives move nothing, so values are wrong, but every tensor is there in its real size."""

    def make(ranks: int, layout: Parallel | None = None, rank: int = 0) -> World:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
        return mesh.lay_out(torch.device("cpu"), layout or Parallel())

    def agreed(self: Any, received_result: Any = None) -> Tensor:
        """What stages of a pipeline would tell each other before the first step: that all know the shapes."""
        return torch.ones(1, dtype=torch.int32)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with (
        mock.patch.object(mesh, "_gloo", _all_ranks),
        mock.patch.object(pipeline_stage.UnbufferedPipelineStage, "_warmup_backward_result", agreed, create=True),
    ):
        yield make
    torch.set_num_threads(threads)
    dist.destroy_process_group()


def stage(context: int, samples: int, micro_batch: int, objective: str = "pretrain", **more: Any) -> Stage:
    raw = {"name": "s", "objective": objective, "steps": 1, "mixture": {"a": 1.0}}
    return msgspec.convert(raw | {"context": context, "global_batch": samples, "micro_batch": micro_batch} | more, Stage)


def rows(count: int, time: int, vocabulary: int = VOCABULARY) -> DeviceRows:
    tokens = torch.randint(0, vocabulary, (count, time), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(time).expand(count, time).contiguous()
    return DeviceRows(tokens, tokens, torch.ones(count, time), torch.zeros_like(tokens), positions)


def built(config: Model, vocabulary: int, world: World) -> ShardedModel:
    network = ShardedModel(config, vocabulary, world)
    network.initialise(0)
    return network


class Alive(TorchDispatchMode):
    """The bytes of all tensors seen that are alive, after every operation: what an allocator would have been asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
                self._seen[storage._cdata] = weakref.ref(storage)
        self._seen = {key: ref for key, ref in self._seen.items() if ref() is not None}
        self.peak = max(self.peak, sum(storage.nbytes() for ref in self._seen.values() if (storage := ref()) is not None))
        return out


def peak_of_a_step(config: Model, vocabulary: int, world: World, where: Stage) -> int:
    """Bytes: forward, backward, accumulation, clipping and AdamW, as the loop does them; the second step."""
    alive, objective = Alive(), OBJECTIVES[where.objective]
    with alive:
        model = built(config, vocabulary, world)
        reference = built(config, vocabulary, world).freeze() if where.objective == "dpo" else None
        optimizer = Optimizer(model.parameters(), world.device, model.owned())
        for each in (model, reference):
            if each is not None:
                each.configure_stage(where, where.context)
    samples, size = filled(-(-where.global_batch // model.replicas), where.micro_batch, world.pipeline.size)
    batch = rows(size * where.rows_per_sample, where.context)
    for _ in range(2):
        alive.peak = 0
        with alive:
            fixed = None if reference is None else reference.log_probs(batch)
            model.backward(
                [batch] * -(-samples // size),
                lambda number, policy: objective.loss(policy, batch, SETTINGS, fixed)[0],  # noqa: B023
            )
            optimizer.update(SETTINGS, 1e-3, 1e-8, optimizer.squared_norm().sqrt())
    return alive.peak
