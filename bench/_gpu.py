"""What the trainer reaches on one GPU: its part of the peak, its longest context, what steering costs, memory beside the plan's.

Every measurement is a process of its own, so that what it holds is gone before the next. `rehearse` goes the same ways with tiny
models wherever there is no GPU, to see that they go through; its figures say nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from bench.boundary import Acknowledger
from launcher.plan.memory import memory
from midwatch.recipe import Recipe, dump_recipe, parse_recipe
from shards.build.build import build
from shards.spec import Build

PEAK = 989e12
"""Dense bfloat16 operations a second of an H200."""
VOCABULARY = 128_256
LLAMA_1B: dict[str, Any] = {"num_layers": 16, "hidden_size": 2048, "num_heads": 32, "num_kv_heads": 8, "intermediate_size": 8192}
SHALLOW = {"num_layers": 4, "hidden_size": 4096, "num_heads": 32, "num_kv_heads": 8, "intermediate_size": 14336}
NARROW = {"num_layers": 24, "hidden_size": 1024, "num_heads": 16, "num_kv_heads": 16, "intermediate_size": 2816}
TINY = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 128}
LONG = {"activation_checkpointing": "offloaded", "mlp_chunk_tokens": 16384, "loss_chunk_tokens": 4096}
CONTEXTS = [1 << 17, 1 << 18, 1 << 19, 1 << 20, 3 << 19, 1 << 21]
FEWEST_LONG_STEPS = 2


class Setting(NamedTuple):
    """One model at one context."""

    model: dict[str, Any]
    context: int
    samples: int
    micro_batch: int
    stage: dict[str, Any] = {}  # noqa: RUF012  # never changed
    offload: str = "none"


EIGHT_K = Setting(LLAMA_1B | {"compile": True}, 8192, 8, 4)
FLOAT8 = EIGHT_K._replace(model=EIGHT_K.model | {"float8": "tensorwise"})
MEMORY = {
    "1.2B, 8K, 4 rows at a time": EIGHT_K._replace(model=LLAMA_1B),
    "1.2B, 128K, blocks computed again": Setting(LLAMA_1B, 1 << 17, 1, 1, LONG | {"activation_checkpointing": "block"}),
    "0.4B, 2K, 16 rows at a time, twice": Setting(NARROW, 2048, 32, 16),
    "1.4B, 4K, all but products computed again": Setting(SHALLOW, 4096, 4, 4, {"activation_checkpointing": "selective"}),
}


def long(context: int) -> Setting:
    return Setting(LLAMA_1B, context, 1, 1, LONG, "optimizer")


def small(setting: Setting) -> Setting:
    """The same way through the code, for a rehearsal."""
    time = min(setting.context, 64)
    stage = setting.stage | ({"mlp_chunk_tokens": 16, "loss_chunk_tokens": 16} if "mlp_chunk_tokens" in setting.stage else {})
    return setting._replace(
        model=TINY | {key: value for key, value in setting.model.items() if key == "float8"},
        context=time,
        samples=min(setting.samples, 4),
        micro_batch=min(setting.micro_batch, 2),
        stage=stage,
    )


class Device:
    """Runs measurements; with a rehearsal's sizes where told so."""

    def __init__(self, root: Path, rehearse: bool) -> None:
        self.root, self.rehearse = root, rehearse

    def recipe(self, setting: Setting) -> Recipe:
        setting = small(setting) if self.rehearse else setting
        stage = {"name": "pretrain", "objective": "pretrain", "steps": 1000, "warmup_steps": 100, "eval_every": 1_000_000}
        stage |= {"context": setting.context, "global_batch": setting.samples, "micro_batch": setting.micro_batch}
        sections: dict[str, Any] = {
            "run": {"name": "gpu"},
            "model": setting.model | {"dtype": "bfloat16", "vocabulary": 4096 if self.rehearse else VOCABULARY},
            "tokenizer": {"vocab": 2048, "sample_bytes": 1_000_000},
            "data": {"dir": str(self.root / "data")},
            "cluster": {"device": "cpu" if self.rehearse else "cuda"},
            "checkpoint": {"every": 1_000_000},
            "parallel": {"offload": setting.offload},
        }
        sections["data"]["source"] = [
            {"name": "code", "kind": "text", "origin": "stdlib-code", "max_tokens": 200_000 if self.rehearse else 6_000_000}
        ]
        sections["stage"] = [stage | setting.stage | {"mixture": {"code": 1.0}}]
        return parse_recipe(_toml(sections))

    def run(self, setting: Setting, task: str = "alone", steps: int = 12) -> dict[str, Any] | str:
        """One process's figures, or the last line of why there are none."""
        recipe, result = self.recipe(setting), self.root / "result.json"
        result.unlink(missing_ok=True)
        (self.root / "recipe.toml").write_text(dump_recipe(recipe))
        build(Build(data=recipe.data, tokenizer=recipe.tokenizer, out=str(self.root / "data"), seed=recipe.run.seed))
        command = [sys.executable, "-m", "bench._steps", task, str(self.root), str(2 if self.rehearse else steps), str(result)]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
        if done.returncode or not result.exists():
            return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        found: dict[str, Any] = json.loads(result.read_text())
        return found | {"setting": setting._asdict()}


