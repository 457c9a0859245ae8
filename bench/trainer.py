"""The trainer's speed and memory, beside others' on a CPU, and by itself on a GPU.

python -m bench.trainer [--rounds N] [--steps N] [--only cpu|gpu] [--rehearse]

On a CPU the same small Llama is trained with one thread by Midwatch's loop, by a plain loop in nanoGPT's way, by Hugging Face's
Trainer and by torchtitan, where they are installed and run (the extra `bench`). They take turns, in processes of their own on the
same core, round after round, so that what else the machine does falls on all of them; ratios are of a round's, and their median and
spread are told. A step's wall time is the median over a turn's steps, its CPU time their mean, so that what happens now and then is
in it. What needs a GPU is left out with a line where there is none. All figures go to bench/results/ as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench import _contest, _gpu
from midwatch.recipe import Recipe, dump_recipe, parse_recipe
from shards.build.build import build
from shards.sampling.batches import BatchFeed
from shards.spec import Build

WARM = 6
"""First steps of a turn, which are not timed."""
SIZES = {
    "4 layers, width 256, context 256, batch 8": {
        "num_layers": 4,
        "hidden_size": 256,
        "num_heads": 8,
        "num_kv_heads": 8,
        "context": 256,
        "batch": 8,
    },
    "4 layers, width 128, context 128, batch 8": {
        "num_layers": 4,
        "hidden_size": 128,
        "num_heads": 4,
        "num_kv_heads": 2,
        "context": 128,
        "batch": 8,
    },
}
RECIPE = """
[run]
name = "contest"
[model]
num_layers = {layers}
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
max_tokens = 500000
[cluster]
device = "cpu"
[checkpoint]
every = 1000000
[[stage]]
name = "pretrain"
objective = "pretrain"
steps = 1000
context = {context}
global_batch = {batch}
micro_batch = {batch}
warmup_steps = 100
mixture = {{docs = 1}}
eval_every = 1000000
"""
LIMITS = {"nanogpt": 1.0, "transformers": 1.3, "torchtitan": 1.0}
"""What Midwatch's tokens a second over theirs are to reach."""
TITLES = {
    "midwatch": "Midwatch",
    "nanogpt": "plain loop, in nanoGPT's way",
    "transformers": "Hugging Face Trainer",
    "torchtitan": "torchtitan",
}
RESULTS = Path(__file__).parent / "results"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def prepare(root: Path, size: dict[str, int]) -> Recipe:
    """The recipe, shards for Midwatch, and the same tokens in one file for the others."""
    recipe = parse_recipe(RECIPE.format(**size))
    (root / "recipe.toml").write_text(dump_recipe(recipe))
    build(Build(data=recipe.data, tokenizer=recipe.tokenizer, out=str(root / "data"), seed=0))
    stage = recipe.stage[0]
    feed = BatchFeed(root / "data", "train", "text", stage.context, stage.mixture, 0, masked_documents=False)
    rows = feed.read(0, feed.samples_per_epoch("docs")).tokens
    rows.astype(np.uint16).tofile(root / "tokens.bin")
    return recipe


def turn(name: str, root: Path, steps: int) -> dict[str, Any] | str:
    """One contestant's figures of one turn, or the last line of why there are none."""
    result = root / "result.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "bench._contest", name, str(root), str(WARM + steps), str(result)]
    done = subprocess.run(command, env=os.environ | ONE_THREAD, capture_output=True, text=True)
    if done.returncode or not result.exists():
        return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    found: dict[str, Any] = json.loads(result.read_text())
    wall, cpu = (np.diff(found[f"{kind}_at_step_seconds"][WARM - 1 :]) for kind in ("wall", "cpu"))
    found["wall_seconds_a_step"], found["cpu_seconds_a_step"] = float(np.median(wall)), float(np.mean(cpu))
    return found


def contest(size: dict[str, int], rounds: int, steps: int) -> dict[str, Any]:
    """All turns by contestant; for one that does not run, why."""
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in _contest.CONTESTANTS}
    problems: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="mwb-") as place:
        recipe = prepare(Path(place), size)
        for number in range(rounds):
            order = [name for name in turns if name not in problems]
            for name in order[number % len(order) :] + order[: number % len(order)]:
                found = turn(name, Path(place), steps)
                if isinstance(found, str):
                    problems[name] = found
                else:
                    turns[name].append(found)
    stage = recipe.stage[0]
    return {"size": size, "tokens_a_step": stage.global_batch * stage.context, "turns": turns, "problems": problems}


