"""Generation and post-training on a CPU: the engine beside transformers', fine-tuning and DPO beside TRL's, and PPO by its phases.

python -m bench.generate [--rounds N] [--steps N] [--only write|tune|ppo]

One thread, one core. Only tokens that were wanted count; how many responses are not the engine's is told. What is held against
each other takes turns, round after round, and ratios are of a round's; their median and spread are told. What is not installed (the
extra `bench`) is left out with a line. All figures go to bench/results/ as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.trainer import ONE_THREAD, RESULTS, spread, surroundings
from midwatch.recipe import parse_recipe
from shards.build.build import build
from shards.spec import Build

WARM = 4
"""First steps of a turn of tuning, which are not timed."""
PADDED, CONTINUOUS, USED, TUNED = 2.5, 4.0, 0.9, 1.5
"""To reach: tokens a second over padded batches and over continuous batching, slots in use, tokens a second over TRL."""
BASE = """
[run]
name = "bench"
[model]
num_layers = 4
hidden_size = {width}
num_heads = {heads}
num_kv_heads = {kv_heads}
[tokenizer]
vocab = 2048
sample_bytes = 1000000
[data]
[[data.source]]
name = "docs"
kind = "text"
origin = "stdlib-docs"
max_tokens = 200000
[[data.source]]
name = "questions"
kind = "sft"
origin = "stdlib-sft"
[[data.source]]
name = "preferences"
kind = "preference"
origin = "stdlib-preference"
[cluster]
device = "cpu"
[checkpoint]
every = 1000000
"""
STAGE = """
[[stage]]
name = "{name}"
objective = "{objective}"
steps = {steps}
context = {context}
global_batch = {batch}
micro_batch = {micro}
warmup_steps = 1
mixture = {{ {source} = 1 }}
eval_every = 1000000
eval_samples = 1
"""
POLICY = "policy = { prompts = 64, tokens = 48, epochs = 2 }\n"


def recipes() -> dict[str, str]:
    """By objective; PPO's is of the demo's size, with all that it begins with."""

    def stage(name: str, objective: str, steps: int, context: int, batch: int, micro: int, source: str) -> str:
        return STAGE.format(name=name, objective=objective, steps=steps, context=context, batch=batch, micro=micro, source=source)

    base, small = BASE.format(width=256, heads=8, kv_heads=8), BASE.format(width=128, heads=4, kv_heads=2)
    first = stage("pretrain", "pretrain", 2, 128, 4, 4, "docs") + stage("reward", "reward", 2, 128, 8, 8, "preferences")
    return {
        "sft": base + stage("sft", "sft", 1000, 256, 8, 8, "questions"),
        "dpo": base + stage("dpo", "dpo", 1000, 96, 8, 8, "preferences"),
        "ppo": small + first + stage("ppo", "ppo", 1000, 128, 32, 16, "preferences") + POLICY,
    }


def run(module: str, *arguments: object) -> dict[str, Any] | str:
    """What a process of its own found, or the last line of why there is nothing."""
    with tempfile.TemporaryDirectory(prefix="mwb-") as place:
        result = Path(place) / "result.json"
        command = [sys.executable, "-m", module, *map(str, arguments), str(result)]
        done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True)
        if done.returncode or not result.exists():
            return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def writing(rounds: int) -> dict[str, Any]:
    """Adds to what was measured the ratios of each round."""
    found = run("bench._writers", rounds)
    if isinstance(found, str):
        return {"problem": found}
    turns = found["turns"]
    for kind in ("wall", "cpu"):
        own = [turn[f"{kind}_seconds"] for turn in turns["midwatch"]]
        rows = [turns[name] for name in turns if name.startswith("padded")]
        best = [min(turn[f"{kind}_seconds"] for turn in each) for each in zip(*rows, strict=True)]
        found[f"{kind}_over_padded"] = [theirs / ours for theirs, ours in zip(best, own, strict=True)]
        theirs = [turn[f"{kind}_seconds"] for turn in turns["continuous"]]
        found[f"{kind}_over_continuous"] = [other / ours for other, ours in zip(theirs, own, strict=False)]
    return found


def writing_table(found: dict[str, Any]) -> Table:
    title = "One CPU thread: 64 greedy requests, prompts and responses of 8 to 128 tokens"
    table = Table(
        "who", "tokens/s", "of CPU time", "responses that differ", "Midwatch over it: wall", "CPU time", "to reach", title=title
    )
    if "turns" not in found:
        table.add_row("", "", "", "", f"not run: {found['problem']}")
        return table
    over = {"continuous": ("continuous", CONTINUOUS)} | {"padded 64": ("padded", PADDED)}
    for name, turns in found["turns"].items():
        if not turns:
            table.add_row(f"transformers, {name}", "", "", "", f"not run: {found['problem']}", "", f"≥ {CONTINUOUS}")
            continue
        speeds = [f"{found['tokens'] / statistics.median(turn[f'{k}_seconds'] for turn in turns):,.0f}" for k in ("wall", "cpu")]
        row = ["Midwatch" if name == "midwatch" else f"transformers, {name}", *speeds, str(found["responses_that_differ"][name])]
        if name in over:
            which, limit = over[name]
            row += [spread(found[f"wall_over_{which}"]), spread(found[f"cpu_over_{which}"]), f"≥ {limit}"]
        table.add_row(*row)
    used = found["slots_used"]
    table.caption = f"slots of the KV cache in use: {used['paged']:.3f} (to reach: {USED}); padded rows: {used['padded']:.3f}"
    return table


def tuning(root: Path, objective: str, rounds: int, steps: int) -> dict[str, Any]:
    """Tokens a second of each turn, and the ratios of each round."""
    turns: dict[str, list[dict[str, float]]] = {"midwatch": [], "trl": []}
    problems: dict[str, str] = {}
    for number in range(rounds):
        for name in sorted(turns, reverse=bool(number % 2)):
            if name in problems:
                continue
            found = run("bench._tuners", name, objective, root, WARM + steps)
            if isinstance(found, str):
                problems[name] = found
                continue
            tokens = sum(found["tokens"][WARM:])
            seconds = {kind: found[kind][-1] - found[kind][WARM] for kind in ("wall", "cpu")}
            turns[name].append(
                {f"{kind}_tokens_a_second": tokens / seconds[kind] for kind in seconds} | {"first_loss": found["first_loss"]}
            )
    both = zip(turns["midwatch"], turns["trl"], strict=False)
    ratios = [
        {kind: ours[f"{kind}_tokens_a_second"] / theirs[f"{kind}_tokens_a_second"] for kind in ("wall", "cpu")}
        for ours, theirs in both
    ]
    return {"turns": turns, "ratios": ratios, "problems": problems}


def tuning_table(found: dict[str, dict[str, Any]]) -> Table:
    table = Table(
        "objective", "who", "loss at step 1", "tokens/s", "of CPU time", "Midwatch over it: wall", "CPU time", "to reach",
        title="One CPU thread: fine-tuning and DPO, a Llama of 3.7 M parameters; real tokens, without padding",
    )  # fmt: skip
    for objective, each in found.items():
        for name, turns in each["turns"].items():
            if name in each["problems"]:
                table.add_row(objective, name, "", "", "", f"not run: {each['problems'][name]}")
                continue
            speeds = [statistics.median(turn[f"{kind}_tokens_a_second"] for turn in turns) for kind in ("wall", "cpu")]
            row = [objective, name, f"{turns[0]['first_loss']:.3f}", *(f"{speed:,.0f}" for speed in speeds)]
            if name == "trl" and each["ratios"]:
                row += [spread([ratio[kind] for ratio in each["ratios"]]) for kind in ("wall", "cpu")] + [f"≥ {TUNED}"]
            table.add_row(*row)
    return table


def phases(root: Path, rollouts: int = 4) -> dict[str, Any]:
    """Medians over rollouts of a PPO run, without the first."""
    found = run("bench._tuners", "midwatch", "ppo", root, 4 * rollouts)
    if isinstance(found, str):
        return {"problem": found}
    told = found["told"]
    names = (
        "perf/generate_seconds",
        "perf/score_seconds",
        "perf/update_seconds",
        "perf/generated_tokens_per_second",
        "perf/kv_cache_utilization",
    )
    series = {name: [values[name] for values in told if name in values] for name in names}
    return {name: statistics.median(values[1:]) for name, values in series.items() if values[1:]}


def phases_table(found: dict[str, Any]) -> Table:
    title = (
        "PPO at the demo's size (4 layers, width 128): 64 prompts a rollout, responses of up to 48 tokens, updates of 32, 2 epochs"
    )
    table = Table("what", "seconds", title=title)
    if "problem" in found:
        table.add_row("not run", found["problem"])
        return table
    for name, value in found.items():
        table.add_row(name, f"{value:.3f}" if value < 100 else f"{value:,.0f}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables and keeps the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.generate")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each")
    parser.add_argument("--steps", type=int, default=16, help="timed steps of a turn of tuning")
    parser.add_argument("--only", choices=("write", "tune", "ppo"))
    options = parser.parse_args(arguments)
    console = Console(width=200)
    results: dict[str, Any] = {"surroundings": surroundings(), "load_at_the_beginning": os.getloadavg()}
    with contextlib.suppress(metadata.PackageNotFoundError):
        results["surroundings"]["trl"] = metadata.version("trl")
    if options.only in (None, "write"):
        results["writing"] = writing(options.rounds)
        console.print(writing_table(results["writing"]))
    with tempfile.TemporaryDirectory(prefix="mwb-") as place:
        root = Path(place)
        if options.only != "write":
            for name, text in recipes().items():
                (root / f"{name}.toml").write_text(text)
                (root / name).mkdir()
            recipe = parse_recipe(recipes()["sft"])
            build(Build(data=recipe.data, tokenizer=recipe.tokenizer, out=str(root / "data"), seed=0))
        if options.only in (None, "tune"):
            results["tuning"] = {name: tuning(root, name, options.rounds, options.steps) for name in ("sft", "dpo")}
            console.print(tuning_table(results["tuning"]))
        if options.only in (None, "ppo"):
            results["ppo"] = phases(root)
            console.print(phases_table(results["ppo"]))
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"generate-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"all figures: {file}")


if __name__ == "__main__":
    main()
