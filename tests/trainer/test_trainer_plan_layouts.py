"""What `midwatch plan` says of a rank's memory with the model laid over ranks, and with what saves memory, against the real one."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from trainer_meter import VOCABULARY, MakeWorld, fake_worlds, peak_of_a_step, stage

from launcher.plan.flops import block_parameters
from launcher.plan.memory import Setting, memory, rank_memory
from launcher.plan.mesh import Mesh, batches_of, mesh_of
from midwatch.recipe import Model, Parallel
from trainer.batches import filled, samples_a_replica

LLAMA = Model(num_layers=4, hidden_size=96, num_heads=8, num_kv_heads=4, tie_embeddings=False)
MODELS = {
    "llama": LLAMA,
    "bfloat16": msgspec.structs.replace(LLAMA, dtype="bfloat16"),
    "one key head": msgspec.structs.replace(LLAMA, num_kv_heads=1),
    "gpt": Model(
        num_layers=3,
        hidden_size=96,
        num_heads=8,
        norm="layernorm",
        mlp="gelu",
        bias=True,
        position="learned",
        max_positions=512,
        norm_place="post",
    ),
}


@pytest.fixture
def world() -> Iterator[MakeWorld]:
    with fake_worlds() as make:
        yield make


@pytest.mark.parametrize(
    ("name", "parallel", "ranks", "changes"),
    [
        ("llama", {"tensor": 2}, 2, {}),
        ("bfloat16", {"tensor": 4}, 8, {"activation_checkpointing": "selective"}),
        ("gpt", {"tensor": 2}, 4, {"activation_checkpointing": "block"}),
        ("llama", {}, 4, {"context_parallel": 2}),
        ("bfloat16", {}, 4, {"context_parallel": 4}),
        ("one key head", {}, 2, {"context_parallel": 2, "context": 512}),
        ("bfloat16", {"tensor": 2}, 4, {"context_parallel": 2, "activation_checkpointing": "block"}),
        ("llama", {"hsdp_shard_size": 2}, 4, {"context_parallel": 2}),
        ("llama", {"offload": "parameters"}, 2, {"activation_checkpointing": "offloaded"}),
        ("bfloat16", {}, 2, {"activation_checkpointing": "selective", "mlp_chunk_tokens": 64}),
        ("llama", {}, 4, {"mlp_chunk_tokens": 64, "loss_chunk_tokens": 64, "activation_checkpointing": "block"}),
        ("llama", {"tensor": 2}, 2, {"objective": "dpo", "micro_batch": 1, "loss_chunk_tokens": 64}),
    ],
)
def test_the_peak_of_a_rank_is_that_of_a_real_step(
    name: str, parallel: dict[str, Any], ranks: int, changes: dict[str, Any], world: MakeWorld
) -> None:
    layout, config = msgspec.convert(parallel, Parallel), MODELS[name]
    found = {"context": 192, "micro_batch": 2} | changes
    replicas = ranks // layout.model_ranks // found.get("context_parallel", 1)
    where = stage(samples=found["micro_batch"] * replicas, **found)
    planned = memory(config, VOCABULARY, where, ranks, True, layout)
    measured = peak_of_a_step(config, VOCABULARY, world(ranks, layout), where)
    assert planned.peak_bytes - planned.staging_bytes == pytest.approx(measured, rel=0.06)


@pytest.mark.parametrize("pipeline", [1, 2, 4])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_plan_has_the_micro_batches_of_a_step(pipeline: int, parts: int) -> None:
    """In number and size: memory, bubble and hours follow from them. A pipeline of 4 was planned with 1 where a step has 4."""
    for rows, size, data in itertools.product((2, 6, 8, 10, 32), (1, 2, 3, 8), (1, 2)):
        where = stage(64, rows, size)
        planned = batches_of(Mesh(pipeline, data, 1, 1, data, parts if pipeline > 1 else 1), where)
        samples, most = filled(samples_a_replica(rows, data), size, pipeline)
        assert (planned.samples, planned.micro_batch, planned.count) == (samples, min(most, samples), -(-samples // most))


@pytest.mark.parametrize(("kept", "ranks"), [(False, 2), (2, 4)])
def test_blocks_that_stay_gathered_after_their_forward_are_planned(kept: bool | int, ranks: int, world: MakeWorld) -> None:
    """At the most: they are dropped one by one in backward, whose peak may come when most of them are gone."""
    layout, config = Parallel(reshard_after_forward=kept), MODELS["bfloat16"]
    where = stage(192, 2 * ranks, 2, activation_checkpointing="block")
    planned = memory(config, VOCABULARY, where, ranks, True, layout)
    dropped = memory(config, VOCABULARY, where, ranks, True, Parallel())
    measured = peak_of_a_step(config, VOCABULARY, world(ranks, layout), where)
    assert measured <= planned.peak_bytes - planned.staging_bytes <= 1.08 * measured
    # Two blocks besides the two that are gathered at any time, or half of all four.
    assert planned.gathered_bytes - dropped.gathered_bytes == 2 * 2 * block_parameters(config)


@pytest.mark.parametrize(
    ("name", "parallel", "ranks", "rank", "changes"),
    [
        ("llama", {"pipeline": 2}, 2, 0, {}),
        ("bfloat16", {"pipeline": 2}, 4, 2, {}),
        ("llama", {"pipeline": 4}, 4, 1, {}),
        ("bfloat16", {"pipeline": 4}, 4, 3, {"activation_checkpointing": "block"}),
        ("bfloat16", {"pipeline": 2, "tensor": 2}, 4, 0, {}),
        ("llama", {"pipeline": 2, "schedule": "interleaved"}, 2, 0, {}),
        ("bfloat16", {"pipeline": 2, "schedule": "interleaved"}, 2, 1, {}),
    ],
)
def test_the_peak_of_a_rank_of_a_pipeline_is_that_of_a_real_step(
    name: str, parallel: dict[str, Any], ranks: int, rank: int, changes: dict[str, Any], world: MakeWorld
) -> None:
    """Eight micro-batches, some waiting for their backward; gradients accumulate."""
    layout, config = msgspec.convert(parallel, Parallel), MODELS[name]
    where = stage(96, 8 * 2 * ranks // layout.model_ranks, 2, **changes)
    mesh = mesh_of(layout, 1, ranks)
    setting = Setting(config, VOCABULARY, where, mesh, batches_of(mesh, where), "none", True)
    planned = rank_memory(setting, rank // (ranks // layout.pipeline))
    measured = peak_of_a_step(config, VOCABULARY, world(ranks, layout, rank), where)
    assert planned.peak_bytes - planned.staging_bytes == pytest.approx(measured, rel=0.08)


LONG = """
import gc, torch, torch.distributed as dist
from midwatch.recipe import Model, Parallel
from trainer.batches import filled, samples_a_replica
from trainer_meter import SETTINGS, rows, stage
from trainer.model.sharded_model import ShardedModel
from objectives_by_name import OBJECTIVES
from trainer.optimizer import Optimizer
from trainer.distributed.mesh import lay_out

