"""Works out the plan of a whole recipe."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from launcher.plan import flops
from launcher.plan.accelerators import DEFAULT, Accelerator, find_accelerator
from launcher.plan.activations import Kernel, alibi_costs, attention_kernel, needs_flash_attention, saved
from launcher.plan.budget import FLOPS_A_PARAMETER_AND_TOKEN, TOKENS_A_PARAMETER, best_size, verdict
from launcher.plan.figures import Assumptions, Factors, Parameters, Plan, StagePlan, Tokens
from launcher.plan.memory import memory
from launcher.plan.pipeline import Bubble, bubble
from launcher.plan.quantities import PlanError
from launcher.recipe import Model, Recipe, Stage


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
    gpus = assumed.gpus if assumed.gpus is not None else recipe.cluster.most_nodes * recipe.cluster.ranks_per_node
    name = assumed.gpu or ("cpu" if recipe.cluster.device == "cpu" else DEFAULT)
    gpu = find_accelerator(name, assumed.usd_per_hour)
    cores = recipe.cluster.threads if gpu.memory_gb is None else 1
    precision = assumed.precision or model.dtype
    peak = gpu.flops_per_second(precision) * cores
    if assumed.pipeline > 1 and (gpus % assumed.pipeline or model.layers % (assumed.pipeline * assumed.virtual)):
        raise PlanError(
            f"--pipeline {assumed.pipeline}, --virtual {assumed.virtual}: must divide {gpus} GPUs and {model.layers} layers evenly"
        )
    machine = _Machine(gpu, gpus, cores, peak * assumed.mfu * gpus)
    stages: list[StagePlan] = []
    reference: float | None = None
    for stage in recipe.stage:
        planned = _stage(model, vocabulary, stage, machine, assumed)
        if reference is None and stage.objective == "pretrain":
            reference = planned.gpu_hours
        ratio = None if reference is None else planned.gpu_hours / reference
        stages.append(msgspec.structs.replace(planned, cost_to_pretraining=ratio))
    notes += _notes(model, list(zip(recipe.stage, stages, strict=True)), gpus)
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


def _vocabulary(recipe: Recipe) -> tuple[int, list[str]]:
    """Rows of the embedding, as the trainer makes it; and a note where the tokenizer's ids have to be assumed."""
    ids, notes = recipe.tokenizer.vocab, []
    if recipe.tokenizer.path is not None and not Path(recipe.tokenizer.path).is_file():
        notes.append(f"{recipe.tokenizer.path} is not here: a tokenizer of {ids:,} ids is assumed")
    elif recipe.tokenizer.path is not None:
        from shards.errors import ShardError
        from shards.tokenizer import Tokenizer

        try:
            ids = Tokenizer.load(Path(recipe.tokenizer.path)).vocab
        except ShardError as error:
            raise PlanError(f"[tokenizer] path: {error}") from None
    return max(ids, recipe.model.vocabulary or 0), notes


def _parameters(model: Model, vocabulary: int) -> Parameters:
    total, blocks = model.parameters(vocabulary), model.layers * flops.block_parameters(model)
    return Parameters(total, blocks, total - blocks, flops.matrix_parameters(model, vocabulary))


def _stage(model: Model, vocabulary: int, stage: Stage, machine: _Machine, assumed: Assumptions) -> StagePlan:
    rows = flops.rows_of_a_sample(stage)
    tokens = stage.global_batch * rows * stage.context
    per_token = flops.flops_per_token(model, vocabulary, stage.context)
    replicas = machine.ranks // assumed.pipeline
    samples = -(-stage.global_batch // replicas)
    per_step = per_token * flops.passes(stage) * samples * replicas * rows * stage.context
    idle = _bubble(samples, stage, assumed)
    seconds = per_step / machine.flops_per_second / (1 - idle.share_of_step if idle else 1)
    held = memory(model, vocabulary, stage, machine.ranks, machine.is_cpu)
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
        memory_per_gpu=held,
        fits=None if room is None else held.peak_bytes <= room * 1e9,
        bubble=idle,
        step_seconds=seconds,
        tokens_per_second=tokens / seconds,
        seconds=seconds * stage.steps,
        gpu_hours=hours,
        cost_usd=hours * machine.gpu.usd_per_hour * machine.cores,
        cost_to_pretraining=None,
    )


