"""What `midwatch plan` says of a model, against the real one: its parameters, its FLOPs, its tensors, the peak of a real step."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from objectives_by_name import OBJECTIVES
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from trainer_meter import SETTINGS, VOCABULARY, MakeWorld, built, fake_worlds, peak_of_a_step, rows, stage

from launcher.plan import ACCELERATORS, activations, flops
from launcher.plan.memory import memory
from midwatch.recipe.model import Model
from trainer.batches import DeviceRows
from trainer.distributed.mesh import local
from trainer.loop import peak_flops
from trainer.model.decoder import Decoder
from trainer.model.logprobs import log_probs
from trainer.optimizer import Optimizer
from trainer.stage.model_roles import model_tensors

LLAMA = Model(num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=2, intermediate_size=136)
GPT = Model(
    num_layers=3,
    hidden_size=48,
    num_heads=4,
    norm="layernorm",
    mlp="gelu",
    bias=True,
    position="learned",
    max_positions=512,
    norm_place="post",
)
BLOOM = Model(
    num_layers=2,
    hidden_size=96,
    num_heads=6,
    num_kv_heads=2,
    intermediate_size=160,
    position="alibi",
    norm="layernorm",
    mlp="relu",
    embedding_norm=True,
    tie_embeddings=False,
)
WIDE = Model(num_layers=2, hidden_size=64, num_heads=4, num_kv_heads=1, head_dim=32, position="sinusoidal", tie_embeddings=False)
DEEP = Model(num_layers=8, hidden_size=128, num_heads=4, num_kv_heads=2, tie_embeddings=False)
SHALLOW = Model(num_layers=2, hidden_size=256, num_heads=8)
SHAPES = {"llama": LLAMA, "gpt": GPT, "bloom": BLOOM, "wide": WIDE, "deep": DEEP, "shallow": SHALLOW}


@pytest.fixture
def world() -> Iterator[MakeWorld]:
    with fake_worlds() as make:
        yield make


def plain(config: Model) -> Decoder:
    with torch.device("meta"):
        model = Decoder(config, VOCABULARY)
    model.to_empty(device="cpu")
    model.initialise(0)
    return model


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_those_of_the_module(name: str) -> None:
    model = plain(SHAPES[name])
    assert SHAPES[name].parameters(VOCABULARY) == sum(p.numel() for p in model.parameters())
    assert flops.block_parameters(SHAPES[name]) == sum(p.numel() for p in model.blocks["0"].parameters())


@pytest.mark.parametrize("context", [32, 100, 400])
@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_those_that_torch_counts(name: str, context: int) -> None:
    """Attention by the math kernel, which computes the masked half too: PaLM's convention, not halved."""
    model, batch = plain(SHAPES[name]), rows(2, context)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        log_probs(model(batch.tokens, batch.positions, batch.segments), batch.targets).sum().backward()  # type: ignore[no-untyped-call]
    measured, tokens = counter.get_total_flops(), 2 * context
    assert flops.flops_per_token(SHAPES[name], VOCABULARY, context) * tokens == pytest.approx(measured, rel=1e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_flops_are_what_the_trainer_divides_by_for_its_mfu(name: str) -> None:
    """Norms and biases, which the trainer counts too, are the difference."""
    planned = flops.flops_per_token(SHAPES[name], VOCABULARY, 200)
    assert planned == pytest.approx(plain(SHAPES[name]).flops_per_token(200), rel=0.02)


def test_peak_rates_are_those_of_the_trainers_mfu() -> None:
    names = {"h200": "H200", "h100-sxm": "H100", "h100-pcie": "H100 PCIe", "h20": "H20", "b200": "B200", "a100-80gb": "A100"}
    for plans, trainers in (names | {"l40s": "L40S"}).items():
        assert ACCELERATORS[plans].flops_per_second("bfloat16") == peak_flops._BFLOAT16[trainers]


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("name", ["llama", "wide", "deep"])
def test_weights_gradients_optimizer_and_the_checkpoints_copy_are_exact(name: str, ranks: int, world: MakeWorld) -> None:
    here = world(ranks)
    model = built(SHAPES[name], VOCABULARY, here)
    optimizer, batch = Optimizer(model.parameters(), here.device), rows(1, 8)
    model.backward([batch], lambda number, policy: OBJECTIVES["pretrain"].loss(policy, batch, SETTINGS, None)[0])
    planned = memory(SHAPES[name], VOCABULARY, stage(8, ranks, 1), ranks, True)

    def held(tensors: Any) -> int:
        return sum(local(tensor).nbytes for tensor in tensors)

    state = optimizer.tensors()
    moments = [tensor for key, tensor in state.items() if "first" in key or "second" in key]
    counts = held([state["optimizer.step"], state["optimizer.skipped"]])
    assert planned.weights_bytes == held(model.parameters().values())
    assert planned.gradients_bytes == held([p.grad for p in model.parameters().values()])
    assert planned.optimizer_bytes == held(moments)
    assert planned.staging_bytes == held((model_tensors(model) | state).values()) - counts
    assert counts < 1000


@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("size", [(1, 16), (4, 64), (2, 200), (1, 600)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gpt", "bloom", "wide"])
def test_activations_are_the_tensors_that_autograd_saves(
    name: str, dtype: str, size: tuple[int, int], masked: bool, world: MakeWorld
) -> None:
    config = msgspec.structs.replace(SHAPES[name], dtype=dtype, **({"max_positions": 600} if name == "gpt" else {}))
    count, time = size
    where = stage(time, 2 * count, count, "sft" if masked else "pretrain")
    planned = memory(config, VOCABULARY, where, 2, True)
    measured = saved(built(config, VOCABULARY, world(2)).parts[0], rows(count, time), masked)
    assert planned.activations_bytes == pytest.approx(measured, rel=0.01)


@pytest.mark.parametrize("size", [(2, 40), (1, 300)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_scores_that_are_kept_whole_are_counted(dtype: str, size: tuple[int, int], world: MakeWorld) -> None:
    """The kernel that a GPU has for float32 with groups of heads is the math one, which the CPU has too."""
    config, (count, time) = msgspec.structs.replace(LLAMA, dtype=dtype), size
    model, batch = built(config, VOCABULARY, world(2)).parts[0], rows(*size)
    with sdpa_kernel(SDPBackend.MATH):
        measured = saved(model, batch, False)
    assert count * time * activations.saved(config, time, "scores") == pytest.approx(measured, rel=0.001)


def saved(model: Decoder, batch: DeviceRows, masked: bool) -> int:
    """Bytes of the distinct storages that a forward keeps for its backward, those of parameters left out."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        gathered = {p.untyped_storage().data_ptr() for p in model.parameters() if not isinstance(p, DTensor)}
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in gathered:
            kept[storage.data_ptr()] = storage
        return tensor

    model.documents_masked = masked
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(batch.tokens, batch.positions, batch.segments, batch.targets).sum()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    ("name", "dtype", "vocabulary", "ranks", "micro_batch", "context", "parts", "objective"),
    [
        ("llama", "float32", 500, 1, 1, 8, 1, "pretrain"),
        ("llama", "float32", 2000, 8, 2, 64, 1, "pretrain"),
        ("llama", "bfloat16", 2000, 2, 4, 128, 2, "pretrain"),
        ("deep", "float32", 500, 8, 1, 8, 2, "pretrain"),
        ("deep", "bfloat16", 500, 8, 2, 64, 3, "pretrain"),
        ("deep", "float32", 4000, 4, 1, 256, 1, "pretrain"),
        ("shallow", "float32", 512, 2, 8, 256, 1, "pretrain"),
        ("shallow", "bfloat16", 500, 8, 1, 8, 1, "pretrain"),
        ("gpt", "float32", 500, 2, 4, 256, 1, "sft"),
        ("bloom", "bfloat16", 500, 2, 2, 128, 2, "pretrain"),
        ("llama", "float32", 500, 2, 2, 64, 1, "dpo"),
        ("deep", "bfloat16", 1000, 4, 2, 128, 1, "dpo"),
    ],
)
def test_the_peak_is_that_of_a_real_step(
    name: str,
    dtype: str,
    vocabulary: int,
    ranks: int,
    micro_batch: int,
    context: int,
    parts: int,
    objective: str,
    world: MakeWorld,
) -> None:
    """Forward, backward, accumulation, clipping and AdamW under FSDP2, as the loop does them; the second step."""
    config = msgspec.structs.replace(SHAPES[name], dtype=dtype)
    where = stage(context, ranks * micro_batch * parts, micro_batch, objective, masked_documents=objective == "sft")
    found = peak_of_a_step(config, vocabulary, world(ranks), where)
    planned = memory(config, vocabulary, where, ranks, True)
    assert planned.peak_bytes - planned.staging_bytes == pytest.approx(found, rel=0.05)


STEPS = """
import torch, torch.distributed as dist
from midwatch.recipe.model import Model
from trainer_meter import SETTINGS, rows
from objectives_by_name import OBJECTIVES
from trainer.optimizer import Optimizer
from trainer.model.sharded_model import ShardedModel
from trainer.distributed.mesh import World

torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = dist.device_mesh.init_device_mesh("cpu", (1,), mesh_dim_names=("shard",))
world = World(0, 1, torch.device("cpu"), mesh, mesh, dist.group.WORLD, dist.group.WORLD)

def resident(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

def train(config, vocabulary, count, time):
    model = ShardedModel(config, vocabulary, world)
    model.initialise(0)
    optimizer = Optimizer(model.parameters(), world.device)
    for _ in range(2):
        batch = rows(count, time)
        model.backward([batch], lambda number, policy: OBJECTIVES["pretrain"].loss(policy, batch, SETTINGS, None)[0])
        optimizer.update(SETTINGS, 1e-3, 1e-8, optimizer.squared_norm().sqrt())

train(Model(num_layers=1, hidden_size=64, num_heads=2), 500, 1, 16)
before = resident("VmRSS")
train(Model(num_layers=6, hidden_size=256, num_heads=4, num_kv_heads=2), 4000, 4, 256)
print(resident("VmHWM") - before)
"""

SETTLE = """
from midwatch.recipe import Cluster
from trainer.distributed.mesh import settle

settle(Cluster(device="cpu"))
"""
AGAIN = """
import resource

def cleared():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.zeros(2**24)
before = cleared()
for _ in range(20):
    torch.zeros(2**24)  # 64 MiB, as logits are
print(cleared() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_peak_is_what_a_process_takes_of_the_machine() -> None:
    """Resident memory of two real steps of a rank, over what it had before; with an allocator that gives back what is freed."""
    here = Path(__file__).parent
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": f"{here.parents[1]}:{here}"}
    done = subprocess.run([sys.executable, "-c", STEPS], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    config = Model(num_layers=6, hidden_size=256, num_heads=4, num_kv_heads=2)
    planned = memory(config, 4000, stage(256, 4, 4), 1, True)
    assert planned.peak_bytes - planned.staging_bytes == pytest.approx(int(done.stdout), rel=0.1)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's malloc")
def test_a_rank_that_has_settled_keeps_its_room_and_takes_little_more() -> None:
    """Freed tensors are not given back and their pages cleared again at every step; the heap's gaps cost some memory."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": f"{here.parents[1]}:{here}"}
    program = [sys.executable, "-c", SETTLE + STEPS + AGAIN]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    took, cleared = map(int, done.stdout.split())
    planned = memory(Model(num_layers=6, hidden_size=256, num_heads=4, num_kv_heads=2), 4000, stage(256, 4, 4), 1, True)
    assert took < 1.2 * (planned.peak_bytes - planned.staging_bytes)
    assert cleared < 2 * 2**24 * 4 / 4096, "of twenty such tensors fewer than two's pages"