torch.set_num_threads(1)
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
world = lay_out(torch.device("cpu"), Parallel())

def resident(name):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))

def train(context):
    model = ShardedModel(Model(num_layers=4, hidden_size=96, num_heads=2), 8000, world)
    model.initialise(0)
    optimizer = Optimizer(model.parameters(), world.device)
    memory = {"activation_checkpointing": "block", "mlp_chunk_tokens": 256, "loss_chunk_tokens": 256}
    model.configure_stage(stage(context, 1, 1, **memory), context)
    batch = rows(1, context)
    model.backward([batch], lambda number, policy: OBJECTIVES["pretrain"].loss(policy, batch, SETTINGS, None)[0])
    optimizer.update(SETTINGS, 1e-3, 1e-8, optimizer.squared_norm().sqrt())

train(512)
for context in (1024, 2048, 4096):
    gc.collect()
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the most so far is what there is now
    train(context)
    print(resident("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_a_process_takes_grows_with_the_context_as_planned() -> None:
    """Checkpointed blocks, tiled MLP and loss: logits of 4096 tokens would be 131 MB, and are never there."""
    here = Path(__file__).parent
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": f"{here.parents[1]}:{here}"}
    done = subprocess.run([sys.executable, "-c", LONG], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    config, planned = Model(num_layers=4, hidden_size=96, num_heads=2), []
    for context in (1024, 2048, 4096):
        where = stage(context, 1, 1, activation_checkpointing="block", mlp_chunk_tokens=256, loss_chunk_tokens=256)
        held = memory(config, 8000, where, 1, True)
        planned.append(held.peak_bytes - held.staging_bytes)
    measured = [int(line) for line in done.stdout.split()]
    assert measured[2] < 4 * 4096 * 8000
    assert planned == pytest.approx(measured, rel=0.1)