def _bubble(samples: int, stage: Stage, assumed: Assumptions) -> Bubble | None:
    if assumed.pipeline == 1:
        return None
    return bubble(assumed.pipeline, assumed.micro_batches or -(-samples // stage.micro_batch), assumed.virtual)


def _factors(model: Model, vocabulary: int, on_cpu: bool, before: Stage, after: Stage) -> Factors:
    length = after.context / before.context
    attention = [flops.attention_flops_per_token(model, stage.context) for stage in (before, after)]
    every = [flops.flops_per_token(model, vocabulary, stage.context) for stage in (before, after)]
    kept = [_kept(model, stage, attention_kernel(model, stage, on_cpu)) for stage in (before, after)]
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


def _kept(model: Model, stage: Stage, kernel: Kernel) -> int:
    """Activations of one row, in bytes."""
    return stage.context * saved(model, stage.context, kernel) + alibi_costs(model, stage, 1, kernel)


def _tokens(parameters: int, stages: list[StagePlan]) -> Tokens | None:
    seen = sum(stage.tokens for stage in stages if stage.objective == "pretrain")
    if not seen:
        return None
    best = best_size(FLOPS_A_PARAMETER_AND_TOKEN * parameters * seen)
    return Tokens(seen, seen / parameters, verdict(seen / parameters), TOKENS_A_PARAMETER * parameters, *best)


def _notes(model: Model, stages: Sequence[tuple[Stage, StagePlan]], ranks: int) -> list[str]:
    """What costs more than it needs to, and the way out; once however many stages it holds for."""
    found: dict[str, list[str]] = {}
    for stage, planned in stages:
        held, samples = planned.memory_per_gpu, -(-stage.global_batch // ranks)
        if samples * ranks != stage.global_batch:
            text = f"{stage.global_batch} samples are filled up to {samples * ranks}, the same for each rank"
            found.setdefault(f"{text} (use a global_batch that is a multiple of {ranks})", []).append(stage.name)
        if held.gradients_whole and ranks > 1:
            text = "micro-batches accumulate, and meanwhile every rank holds the whole gradient"
            found.setdefault(f"{text} (a micro_batch of {samples}, or more ranks, would avoid it)", []).append(stage.name)
        if held.attention_kernel == "scores":
            text = "float32 with groups of heads has no fused attention on a GPU, and its scores are kept whole"
            found.setdefault(f'{text} (use dtype = "bfloat16")', []).append(stage.name)
        if needs_flash_attention(model, stage) and planned.fits is not None:
            text = "masked documents, or ALiBi, are reckoned with flash-attention"
            found.setdefault(f"{text} (install the extra `gpu`; without it attention keeps far more)", []).append(stage.name)
        if planned.fits is False:
            found.setdefault(f"it does not fit (use {_ways(model, stage, planned)})", []).append(stage.name)
    return [f"{', '.join(names)}: {text}" for text, names in found.items()]


def _ways(model: Model, stage: Stage, planned: StagePlan) -> str:
    """What would make a stage smaller on a GPU, as far as it helps here."""
    held = planned.memory_per_gpu
    state = held.weights_bytes + held.optimizer_bytes + held.gradients_bytes + held.reference_bytes
    ways = ["more GPUs"] if 5 * state > held.peak_bytes else []
    ways += ["a smaller micro_batch"] if stage.micro_batch > 1 else []
    ways += ["bfloat16"] if model.dtype == "float32" else []
    return ", ".join([*ways, "a shorter context" if 2 * held.activations_bytes > held.peak_bytes else "a smaller model"])
