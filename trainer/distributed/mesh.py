"""Devices, and the ranks of a generation: their mesh, and a gloo group each for commands and for checkpoints."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # there, but not in torch's stubs
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from midwatch.recipe.cluster import Cluster
from midwatch.recipe.load import RecipeError
from midwatch.recipe.parallel import Parallel, multiple_of
from trainer.distributed.sequence_parallel import RankGroup

FOREVER = timedelta(days=3650)
"""A pause may last as long as it likes; that a rank is gone shows by its connection, or to the agent."""
ALONE = Parallel()
"""Nothing but data parallelism."""
CONNECTING = timedelta(minutes=30)
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt: <malloc.h>
_REUSED = 128 * 2**20
"""Bytes of the largest tensor in a processor's memory whose room is kept for the next."""


@dataclass(frozen=True)
class World:
    """The ranks of this generation, and the ways between them.

    Ranks lie in a mesh: pipeline x data x tensor, the last one varying fastest. Of the data ranks as many as the stage's
    `context_parallel` says share their rows, and are a replica with their pipeline and tensor-parallel ranks.
    """

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    """Of `pipeline`, `replicate`, `shard` and `tensor` those that are larger than 1, and `shard` always."""
    outer: DeviceMesh
    """Data and tensor-parallel ranks alike, over which is sharded what is outside the blocks."""
    control: dist.ProcessGroup
    checkpoint: dist.ProcessGroup
    parallel: Parallel = ALONE
    ends: dist.ProcessGroup | None = None
    """This rank and its counterpart at the pipeline's other end, where it is at an end."""
    contexts: dict[int, RankGroup] = field(default_factory=dict)
    """Data ranks that share rows, by how many do; those that were asked for."""

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def inner(self) -> DeviceMesh:
        """Data ranks, over which a block is sharded."""
        return data_mesh(self.mesh)

    @property
    def data(self) -> int:
        """Ranks among which rows, or tokens, are divided."""
        return self.size // self.parallel.model_ranks

    @property
    def data_place(self) -> int:
        return self.rank // self.parallel.tensor % self.data

    @property
    def tensor(self) -> RankGroup:
        return self._group("tensor")

    @property
    def pipeline(self) -> RankGroup:
        return self._group("pipeline")

    def context(self, size: int) -> RankGroup:
        """Neighbouring data ranks that share rows, by so many. All ranks make all groups, in the same order."""
        if size == 1:
            return RankGroup()
        if size not in self.contexts:
            tensor, data = self.parallel.tensor, self.data
            for pipeline, first, place in itertools.product(range(self.parallel.pipeline), range(0, data, size), range(tensor)):
                ranks = [(pipeline * data + first + i) * tensor + place for i in range(size)]
                group = dist.new_group(ranks, timeout=FOREVER)
                if self.rank in ranks:
                    self.contexts[size] = RankGroup(group, size, ranks.index(self.rank))
        return self.contexts[size]

    def _group(self, name: str) -> RankGroup:
        if getattr(self.parallel, name) == 1:
            return RankGroup()
        return RankGroup(self.mesh.get_group(name), getattr(self.parallel, name), self.mesh.get_local_rank(name))

    def synchronize(self) -> None:
        """Waits until the device has done everything asked of it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def choose_device(wanted: str) -> torch.device:
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def settle(cluster: Cluster) -> None:
    """Threads, kernels and memory; before anything is computed."""
    torch.set_num_threads(cluster.threads)
    if choose_device(cluster.device).type == "cpu":
        _keep_room()
    if cluster.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # As use_deterministic_algorithms(True), which would import the compiler for 0.7 s; and new tensors need no filling.
        torch.set_deterministic_debug_mode("error")
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # there, but not in torch's stubs


def _keep_room() -> None:
    """Has glibc keep what is freed: by itself it maps each large tensor anew, and the kernel clears its pages at every step."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _REUSED) or libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)  # the most that older ones take
        libc.mallopt(_TRIM_THRESHOLD, 8 * _REUSED)


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