def _toml(sections: dict[str, Any]) -> str:
    """Tables, and lists of tables, of plain values; JSON's are TOML's here, but for the mixture."""
    lines: list[str] = []

    def table(name: str, values: dict[str, Any], bracket: str) -> None:
        lines.append(f"{'[' * len(bracket)}{name}{bracket}")
        for key, value in values.items():
            if isinstance(value, list):
                continue
            inline = isinstance(value, dict)
            lines.append(
                f"{key} = " + ("{" + ", ".join(f"{k} = {v}" for k, v in value.items()) + "}" if inline else json.dumps(value))
            )
        for key, value in values.items():
            for each in value if isinstance(value, list) else []:
                table(f"{name}.{key}", each, "]]")

    for name, section in sections.items():
        for each in section if isinstance(section, list) else [section]:
            table(name, each, "]]" if isinstance(section, list) else "]")
    return "\n".join(lines) + "\n"


def mfu(found: dict[str, Any], causal: bool = False) -> float:
    """Part of the H200's dense bfloat16 peak. Attention counted whole, or the half of it that the causal mask leaves."""
    each = found["causal_flops_a_token" if causal else "flops_a_token"]
    return float(each * found["tokens_a_step"] / statistics.median(found["step_seconds"]) / PEAK)


def longest(device: Device) -> dict[str, Any]:
    """Full training steps at ever longer contexts, until one does not go through."""
    found: dict[str, Any] = {"reached": {}, "ended_by": None}
    for context in CONTEXTS[:2] if device.rehearse else CONTEXTS:
        figures = device.run(long(context), steps=FEWEST_LONG_STEPS)
        if isinstance(figures, str):
            found["ended_by"] = f"{context:,}: {figures}"
            break
        found["reached"][context] = figures
    return found


def planned_bytes(recipe: Recipe) -> int:
    """What `midwatch plan` says of the device's memory at the peak."""
    model = recipe.model
    return memory(model, model.vocabulary or 0, recipe.stage[0], 1, recipe.cluster.device == "cpu", recipe.parallel).peak_bytes


def steering(device: Device) -> dict[str, Any] | str:
    server = Acknowledger(device.root, device.root / "socket")
    try:
        return device.run(EIGHT_K, "steered", steps=40)
    finally:
        server.close()


def measure(rehearse: bool = False) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="mwb-") as place:
        device = Device(Path(place), rehearse)
        found: dict[str, Any] = {
            "eight_k": device.run(EIGHT_K),
            "float8": device.run(FLOAT8),
            "longest": longest(device),
            "steering": steering(device),
            "memory": {},
        }
        for name, setting in MEMORY.items():
            figures = device.run(setting, steps=3)
            found["memory"][name] = (
                figures if isinstance(figures, str) else figures | {"planned_bytes": planned_bytes(device.recipe(setting))}
            )
        return found


def table(found: dict[str, Any] | None, why_not: str = "") -> Table:
    """found: what `measure` gave; None where it was not run."""
    table = Table("what", "measured", "to reach", title="One H200, bfloat16")
    rows = _rows(found) if found is not None else dict.fromkeys(LIMITS, why_not)
    for name, limit in LIMITS.items():
        table.add_row(name, rows[name], limit)
    return table


LIMITS = {
    "1.2B at 8K: part of 989 TFLOP/s": "≥ 0.55",
    "1.2B at 8K, float8 over bfloat16": "≥ 1.25",
    "1.2B: longest context of a full step": "≥ 1,048,576",
    "part of 989 TFLOP/s at that context": "≥ 0.5",
    "step with metrics, control and checkpoints, over without": "≤ 1.01",
    "CPU time of these, over the rank's": "≤ 0.5 %",
    "peak memory over the plan's": "0.9 to 1.1",
}


def _rows(found: dict[str, Any]) -> dict[str, str]:
    """By LIMITS' names."""
    eight, steer, reached = found["eight_k"], found["steering"], found["longest"]["reached"]
    best = max(reached, default=None)
    over = [] if isinstance(steer, str) else [a / b for a, b in zip(steer["with_seconds"], steer["without_seconds"], strict=True)]
    parts = [_memory_row(name, figures) for name, figures in found["memory"].items()]
    values = [
        _mfu_row(eight),
        _float8_row(eight, found["float8"]),
        f"{best:,}; then {found['longest']['ended_by'] or 'no longer one was tried'}"
        if best
        else str(found["longest"]["ended_by"]),
        _mfu_row(reached[best]) if best else "",
        f"{statistics.median(over):.4f} ({min(over):.4f} to {max(over):.4f})" if over else str(steer),
        f"{steer['own_cpu_seconds'] / steer['cpu_seconds']:.2%}" if over else "",
        "\n".join(parts),
    ]
    return dict(zip(LIMITS, values, strict=True))


def _mfu_row(found: dict[str, Any] | str) -> str:
    if isinstance(found, str):
        return found
    rate = found["tokens_a_step"] / statistics.median(found["step_seconds"])
    return f"{mfu(found):.3f} ({mfu(found, causal=True):.3f} with attention's causal half alone), {rate:,.0f} tokens/s"


def _float8_row(plain: dict[str, Any] | str, found: dict[str, Any] | str) -> str:
    if isinstance(plain, str) or isinstance(found, str):
        return str(found)
    faster = statistics.median(plain["step_seconds"]) / statistics.median(found["step_seconds"])
    losses = ", ".join(f"{loss:.3f} ({other:.3f})" for loss, other in zip(found["losses"], plain["losses"], strict=False))
    return f"{faster:.3f}; losses, beside bfloat16's: {losses}"


def _memory_row(name: str, found: dict[str, Any] | str) -> str:
    if isinstance(found, str):
        return f"{name}: {found}"
    if found["peak_bytes"] is None:
        return f"{name}: not measured, {found['planned_bytes'] / 1e9:.1f} GB planned"
    return f"{name}: {found['peak_bytes'] / found['planned_bytes']:.3f} ({found['peak_bytes'] / 1e9:.1f} GB)"
