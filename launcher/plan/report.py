"""Works out the plan of a whole recipe."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import msgspec

from launcher.plan import flops
from launcher.plan.accelerators import DEFAULT, Accelerator, find_accelerator
from launcher.plan.activations import (
    MicrobatchShape,
    alibi_costs,
    attention_kernel,
    block,
    ends,
    exchanges_heads,
    needs_flash_attention,
)
from launcher.plan.budget import FLOPS_A_PARAMETER_AND_TOKEN, TOKENS_A_PARAMETER, best_size, verdict
from launcher.plan.fit_suggestions import Case, ways_out
from launcher.plan.memory import Setting, worst_rank
from launcher.plan.mesh import batches_of, mesh_of
from launcher.plan.pipeline import bubble
from launcher.plan.plan import Assumptions, Factors, ParameterCounts, Plan, StagePlan, Tokens
from launcher.plan.units import PlanError
from midwatch.recipe import Cluster, Model, Parallel, Recipe, Stage
from midwatch.recipe.generate import Generate

IDLE = 0.2
"""Part of a step for which a pipeline may idle before a note says so."""


class _Machine(NamedTuple):
    gpu: Accelerator
    ranks: int
    cores: int
    """Of a rank; 1 on a GPU."""
    flops_per_second: float
    """Of all ranks, as far as they are used."""

    @property
    def is_cpu(self) -> bool:
        return self.gpu.memory_gb is None


def plan_recipe(recipe: Recipe, assumed: Assumptions) -> Plan:
    """Raises PlanError for what cannot be assumed of this recipe."""
    model, vocabulary, notes = recipe.model, *_vocabulary(recipe)
    gpus = assumed.gpus if assumed.gpus is not None else recipe.most_nodes * recipe.cluster.ranks_per_node
    parallel = _parallel(recipe, assumed)
    name = assumed.gpu or ("cpu" if recipe.cluster.device == "cpu" else DEFAULT)
    gpu = find_accelerator(name, assumed.usd_per_hour)
    cores = recipe.cluster.threads if gpu.memory_gb is None else 1
    precision = assumed.precision or model.dtype
    peak = gpu.flops_per_second(precision) * cores
    machine = _Machine(gpu, gpus, cores, peak * assumed.mfu * gpus)
    stages: list[StagePlan] = []
    reference: float | None = None
    for stage in recipe.stage:
        planned = _stage(model, vocabulary, stage, machine, parallel, assumed.micro_batches, recipe.generate)
        if reference is None and stage.objective == "pretrain":
            reference = planned.gpu_hours
        ratio = None if reference is None else planned.gpu_hours / reference
        stages.append(msgspec.structs.replace(planned, cost_to_pretraining=ratio))
    planned_stages = list(zip(recipe.stage, stages, strict=True))
    notes += _notes(model, vocabulary, parallel, recipe.cluster, planned_stages)
    return Plan(
        run=recipe.run.name,
        vocabulary=vocabulary,
        gpu=gpu,
        gpu_assumed=assumed.gpu is None,
        gpus=gpus,
        precision=precision,
        peak_flops_per_second_per_gpu=peak,
        mfu=assumed.mfu,
        parameters=_parameters(model, vocabulary),
        kv_cache_bytes_per_token=flops.kv_cache_bytes_per_token(model),
        stages=tuple(stages),
        factors=tuple(_factors(model, vocabulary, machine.is_cpu, *pair) for pair in itertools.pairwise(recipe.stage)),
        tokens=_tokens(model.parameters(vocabulary), stages),
        seconds=sum(s.seconds for s in stages),
        gpu_hours=sum(s.gpu_hours for s in stages),
        cost_usd=sum(s.cost_usd for s in stages),
        notes=tuple(notes),
    )


def _parallel(recipe: Recipe, assumed: Assumptions) -> Parallel:
    """The recipe's, with a pipeline that is assumed instead. Raises PlanError."""
    parallel = recipe.parallel
    if assumed.pipeline is None and parallel.pipeline == 1 and (assumed.virtual is not None or assumed.micro_batches is not None):
        raise PlanError(f"--{'virtual' if assumed.virtual is not None else 'micro-batches'} needs --pipeline")
    if assumed.pipeline is not None:
        parallel = msgspec.structs.replace(parallel, pipeline=assumed.pipeline, schedule="1f1b")
    if assumed.virtual is not None:
        schedule: Literal["1f1b", "interleaved"] = "interleaved" if assumed.virtual > 1 else "1f1b"
        parallel = msgspec.structs.replace(parallel, schedule=schedule, virtual_stages=assumed.virtual)
    for key, message in parallel.problems(recipe.model):
        raise PlanError(f"--{key}: {message}")
    return parallel


