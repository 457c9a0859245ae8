"""Devices, process groups and sharding: FSDP2 over all ranks, and a gloo group each for commands and for checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from launcher.recipe.cluster import Cluster
from launcher.recipe.model import Model
from trainer.model import Decoder

FOREVER = timedelta(days=3650)
"""A pause may last as long as it likes; that a rank is gone shows by its connection, or to the agent."""
CONNECTING = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """The ranks of this generation, and the ways between them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    control: dist.ProcessGroup
    checkpoint: dist.ProcessGroup

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def synchronize(self) -> None:
        """Waits until the device has done everything asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def choose_device(wanted: str) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def settle(cluster: Cluster) -> None:
    """Threads and kernels; before anything is computed."""
    torch.set_num_threads(cluster.threads)
    if cluster.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # As use_deterministic_algorithms(True), which would import the compiler for 0.7 s; and new tensors need no filling.
        torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def open_store() -> TCPStore:
    """The store of this generation: the elastic agent's, or rank 0's own; also where nothing started us but a shell."""
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=not agents and os.environ["RANK"] == "0",
        wait_for_workers=False,
        timeout=CONNECTING,
    )


def join(store: Store, prefix: str, cluster: Cluster) -> World:
    """Gathers the ranks. `prefix` is the generation's own: keys of an earlier one in the same store would be taken for ours."""
    device = choose_device(cluster.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=PrefixStore(prefix, store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=FOREVER,
        device_id=device if device.type == "cuda" else None,
    )
    return World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        device=device,
        mesh=init_device_mesh(device.type, (dist.get_world_size(),)),
        control=_gloo(),
        checkpoint=_gloo(),
    )


def _gloo() -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=FOREVER))


def build(config: Model, vocabulary: int, world: World, seed: int | None) -> Decoder:
    """The decoder, sharded. `seed` None leaves the parameters unset, for a checkpoint to fill."""
    with torch.device("meta"):
        model = Decoder(config, vocabulary)
    if seed is not None:
        model.to_empty(device=world.device)
        model.initialise(seed)
    shard(model, config, world)
    if seed is None:
        model.to_empty(device=world.device)
    return model


def shard(model: Decoder, config: Model, world: World) -> None:
    """FSDP2: a group a block, and one for what is left; parameters and their gradients' sums stay in float32."""
    policy = MixedPrecisionPolicy()
    if config.dtype == "bfloat16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=world.mesh, mp_policy=policy)
    fully_shard(model, mesh=world.mesh, mp_policy=policy)


def gather_gradients(model: Decoder, wanted: bool) -> None:
    """Whether the next backward sums gradients over the ranks, or leaves that to a later micro-batch's."""
    cast(FSDPModule, model).set_requires_gradient_sync(wanted)


def reshard(model: Decoder) -> None:
    """Drops what a forward without a backward left gathered; else a later forward would use it after the weights changed."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its storage."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(parameter: Tensor, part: Tensor) -> Tensor:
    """`part` as this rank's part of a tensor laid out as the parameter is."""
    if not isinstance(parameter, DTensor):
        return part
    return DTensor.from_local(
        part, parameter.device_mesh, parameter.placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
    )


def reduce(values: Iterable[int], group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> list[int]:
    """Integers summed (or otherwise joined) over all ranks; waits."""
    word = torch.tensor(list(values), dtype=torch.int64)
    dist.all_reduce(word, op=op, group=group)
    return [int(value) for value in word.tolist()]


def share(body: bytes, group: dist.ProcessGroup, source: int = 0) -> bytes:
    """Bytes from one rank to all; the others' are passed over."""
    length = torch.tensor([len(body)], dtype=torch.int64)
    dist.broadcast(length, source, group=group)
    if not int(length):
        return b""
    mine = dist.get_rank(group) == source
    buffer = torch.frombuffer(bytearray(body), dtype=torch.uint8) if mine else torch.empty(int(length), dtype=torch.uint8)
    dist.broadcast(buffer, source, group=group)
    return bytes(buffer.numpy())


def first_problem(problem: str | None, world: World) -> str | None:
    """The problem of the lowest rank that has one, on all ranks: so that all of them go the same way."""
    lowest = reduce([world.rank if problem else world.size], world.control, dist.ReduceOp.MIN)[0]
    if lowest == world.size:
        return None
    return share((problem or "").encode(), world.control, lowest).decode()


def together(action: Callable[[], None], world: World, *errors: type[Exception]) -> str | None:
    """Does something on every rank; the first problem of any of them, to all."""
    try:
        action()
        problem = None
    except errors as error:
        problem = str(error)
    return first_problem(problem, world)