def join(store: Store, prefix: str, cluster: Cluster, parallel: Parallel) -> World:
    """Gathers the ranks. `prefix` is the generation's own: keys of an earlier one in the same store would be taken for ours.

    Raises RecipeError where there are not as many ranks as the mesh needs.
    """
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
    return lay_out(device, parallel)


def lay_out(device: torch.device, parallel: Parallel) -> World:
    """The mesh over all ranks of the process group, and the ways between them. Raises RecipeError, as `join`."""
    rank, size = dist.get_rank(), dist.get_world_size()
    unit = multiple_of(parallel, ())
    if size % unit:
        raise RecipeError(f"[parallel]: the mesh needs a multiple of {unit} ranks, and there are {size}")
    mesh, outer = _meshes(size, device, parallel)
    return World(rank, size, device, mesh, outer, _gloo(), _gloo(), parallel, _ends(rank, size, parallel))


def _meshes(size: int, device: torch.device, parallel: Parallel) -> tuple[DeviceMesh, DeviceMesh]:
    """Of all ranks; and of the data ranks, in which tensor-parallel ones count as data ranks too."""
    data = size // parallel.model_ranks
    shard = parallel.hsdp_shard_size or data
    sizes = {"pipeline": parallel.pipeline, "replicate": data // shard, "shard": shard, "tensor": parallel.tensor}
    mesh = _mesh(device, sizes)
    if parallel.tensor == 1:
        return mesh, data_mesh(mesh)
    return mesh, data_mesh(_mesh(device, sizes | {"shard": shard * parallel.tensor, "tensor": 1}))


def _mesh(device: torch.device, sizes: dict[str, int]) -> DeviceMesh:
    kept = {name: length for name, length in sizes.items() if length > 1 or name == "shard"}
    return init_device_mesh(device.type, tuple(kept.values()), mesh_dim_names=tuple(kept))


def data_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """Of `shard`, and `replicate` where there is one."""
    names = mesh.mesh_dim_names or ()
    return mesh["replicate", "shard"] if "replicate" in names else mesh["shard"]


def _ends(rank: int, size: int, parallel: Parallel) -> dist.ProcessGroup | None:
    """Made by all ranks, pair after pair."""
    if parallel.pipeline == 1:
        return None
    found, each = None, size // parallel.pipeline
    for first in range(each):
        pair = [first, first + (parallel.pipeline - 1) * each]
        group = dist.new_group(pair, timeout=FOREVER)
        found = group if rank in pair else found
    return cast(dist.ProcessGroup | None, found)


def _gloo() -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=FOREVER))


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, sharing its storage."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def box(tensor: Tensor) -> tuple[slice, ...]:
    """Where this rank's part lies in the whole tensor."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, length) for length in tensor.shape)
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(slice(offset, offset + length) for offset, length in zip(offsets, shape, strict=True))


def copies(tensor: Tensor) -> int:
    """Ranks that have the same part of it as this one, itself among them."""
    if not isinstance(tensor, DTensor):
        return 1
    return math.prod(tensor.device_mesh.size(i) for i, placed in enumerate(tensor.placements) if placed.is_replicate())


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


def gather(body: bytes, group: dist.ProcessGroup) -> list[bytes]:
    """Every rank's bytes, to all of them, in the order of ranks."""
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(lengths, torch.tensor([len(body)]), group=group)
    longest = max(int(length) for length in lengths)
    buffers = [torch.empty(longest, dtype=torch.uint8) for _ in lengths]
    dist.all_gather(buffers, torch.frombuffer(bytearray(body.ljust(longest, b"\0")), dtype=torch.uint8), group=group)
    return [bytes(buffer[: int(length)].numpy()) for buffer, length in zip(buffers, lengths, strict=True)]


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