def _vocabulary(recipe: Recipe) -> tuple[int, list[str]]:
    """Rows of the embedding, as the trainer makes it; and a note where the tokenizer's ids have to be assumed."""
    ids, notes = recipe.tokenizer.vocab, []
    if recipe.tokenizer.path is not None and not Path(recipe.tokenizer.path).is_file():
        notes.append(f"{recipe.tokenizer.path} is not here: a tokenizer of {ids:,} ids is assumed")
    elif recipe.tokenizer.path is not None:
        from shards.common.errors import ShardError
        from shards.tokenization.templates import read
        from shards.tokenization.tokenizer import Tokenizer, read_model

        path = Path(recipe.tokenizer.path)
        try:
            ids = Tokenizer(read_model(path), str(path), read(recipe.tokenizer)).vocab
        except ShardError as error:
            raise PlanError(f"[tokenizer] path: {error}") from None
    return max(ids, recipe.model.vocabulary or 0), notes


def _parameters(model: Model, vocabulary: int) -> ParameterCounts:
    total, blocks = model.parameters(vocabulary), model.num_layers * flops.block_parameters(model)
    return ParameterCounts(total, blocks, total - blocks, flops.matrix_parameters(model, vocabulary))


def _stage(
    model: Model,
    vocabulary: int,
    stage: Stage,
    machine: _Machine,
    parallel: Parallel,
    micro_batches: int | None,
    generate: Generate,
) -> StagePlan:
    rows = flops.rows_of_a_sample(stage)
    tokens = stage.global_batch * rows * stage.context
    per_token = flops.flops_per_token(model, vocabulary, stage.context)
    mesh = mesh_of(parallel, stage.context_parallel, machine.ranks)
    batches = batches_of(mesh, stage, micro_batches)
    per_step = per_token * flops.passes(stage) * batches.samples * mesh.replicas * rows * stage.context
    idle = bubble(mesh.pipeline, batches.count, mesh.parts) if mesh.pipeline > 1 else None
    seconds = per_step / machine.flops_per_second / (1 - idle.share_of_step if idle else 1)
    neighbours = parallel.neighbours
    held = worst_rank(Setting(model, vocabulary, stage, mesh, batches, parallel.offload, machine.is_cpu, generate, neighbours))
    hours = seconds * stage.steps / 3600 * machine.ranks
    room = machine.gpu.memory_gb
    return StagePlan(
        name=stage.name,
        objective=stage.objective,
        context_tokens=stage.context,
        steps=stage.steps,
        tokens_per_step=tokens,
        tokens=tokens * stage.steps,
        flops_per_token=per_token,
        attention_share=flops.attention_flops_per_token(model, stage.context) / per_token,
        flops_per_step=per_step,
        flops=per_step * stage.steps,
        kv_cache_bytes_per_sequence=flops.kv_cache_bytes_per_token(model) * stage.context,
        mesh=mesh,
        memory_per_gpu=held,
        room_bytes=None if room is None else round(room * 1e9),
        fits=None if room is None else held.peak_bytes <= room * 1e9,
        bubble=idle,
        step_seconds=seconds,
        tokens_per_second=tokens / seconds,
        seconds=seconds * stage.steps,
        gpu_hours=hours,
        cost_usd=hours * machine.gpu.usd_per_hour * machine.cores,
        cost_to_pretraining=None,
    )


def _factors(model: Model, vocabulary: int, on_cpu: bool, before: Stage, after: Stage) -> Factors:
    length = after.context / before.context
    attention = [flops.attention_flops_per_token(model, stage.context) for stage in (before, after)]
    every = [flops.flops_per_token(model, vocabulary, stage.context) for stage in (before, after)]
    kept = [_kept(model, stage, on_cpu) for stage in (before, after)]
    return Factors(
        before=before.name,
        after=after.name,
        length=length,
        kv_cache_per_sequence=length,
        activations_per_sequence=kept[1] / kept[0],
        attention_flops_per_sequence=attention[1] / attention[0] * length,
        attention_flops_per_token=attention[1] / attention[0],
        flops_per_token=every[1] / every[0],
    )


