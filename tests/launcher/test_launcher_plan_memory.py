"""Memory of a model that is laid over ranks, against arithmetic by hand: Llama's 70B with rows of 8,192 tokens and more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from launcher.plan import Assumptions, PlanError, plan_recipe
from launcher.plan.activations import MicrobatchShape, block, ends, exchanges_heads
from launcher.plan.memory import Memory, Setting, memory, part_bytes, rank_memory, rank_parameters
from launcher.plan.mesh import batches_of, mesh_of, share_of, waiting_forwards
from midwatch.recipe import Model, Parallel, Recipe, Stage, parse_recipe

LLAMA = Model(
    num_layers=80, hidden_size=8192, num_heads=64, num_kv_heads=8, intermediate_size=28672, tie_embeddings=False, dtype="bfloat16"
)
VOCABULARY = 128_256
MATRICES = 8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672  # of a block: qkv, out, and the MLP's three
TABLE = VOCABULARY * 8192


def stage(**changes: Any) -> Stage:
    raw = {"name": "s", "objective": "pretrain", "steps": 1, "mixture": {"a": 1.0}, "context": 8192, "global_batch": 64}
    return msgspec.convert(raw | {"micro_batch": 1} | changes, Stage)


def setting(parallel: Parallel, where: Stage, ranks: int, model: Model = LLAMA, on_cpu: bool = False) -> Setting:
    mesh = mesh_of(parallel, where.context_parallel, ranks)
    return Setting(model, VOCABULARY, where, mesh, batches_of(mesh, where), parallel.offload, on_cpu)


def held(parallel: Parallel, where: Stage, ranks: int = 64, on_cpu: bool = False) -> Memory:
    return memory(LLAMA, VOCABULARY, where, ranks, on_cpu, parallel)


# Parameters


def test_70b_has_the_published_parameters() -> None:
    assert LLAMA.parameters(VOCABULARY) == 80 * (MATRICES + 2 * 8192) + 2 * TABLE + 8192 == 70_553_706_496


def test_a_rank_of_a_pipeline_has_its_layers_and_the_ends_their_tables() -> None:
    """Of 64 ranks: 4 in the pipeline, 8 to split a block, 2 to share the state."""
    here = setting(Parallel(tensor=8, pipeline=4), stage(), 64)
    layers = 20 * (MATRICES // 8 + 2 * 8192)
    first, second, _, last = (rank_memory(here, rank) for rank in range(4))
    assert first.weights_bytes == 4 * (layers // 2 + TABLE // 16)
    assert second.weights_bytes == 4 * layers // 2
    assert last.weights_bytes == 4 * (layers // 2 + (TABLE + 8192) // 16)
    assert first.optimizer_bytes == 2 * first.weights_bytes
    assert first.gradients_bytes == 4 * (layers + TABLE), "while micro-batches accumulate, all that the rank has a part of"
    assert first.gathered_bytes == 2 * (TABLE + 2 * (MATRICES // 8 + 2 * 8192))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tensor", "pipeline", "virtual"), [(1, 1, 1), (8, 1, 1), (1, 4, 1), (2, 8, 2), (8, 8, 5)])
def test_the_parts_of_all_ranks_are_the_whole(tensor: int, pipeline: int, virtual: int, tied: bool) -> None:
    """Once, but for norms, which each tensor-parallel rank has, and a tied table, which both ends of a pipeline have."""
    model = msgspec.structs.replace(LLAMA, tie_embeddings=tied)
    schedule = {"schedule": "interleaved", "virtual_stages": virtual} if virtual > 1 else {}
    here = setting(msgspec.convert({"tensor": tensor, "pipeline": pipeline} | schedule, Parallel), stage(), 64, model)
    shares = [share_of(here.mesh, model, rank) for rank in range(pipeline)]
    assert sum(sum(share.layers) for share in shares) == 80
    found = 0
    for share in shares:
        parameters = rank_parameters(here, share)
        found += sum(share.layers) * (parameters.block - 2 * 8192) * tensor + sum(share.layers) * 2 * 8192 + parameters.root
    twice = TABLE if tied and pipeline > 1 else 0
    assert found == model.parameters(VOCABULARY) + twice
    held = sum(rank_memory(here, rank).weights_bytes * 64 // pipeline for rank in range(pipeline))
    assert held == 4 * (found + 80 * 2 * 8192 * (tensor - 1))


def test_biases_that_follow_a_sum_over_ranks_are_on_each_of_them() -> None:
    model = Model(num_layers=1, hidden_size=64, num_heads=4, intermediate_size=128, mlp="gelu", norm="layernorm", bias=True)
    here = setting(Parallel(tensor=4), stage(global_batch=1), 4, model)
    split = 4 * 64 * 64 + 3 * 64 + 2 * 64 * 128 + 128
    assert rank_parameters(here, share_of(here.mesh, model, 0)).block == split // 4 + 64 + 64 + 2 * 2 * 64


@pytest.mark.parametrize(
    ("layers", "parts", "of_ranks"),
    [(80, 1, [(20,)] * 4), (10, 1, [(3,), (3,), (2,), (2,)]), (10, 2, [(2, 1), (2, 1), (1, 1), (1, 1)])],
)
def test_layers_are_spread_evenly_and_in_order(layers: int, parts: int, of_ranks: list[tuple[int, ...]]) -> None:
    mesh = mesh_of(Parallel(pipeline=4, schedule="interleaved" if parts > 1 else "1f1b", virtual_stages=parts), 1, 4)
    model = msgspec.structs.replace(LLAMA, num_layers=layers)
    assert [share_of(mesh, model, rank).layers for rank in range(4)] == of_ranks


def test_hybrid_sharding_holds_as_much_as_that_many_ranks_would() -> None:
    where = stage(global_batch=64)
    part, few = held(Parallel(hsdp_shard_size=8), where), held(Parallel(), msgspec.structs.replace(where, global_batch=8), 8)
    assert part.weights_bytes == few.weights_bytes == 4 * LLAMA.parameters(VOCABULARY) // 8
    assert part.peak_bytes == few.peak_bytes


def test_ranks_that_cannot_be_laid_out_are_refused_with_those_that_can() -> None:
    with pytest.raises(
        PlanError, match=r"60 GPUs are not a multiple of 32, for pipeline 2 x tensor 8 x context 2 \(use --gpus 32 or 64\)"
    ):
        mesh_of(Parallel(tensor=8, pipeline=2), 2, 60)


# Activations

NORM = 2 * 8192 + 4  # its input, and a number a token; the output is its linear layer's input
HEADS = 2 * ((8192 + 2 * 1024) + (8192 + 1024) + 8192) + 4 * 64  # projected, rotated, mixed, log-sum-exp
ANGLES = 2 * 2 * 128  # once for all blocks
MLP = 4 * 2 * 28672


def test_a_block_keeps_what_can_be_counted_by_hand() -> None:
    whole = block(LLAMA, MicrobatchShape(1, 8192), "fused")
    assert whole.kept_bytes == 8192 * (2 * (NORM + 2 * 8192) + HEADS + MLP)
    assert whole.again_bytes == whole.host_bytes == 0


def test_tensor_parallel_ranks_split_tokens_between_blocks_and_heads_within() -> None:
    split = block(LLAMA, MicrobatchShape(1, 8192, tensor=8), "fused")
    assert split.kept_bytes == 1024 * 2 * NORM + 8192 * (2 * 2 * 8192 + HEADS // 8 + MLP // 8)


def test_context_parallel_ranks_have_their_part_of_the_tokens() -> None:
    """Ranks of 8 key heads swap tokens for heads among 8, and then keep the mix of values twice; among 16 keys go round."""
    assert exchanges_heads(LLAMA, 1, 8) and not exchanges_heads(LLAMA, 1, 16) and not exchanges_heads(LLAMA, 8, 2)
    swapped = block(LLAMA, MicrobatchShape(1, 8192, context_parallel=8), "fused")
    heads = 2 * ((8192 + 2 * 1024) + 2 * 8192) + 4 * 64
    assert swapped.kept_bytes == 1024 * (2 * (NORM + 2 * 8192) + heads + MLP)
    ring = block(LLAMA, MicrobatchShape(1, 8192, context_parallel=16), "fused")
    assert ring.kept_bytes == 512 * (2 * (NORM + 2 * 8192) + HEADS + MLP)


def test_checkpointed_blocks_keep_their_inputs_and_one_at_a_time_is_whole() -> None:
    piece = MicrobatchShape(1, 8192, tensor=2, context_parallel=4)
    plain, checkpointed = (block(LLAMA, piece, "fused", kind) for kind in ("none", "block"))
    assert checkpointed.kept_bytes == 8192 // 8 * 8192 * 2
    assert checkpointed.again_bytes == plain.kept_bytes - checkpointed.kept_bytes, "its input is what the first norm keeps"
    exact = msgspec.structs.replace(LLAMA, dtype="float32")
    plain, checkpointed = (block(exact, piece, "fused", kind) for kind in ("none", "block"))
    assert checkpointed.again_bytes == plain.kept_bytes - checkpointed.kept_bytes


def test_selective_checkpointing_keeps_the_outputs_of_products_and_of_attention() -> None:
    kept = block(LLAMA, MicrobatchShape(1, 8192), "fused", "selective")
    products = 2 * (10240 + 8192 + 8192 + 2 * 28672) + 4 * 64  # qkv, attention, out, gate and up; nothing looks at down's
    assert kept.kept_bytes == 8192 * (2 * 8192 + products)
    assert kept.again_bytes == 8192 * (2 * (NORM + 2 * 8192) + 2 * (8192 + 1024) + 2 * 2 * 28672)
    assert kept.kept_bytes < block(LLAMA, MicrobatchShape(1, 8192), "fused").kept_bytes


def test_a_tiled_mlp_keeps_its_input_and_computes_a_tile_again() -> None:
    plain, tiled = (block(LLAMA, MicrobatchShape(1, 8192, tensor=8), "fused", "none", tile) for tile in (None, 1024))
    assert plain.kept_bytes - tiled.kept_bytes == 8192 * MLP // 8
    assert tiled.again_bytes == 1024 * MLP // 8
    again = block(LLAMA, MicrobatchShape(1, 8192, tensor=8), "fused", "block", 1024).again_bytes
    assert again == plain.kept_bytes - (8192 - 1024) * MLP // 8 - 1024 * 2 * 8192, "but for its input"


def test_selective_checkpointing_keeps_sums_over_ranks_instead_of_what_is_summed() -> None:
    kept = block(LLAMA, MicrobatchShape(1, 8192, tensor=8), "fused", "selective")
    assert kept.kept_bytes == 1024 * 2 * (8192 + 8192) + 8192 * (2 * (10240 + 8192 + 2 * 28672) + 4 * 64) // 8
    tiled = block(LLAMA, MicrobatchShape(1, 8192, tensor=8), "fused", "selective", 1024)
    assert kept.kept_bytes - tiled.kept_bytes == 8192 * 2 * 2 * 28672 // 8


def test_inputs_that_are_offloaded_are_the_hosts_but_for_the_block_that_computes() -> None:
    kinds = ("block", "offloaded")
    checkpointed, offloaded = (held(Parallel(), stage(context=131_072, activation_checkpointing=kind)) for kind in kinds)
    inputs = 80 * 131_072 * 8192 * 2
    assert offloaded.activations_bytes == checkpointed.activations_bytes
    assert (checkpointed.host_bytes, offloaded.host_bytes) == (0, inputs)
    assert checkpointed.peak_bytes - offloaded.peak_bytes == pytest.approx(inputs, rel=0.06)
    cpu = [held(Parallel(), stage(activation_checkpointing=kind), on_cpu=True) for kind in kinds]
    assert cpu[0] == cpu[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_with_checkpointed_blocks_what_is_kept_grows_with_the_context_and_no_faster(dtype: str) -> None:
    model = msgspec.structs.replace(LLAMA, dtype=dtype)
    found = []
    for context in (8192, 65_536):
        here = setting(Parallel(), stage(context=context, activation_checkpointing="block"), 64, model)
        found.append(part_bytes(here, share_of(here.mesh, model, 0), 0))
    assert found[1] == 8 * found[0]


def test_logits_are_there_a_tile_at_a_time() -> None:
    assert held(Parallel(), stage()).logits_bytes == 2 * 4 * 4096 * VOCABULARY
    assert held(Parallel(), stage(loss_chunk_tokens=512)).logits_bytes == 2 * 4 * 512 * VOCABULARY
    assert held(Parallel(tensor=8), stage(loss_chunk_tokens=4096, global_batch=8)).logits_bytes == 2 * 4 * 1024 * VOCABULARY


# Pipelines


def test_the_first_ranks_of_a_pipeline_hold_the_most_micro_batches() -> None:
    here = setting(Parallel(pipeline=4, tensor=8), stage(), 64)
    ranks = [rank_memory(here, rank) for rank in range(4)]
    assert [rank.waiting_forwards for rank in ranks] == [4, 3, 2, 1]
    assert all(rank.activations_bytes == rank.waiting_forwards * rank.micro_batch_bytes for rank in ranks)
    piece = MicrobatchShape(1, 8192, tensor=8)
    blocks, sent = 20 * block(LLAMA, piece, "fused").kept_bytes, 1024 * 8192 * 2
    assert ranks[0].micro_batch_bytes == blocks + sent + 8192 * (8 + ANGLES)
    assert ranks[1].micro_batch_bytes == blocks + sent + 8192 * (8 + ANGLES), "what it sent; its first norm keeps what it got"
    assert ranks[3].micro_batch_bytes == blocks + ends(LLAMA, piece, first=False, last=True)
    assert memory(LLAMA, VOCABULARY, stage(), 64, False, Parallel(pipeline=4, tensor=8)) == ranks[0]


def test_interleaved_parts_hold_more_of_them_for_less_idling() -> None:
    """On the first of 4 ranks with 2 parts each, 11 forwards wait: 4 of part 0, 4 of part 1, 3 of part 0."""
    parallel = Parallel(pipeline=4, tensor=8, schedule="interleaved", virtual_stages=2)
    here = setting(parallel, stage(), 64)
    share = share_of(here.mesh, LLAMA, 0)
    parts = [part_bytes(here, share, part) for part in range(2)]
    first = rank_memory(here, 0)
    assert first.waiting_forwards == 11
    assert first.activations_bytes == 7 * parts[0] + 4 * parts[1]
    assert [waiting_forwards(here.mesh, rank, 8) for rank in range(4)] == [11, 9, 7, 5]
    assert first.activations_bytes > rank_memory(setting(Parallel(pipeline=4, tensor=8), stage(), 64), 0).activations_bytes


def test_no_more_forwards_wait_than_there_are_micro_batches() -> None:
    mesh = mesh_of(Parallel(pipeline=8), 1, 64)
    assert [waiting_forwards(mesh, rank, 3) for rank in (0, 5, 6, 7)] == [3, 3, 2, 1]
    interleaved = mesh_of(Parallel(pipeline=4, schedule="interleaved", virtual_stages=3), 1, 4)
    assert waiting_forwards(interleaved, 0, 4) == 12
    assert batches_of(interleaved, stage(global_batch=6)).count == 8, "a multiple of the pipeline's ranks"


# All of it


@pytest.mark.parametrize(
    ("parallel", "changes"),
    [
        ({"tensor": 8}, {}),
        ({"pipeline": 4}, {}),
        ({}, {"context_parallel": 8}),
        ({}, {"context_parallel": 16}),
        ({}, {"activation_checkpointing": "selective"}),
        ({}, {"activation_checkpointing": "block"}),
        ({}, {"activation_checkpointing": "offloaded"}),
        ({}, {"mlp_chunk_tokens": 4096}),
        ({}, {"loss_chunk_tokens": 1024, "activation_checkpointing": "offloaded"}),
        ({"offload": "optimizer"}, {}),
        ({"offload": "parameters"}, {}),
    ],
)
def test_each_kind_of_parallelism_and_of_saving_lowers_the_peak(parallel: dict[str, Any], changes: dict[str, Any]) -> None:
    base = {"context": 131_072, "global_batch": 256}
    kind = {"activation_checkpointing": "block"} if {"pipeline", "offload"} & set(parallel) else {}
    before = held(Parallel(), stage(**base, **kind)).peak_bytes
    after = held(msgspec.convert(parallel, Parallel), stage(**base, **kind, **changes)).peak_bytes
    assert after < 0.99 * before


def test_what_is_offloaded_leaves_the_gpu_and_nothing_changes_on_a_cpu() -> None:
    none, moments, all_of_it = (
        held(Parallel(offload=kind), stage(global_batch=64)) for kind in ("none", "optimizer", "parameters")
    )
    assert none.peak_bytes - moments.peak_bytes == moments.host_bytes == none.optimizer_bytes
    assert all_of_it.host_bytes == 4 * none.weights_bytes
    assert moments.peak_bytes - all_of_it.peak_bytes >= none.weights_bytes
    kinds = ("none", "optimizer", "parameters")
    assert len({msgspec.json.encode(held(Parallel(offload=kind), stage(), on_cpu=True)) for kind in kinds}) == 1


TEXT = """
[run]
name = "long"
[model]
num_layers = 80
hidden_size = 8192
num_heads = 64
num_kv_heads = 8
intermediate_size = 28672
tie_embeddings = false
dtype = "bfloat16"
[parallel]
pipeline = 4
tensor = 4
[tokenizer]
vocab = 100000
[[data.source]]
name = "text"
kind = "text"
origin = "stdlib-topics"
[cluster]
backend = "external"
nodes = "7:9"
ranks_per_node = 8
[[stage]]
name = "pretrain"
objective = "pretrain"
steps = 10000
context = 8192
global_batch = 512
micro_batch = 1
mixture = { text = 1.0 }
[[stage]]
name = "extend"
objective = "pretrain"
steps = 100
context = 131072
context_parallel = 2
global_batch = 60
micro_batch = 1
mixture = { text = 1.0 }
"""


def recipe(**changes: Any) -> Recipe:
    found = parse_recipe(TEXT)
    return msgspec.structs.replace(found, stage=tuple(msgspec.structs.replace(each, **changes) for each in found.stage))


def test_a_recipes_own_mesh_is_planned_on_as_many_nodes_as_it_can_use() -> None:
    plan = plan_recipe(recipe(), Assumptions())
    assert plan.gpus == 64, "of 9 nodes of 8 ranks, the most that make a multiple of 4 x 4 x 2"
    first, extend = plan.stages
    assert (first.mesh.pipeline, first.mesh.data, first.mesh.tensor, first.mesh.replicas) == (4, 4, 4, 4)
    assert (extend.mesh.context, extend.mesh.replicas) == (2, 2)
    assert first.bubble is not None and first.bubble.micro_batches == 128
    assert extend.bubble is not None and extend.bubble.share_of_step == pytest.approx(3 / 33)
    assert plan_recipe(recipe(), Assumptions(pipeline=2)).stages[0].mesh.data == 8


def test_settings_that_are_named_as_a_way_out_are_one() -> None:
    said = [note for note in plan_recipe(recipe(), Assumptions()).notes if "does not fit" in note]
    assert said == [
        'pretrain: it does not fit (use activation_checkpointing = "selective")',
        'extend: it does not fit (use activation_checkpointing = "block")',
    ]
    assert not any("does not fit" in note for note in plan_recipe(recipe(activation_checkpointing="block"), Assumptions()).notes)


def test_what_a_mesh_costs_is_said() -> None:
    notes = plan_recipe(recipe(global_batch=16), Assumptions(pipeline=8)).notes
    assert any(note.startswith('extend: the pipeline idles 30 % of a step (use schedule = "interleaved", a sm') for note in notes)
    ring = recipe(context_parallel=4)
    assert any("keys and values go round in a ring (up to 2 ranks" in note for note in plan_recipe(ring, Assumptions()).notes)
    wide = msgspec.structs.replace(recipe(), cluster=msgspec.structs.replace(recipe().cluster, ranks_per_node=2, nodes=32))
    assert any("tensor parallelism reaches over nodes of 2" in note for note in plan_recipe(wide, Assumptions()).notes)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_mesh_and_the_worst_rank_are_shown_in_tables_that_fit(tmp_path: Path, columns: int) -> None:
    (tmp_path / "r.toml").write_text(TEXT.replace("tensor = 4", 'tensor = 4\noffload = "optimizer"\nschedule = "interleaved"'))
    command = [sys.executable, "-P", "-m", "midwatch", "plan", "r.toml"]
    environment = os.environ | {"COLUMNS": str(columns), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert '64 GPUs = pipeline 4 x data 4 x tensor 4, context 2 in stage "extend"' in lines
    assert any(line.startswith("pretrain: the worst is pipeline rank 0; up to 11 forwards of a part wait there") for line in lines)
    table = lines[lines.index(next(line for line in lines if line.startswith("MEMORY A GPU"))) + 1 :]
    rows = table[: next(i for i, line in enumerate(table) if line.startswith("fused attention"))]
    assert max(map(len, rows)) <= columns
    for part in ("activations", "gathered parameters", "peak", "host: offloaded of these"):
        assert any(line.startswith(part) for line in rows), part