def ratios(found: dict[str, Any], name: str, kind: str) -> list[float]:
    """Of each round: the other's seconds a step over Midwatch's, which is Midwatch's speed over its."""
    turns = found["turns"]
    key = f"{kind}_seconds_a_step"
    return [theirs[key] / ours[key] for theirs, ours in zip(turns[name], turns["midwatch"], strict=True)]


def spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def contest_table(title: str, found: dict[str, Any]) -> Table:
    table = Table(
        "who",
        "parameters",
        "loss at step 1",
        "wall a step",
        "tokens/s",
        "CPU a step",
        "Midwatch over it: wall",
        "CPU time",
        "to reach",
        title=f"One CPU thread: {title}, {found['tokens_a_step']} tokens a step",
    )
    for name, turns in found["turns"].items():
        if name in found["problems"]:
            table.add_row(TITLES[name], "", "", "", "", "", f"not run: {found['problems'][name]}", "", f"≥ {LIMITS[name]}")
            continue
        wall, cpu = (statistics.median(turn[f"{kind}_seconds_a_step"] for turn in turns) for kind in ("wall", "cpu"))
        row = [TITLES[name], f"{turns[0]['parameters']:,}", f"{turns[0]['first_losses'][0]:.3f}", f"{wall * 1e3:.1f} ms"]
        row += [f"{found['tokens_a_step'] / wall:,.0f}", f"{cpu * 1e3:.1f} ms"]
        if name != "midwatch":
            row += [spread(ratios(found, name, "wall")), spread(ratios(found, name, "cpu")), f"≥ {LIMITS[name]}"]
        table.add_row(*row)
    return table


def surroundings() -> dict[str, str]:
    """When, on what and of which versions figures are."""
    processor = next((line.split(": ")[1] for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine())
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent)
    found = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "cpu": f"{processor}, {os.cpu_count()} cores"}
    found |= {"gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none", "python": platform.python_version()}
    found |= {"torch": torch.__version__, "git_revision": git.stdout.strip()}
    for name in ("transformers", "accelerate", "torchtitan"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def summary(found: dict[str, Any]) -> dict[str, Any]:
    """A contest's figures as they are shown, beside the single turns'."""
    over = {}
    for name in LIMITS:
        if name in found["problems"]:
            continue
        for kind in ("wall", "cpu"):
            values = ratios(found, name, kind)
            over[f"{kind}_ratio_over_{name}"] = {"median": statistics.median(values), "least": min(values), "most": max(values)}
    return over | found


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables and keeps the figures."""
    parser = argparse.ArgumentParser(prog="python -m bench.trainer")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contestant")
    parser.add_argument("--steps", type=int, default=24, help="timed steps of a turn")
    parser.add_argument("--only", choices=("cpu", "gpu"))
    parser.add_argument("--rehearse", action="store_true", help="go through the GPU's measurements on a CPU, with tiny models")
    options = parser.parse_args(arguments)
    console = Console(width=200)
    results: dict[str, Any] = {"surroundings": surroundings(), "cpu": {}, "gpu": None}
    for title, size in SIZES.items() if options.only != "gpu" else ():
        found = contest(size, options.rounds, options.steps)
        if problem := found["problems"].get("midwatch"):
            raise SystemExit(f"Midwatch's own turn failed: {problem}")
        results["cpu"][title] = summary(found)
        console.print(contest_table(title, found))
    if options.only != "cpu":
        if options.rehearse or torch.cuda.is_available():
            results["gpu"] = _gpu.measure(options.rehearse)
        console.print(_gpu.table(results["gpu"], "not run: torch sees no CUDA device"))
    if options.rehearse:
        console.print("a rehearsal: the GPU's figures say nothing, and are not kept")
        return
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"trainer-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    file.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"all figures: {file}")


if __name__ == "__main__":
    main()