def _kept(model: Model, stage: Stage, on_cpu: bool) -> int:
    """Activations of one row, in bytes, over all the ranks that have a part of it."""
    piece, kernel = MicrobatchShape(1, stage.context), attention_kernel(model, stage, on_cpu)
    blocks = model.num_layers * block(model, piece, kernel, stage.activation_checkpointing, stage.mlp_chunk_tokens).kept_bytes
    return blocks + ends(model, piece, first=True, last=True) + alibi_costs(model, stage, piece, kernel)


def _tokens(parameters: int, stages: list[StagePlan]) -> Tokens | None:
    seen = sum(stage.tokens for stage in stages if stage.objective == "pretrain")
    if not seen:
        return None
    best = best_size(FLOPS_A_PARAMETER_AND_TOKEN * parameters * seen)
    return Tokens(seen, seen / parameters, verdict(seen / parameters), TOKENS_A_PARAMETER * parameters, *best)


def _notes(
    model: Model, vocabulary: int, parallel: Parallel, cluster: Cluster, stages: Sequence[tuple[Stage, StagePlan]]
) -> list[str]:
    """What costs more than it needs to, and the way out; once however many stages it holds for."""
    found: dict[str, list[str]] = {}
    for stage, planned in stages:
        for text in (*_batch_notes(stage, planned), *_attention_notes(model, stage, planned), *_pipeline_notes(model, planned)):
            found.setdefault(text, []).append(stage.name)
        if planned.mesh.tensor > cluster.ranks_per_node and planned.fits is not None:
            text = f"tensor parallelism reaches over nodes of {cluster.ranks_per_node}, and each block waits for their network"
            found.setdefault(f"{text} (use tensor = {cluster.ranks_per_node}, and pipeline)", []).append(stage.name)
        if planned.fits is False:
            assert planned.room_bytes is not None
            most = max(cluster.ranks_per_node, 8)
            ways = ways_out(Case(model, stage, parallel, planned.mesh.ranks), vocabulary, planned.room_bytes, most)
            found.setdefault(f"it does not fit (use {', '.join(ways)})", []).append(stage.name)
    return [f"{', '.join(names)}: {text}" for text, names in found.items()]


def _batch_notes(stage: Stage, planned: StagePlan) -> Iterator[str]:
    mesh, batches = planned.mesh, batches_of(planned.mesh, stage)
    filled = batches.samples * mesh.replicas
    if filled != stage.global_batch:
        every = filled // batches.count * (mesh.pipeline if mesh.parts > 1 else 1) if mesh.pipeline > 1 else mesh.replicas
        text = f"{stage.global_batch} samples are filled up to {filled}, the same for each rank"
        yield f"{text} (use a global_batch that is a multiple of {every})"
    if planned.memory_per_gpu.gradients_whole and mesh.ranks > 1 and mesh.pipeline == 1:
        text = "micro-batches accumulate, and meanwhile every rank holds the whole gradient"
        part = text if mesh.tensor == 1 else f"{text} of its tensor-parallel part"
        yield f"{part} (a micro_batch of {batches.samples}, or more ranks, would avoid it)"


def _attention_notes(model: Model, stage: Stage, planned: StagePlan) -> Iterator[str]:
    mesh = planned.mesh
    if planned.memory_per_gpu.attention_kernel == "scores":
        text = "float32 with groups of heads has no fused attention on a GPU, and its scores are kept whole"
        yield f'{text} (use dtype = "bfloat16")'
    if needs_flash_attention(model, stage) and planned.fits is not None:
        text = (
            "the estimate for ALiBi assumes flash-attn"
            if model.position == "alibi"
            else "the estimate for masked documents assumes flash-attn"
        )
        yield f"{text} (install the extra `gpu`; without it attention keeps far more)"
    if mesh.context > 1 and not exchanges_heads(model, mesh.tensor, mesh.context):
        heads = math.gcd(model.num_heads // mesh.tensor, model.key_value_heads // mesh.tensor)
        text = f"context_parallel = {mesh.context} does not divide a rank's heads, so keys and values go round in a ring"
        yield f"{text} (up to {heads} ranks could swap tokens for heads)" if heads > 1 else text


def _pipeline_notes(model: Model, planned: StagePlan) -> Iterator[str]:
    idle = planned.bubble
    if idle is None or idle.share_of_step <= IDLE:
        return
    ways = ['schedule = "interleaved"'] if idle.virtual == 1 and model.num_layers >= 2 * idle.pipeline else []
    ways += ["a smaller micro_batch, a larger global_batch or fewer pipeline ranks"]
    yield f"the pipeline idles {idle.share_of_step:.0%} of a step (use {', '.join(ways)})".replace("%", " %")
