"""The tables of `midwatch plan`: one a topic, at home in 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.plan import Plan, StagePlan, TrainingBudget
from launcher.plan.accelerators import Accelerator
from launcher.plan.memory import Memory
from launcher.plan.units import count, factor, flops, money, size, span

_PARTS: tuple[tuple[str, Callable[[Memory], int]], ...] = (
    ("weights, float32", lambda m: m.weights_bytes),
    ("gradients, float32", lambda m: m.gradients_bytes),
    ("optimizer, two moments", lambda m: m.optimizer_bytes),
    ("reference, reward model", lambda m: m.reference_bytes),
    ("value model", lambda m: m.critic_bytes),
    ("writing responses", lambda m: m.engine_bytes),
    ("gathered parameters", lambda m: m.gathered_bytes),
    ("activations", lambda m: m.activations_bytes),
    ("a recomputed block", lambda m: m.again_bytes),
    ("logits", lambda m: m.logits_bytes),
)
_SCORES = {
    "fused": "fused attention",
    "masked": "fused attention with a mask",
    "scores": "full attention scores",
}


def render_plan(plan: Plan, name: str, console: Console) -> None:
    _say(console, Text(f"{name}: plan of {plan.run}", style="bold"))
    assumed = " (assumed; --gpu)" if plan.gpu_assumed else ""
    _say(console, f"{plan.gpus} x {plan.gpu.name}{assumed}, {_rate(plan)}, {_percent(plan.mfu)} of it used (assumed; --mfu)")
    for line in _layout(plan):
        _say(console, line)
    _parameters(plan, console)
    _compute(plan, console)
    if plan.factors:
        _factors(plan, console)
    _memory(plan, console)
    if any(stage.bubble for stage in plan.stages):
        _bubbles(plan, console)
    _tokens(plan, console)
    _costs(plan, console)
    for note in plan.notes:
        _say(console, Text(f"note: {note}", style="yellow"))


def render_budget(budget: TrainingBudget, gpu_assumed: bool, console: Console) -> None:
    assumed = " (assumed; --gpu)" if gpu_assumed else ""
    rate = f"{budget.gpu.flops_per_second(budget.precision) / 1e12:,.4g} TFLOP/s {budget.precision}"
    _say(console, Text("plan of a budget", style="bold"))
    _say(console, f"{budget.gpus} x {budget.gpu.name}{assumed}, {rate} each, {_percent(budget.mfu)} of it used (assumed; --mfu)")
    table = _table(
        console, "SIZE AND TOKENS", "by C = 6 N D and Chinchilla's D = 20 N", ("", "PARAMETERS", "TOKENS", "TOKENS A PARAMETER")
    )
    table.add_row("this plan", count(budget.parameters), count(budget.tokens), factor(budget.tokens_per_parameter))
    table.add_row("Chinchilla's best", count(budget.best_parameters), count(budget.best_tokens), "20")
    console.print(table)
    _say(console, f"{factor(budget.tokens_per_parameter)} tokens a parameter: {budget.verdict}")
    table = _table(console, "TIME AND COST", _price(budget.gpu, 1), ("FLOPs", "TIME", "GPU-HOURS", "COST"))
    table.add_row(flops(budget.flops), span(budget.days * 86_400), _hours(budget.gpu_hours), money(budget.cost_usd))
    console.print(table)
    table = _table(console, "MEMORY OF THE STATE", "float32, AdamW; activations come on top", ("PART", "ALL GPUS", "A GPU"))
    held = budget.state
    for part, whole in (
        ("weights", held.weights_bytes),
        ("gradients", held.gradients_bytes),
        ("optimizer, two moments", held.optimizer_bytes),
        ("together", held.total_bytes),
    ):
        table.add_row(part, size(whole), size(whole / budget.gpus))
    console.print(table)
    room = budget.gpu.memory_gb
    if room is not None:
        fits = budget.state_bytes_per_gpu < room * 1e9
        word = f"leaves {size(room * 1e9 - budget.state_bytes_per_gpu)} of" if fits else "does not fit into"
        way = "" if fits else f" (use at least {int(held.total_bytes // (room * 1e9)) + 1} GPUs)"
        _say(console, Text(f"the state {word} {room:g} GB a GPU{way}", style="" if fits else "bold red"))


def _rate(plan: Plan) -> str:
    return f"{plan.peak_flops_per_second_per_gpu / 1e12:,.4g} TFLOP/s {plan.precision} each"


def _layout(plan: Plan) -> list[str]:
    """The mesh, where it is of more than data-parallel ranks."""
    mesh, unit = plan.stages[0].mesh, "ranks" if plan.gpu.memory_gb is None else "GPUs"
    sizes = f"{plan.gpus} {unit} = pipeline {mesh.pipeline} x data {mesh.data} x tensor {mesh.tensor}"
    inner = [f'context {stage.mesh.context} in stage "{stage.name}"' for stage in plan.stages if stage.mesh.context > 1]
    if mesh.shard < mesh.data:
        inner.append(f"a copy of the state over each {mesh.shard} data ranks")
    if mesh.pipeline * mesh.tensor == 1 and not inner:
        return []
    return [", ".join([sizes, *inner])]


def _parameters(plan: Plan, console: Console) -> None:
    table = _table(console, "PARAMETERS", f"a vocabulary of {plan.vocabulary:,}", ("", "NUMBER", "SHARE"))
    parts = plan.parameters
    for name, number in (("blocks", parts.blocks), ("embedding, output, last norm", parts.embedding), ("together", parts.total)):
        table.add_row(name, f"{number:,}", _percent(number / parts.total))
    console.print(table)


def _compute(plan: Plan, console: Console) -> None:
    columns = ("STAGE", "CONTEXT", "TOKENS\nA STEP", "FLOPs\nA TOKEN", "FLOPs\nA STEP", "OF IT\nATTENTION", "KV CACHE\nA SEQUENCE")
    table = _table(console, "COMPUTE", "model FLOPs as PaLM counts them, attention not halved for its mask", columns)
    for stage in plan.stages:
        table.add_row(
            stage.name,
            f"{stage.context_tokens:,}",
            count(stage.tokens_per_step),
            flops(stage.flops_per_token),
            flops(stage.flops_per_step),
            _percent(stage.attention_share),
            size(stage.kv_cache_bytes_per_sequence),
        )
    console.print(table)
    _say(console, f"KV cache: {size(plan.kv_cache_bytes_per_token)} a token")


def _factors(plan: Plan, console: Console) -> None:
    columns = (
        "FROM",
        "TO",
        "LENGTH",
        "KV CACHE\nA SEQ.",
        "ACTIVATIONS\nA SEQ.",
        "ATTENTION\nA SEQ.",
        "ATTENTION\nA TOKEN",
        "FLOPs\nA TOKEN",
    )
    table = _table(console, "FROM STAGE TO STAGE", "factors; a sequence is one row of the stage's context", columns)
    for each in plan.factors:
        values = (
            each.length,
            each.kv_cache_per_sequence,
            each.activations_per_sequence,
            each.attention_flops_per_sequence,
            each.attention_flops_per_token,
            each.flops_per_token,
        )
        table.add_row(each.before, each.after, *(f"{factor(value)} x" for value in values))
    console.print(table)


def _memory(plan: Plan, console: Console) -> None:
    room = plan.gpu.memory_gb
    about = "each part at its largest; the peak is the most at any moment"
    rank = "A RANK" if room is None else "A GPU"
    fitting = max(1, (console.width - 24) // 12)
    for start in range(0, len(plan.stages), fitting):
        some = plan.stages[start : start + fitting]
        table = _table(console, f"MEMORY {rank}", about, ("PART", *(stage.name for stage in some)))
        for name, part in _PARTS:
            if any(part(stage.memory_per_gpu) for stage in some):
                table.add_row(name, *(_held(part(stage.memory_per_gpu)) for stage in some))
        if room is None:
            table.add_row("checkpoint's copy", *(size(stage.memory_per_gpu.staging_bytes) for stage in some))
        table.add_row(Text("peak", style="bold"), *(_peak(stage) for stage in some))
        if room is not None:
            table.add_row(f"of {room:g} GB", *(_percent(stage.memory_per_gpu.peak_bytes / room / 1e9) for stage in some))
            if any(stage.memory_per_gpu.host_bytes for stage in some):
                table.add_row("host: offloaded of these", *(_held(stage.memory_per_gpu.host_bytes) for stage in some))
            table.add_row("host: checkpoint's copy", *(size(stage.memory_per_gpu.staging_bytes) for stage in some))
        console.print(table)
    kernels = dict.fromkeys(_SCORES[stage.memory_per_gpu.attention_kernel] for stage in plan.stages)
    more = "; not counted: CUDA's context, NCCL's buffers, fragments (1 to 4 GB)"
    if room is None:
        more = "; a process holds up to a third more, freed pieces that malloc keeps"
    _say(console, f"{', '.join(kernels)}{more}")
    for stage in plan.stages:
        if stage.mesh.pipeline > 1:
            held = stage.memory_per_gpu
            forwards = f"{held.waiting_forwards} forwards{' of a part' if stage.mesh.parts > 1 else ''}"
            waiting = f"{forwards} wait there for their backward, {size(held.micro_batch_bytes)} a micro-batch"
            _say(console, f"{stage.name}: the worst is pipeline rank {held.pipeline_rank}; up to {waiting}")


def _held(bytes: int) -> str:
    return size(bytes) if bytes else "-"


def _percent(part: float) -> str:
    if 0 < part < 0.001:
        return "< 0.1 %"
    return f"{100 * part:.3g} %" if part < 1 else f"{100 * part:,.0f} %"


def _peak(stage: StagePlan) -> Text:
    style = {None: "bold", True: "bold green", False: "bold red"}[stage.fits]
    return Text(size(stage.memory_per_gpu.peak_bytes) + (" !" if stage.fits is False else ""), style=style)


def _bubbles(plan: Plan, console: Console) -> None:
    columns = ("STAGE", "PIPELINE", "VIRTUAL", "MICRO-BATCHES", "IDLE, OF THE STEP", "OVER THE IDEAL")
    about = "1F1B; time and cost below include it"
    table = _table(console, "PIPELINE BUBBLE", about, columns)
    for stage in plan.stages:
        if (idle := stage.bubble) is not None:
            numbers = (f"{idle.pipeline}", f"{idle.virtual}", f"{idle.micro_batches}")
            table.add_row(stage.name, *numbers, _percent(idle.share_of_step), _percent(idle.over_ideal_time))
    console.print(table)


def _tokens(plan: Plan, console: Console) -> None:
    found = plan.tokens
    if found is None:
        return
    table = _table(
        console, "TOKENS OF PRETRAINING", "Chinchilla's rule: 20 a parameter", ("", "PARAMETERS", "TOKENS", "A PARAMETER")
    )
    total = plan.parameters.total
    table.add_row("this recipe", count(total), count(found.pretraining_tokens), factor(found.tokens_per_parameter))
    table.add_row("best for this size", count(total), count(found.chinchilla_tokens), "20")
    table.add_row("best for these FLOPs", count(found.same_flops_parameters), count(found.same_flops_tokens), "20")
    console.print(table)
    _say(console, f"{factor(found.tokens_per_parameter)} tokens a parameter: {found.verdict}")


def _costs(plan: Plan, console: Console) -> None:
    columns = ("STAGE", "STEPS", "TOKENS", "A STEP", "TIME", "GPU-\nHOURS", "COST", "TO PRE-\nTRAINING")
    wide = console.width >= 100
    cores = plan.peak_flops_per_second_per_gpu / plan.gpu.flops_per_second(plan.precision)
    table = _table(console, "TIME AND COST", _price(plan.gpu, cores), (*columns, "TOKENS\nA SECOND") if wide else columns)
    for stage in plan.stages:
        ratio = stage.cost_to_pretraining
        row = (
            stage.name,
            count(stage.steps),
            count(stage.tokens),
            span(stage.step_seconds),
            span(stage.seconds),
            _hours(stage.gpu_hours),
            money(stage.cost_usd),
            "-" if ratio is None else f"{factor(ratio)} x",
        )
        table.add_row(*row, *([count(stage.tokens_per_second)] if wide else []))
    every = (count(sum(stage.tokens for stage in plan.stages)), "", span(plan.seconds))
    table.add_row(Text("together", style="bold"), "", *every, _hours(plan.gpu_hours), money(plan.cost_usd))
    console.print(table)
    _say(
        console,
        "each stage over the first that pretrains; without evaluations, samples, checkpoints and restarts; communication"
        " and what is computed again are in it only as far as --mfu allows for them",
    )


def _hours(hours: float) -> str:
    if hours >= 100:
        return f"{hours:,.0f}" if hours < 1e6 else count(hours)
    return f"{hours:.2f}" if hours >= 0.01 else "< 0.01"


def _price(gpu: Accelerator, cores: float) -> str:
    unit = "core" if gpu.memory_gb is None else "GPU"
    each = f", {cores:.0f} a rank" if gpu.memory_gb is None else ""
    return f"at ${gpu.usd_per_hour:g} an hour of a {unit} (--price){each}"


def _table(console: Console, title: str, about: str, columns: Sequence[str]) -> Table:
    """Prints the title; the table is the caller's to fill and print."""
    console.print()
    _say(console, Text.assemble((title, "bold"), (f"  {about}", "dim")))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, overflow="fold", justify="right" if number else "left")
    return table


def _say(console: Console, line: str | Text) -> None:
    console.print(line, soft_wrap=not console.is_terminal)
