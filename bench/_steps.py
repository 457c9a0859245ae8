"""One rank that trains ROOT/recipe.toml and leaves its figures: `python -m bench._steps TASK ROOT STEPS RESULT`.

`alone`: steps after one another. `steered`: blocks of steps with a link to a server, boundaries, metrics and an asynchronous
checkpoint each, in turns with blocks of steps that have none of it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench._ranks import leave_after
from bench.boundary import Measured, link_cpu
from midwatch import protocol as p
from midwatch.recipe import load_recipe
from midwatch.transport.rank_client import RankLink
from trainer.control.rank_log import Logged
from trainer.control.reporting import ControllerLink, NoLink
from trainer.distributed.mesh import join, open_store, settle
from trainer.loop.loop import boundary, step
from trainer.stage.training import Training

WARM = 4
PAIRS = 4


class Losses(NoLink):
    """A link that keeps the losses."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def send(self, body: p.RankBody) -> None:
        if isinstance(body, p.Metrics) and "train/loss" in body.values:
            self.found.append(body.values["train/loss"])


def opened(root: Path, link: ControllerLink) -> Training:
    """A training at its beginning."""
    recipe = load_recipe(root / "recipe.toml")
    settle(recipe.cluster)
    world = join(open_store(), "bench", recipe.cluster, recipe.parallel)
    start = p.Start(generation=1, term=1, lineage=p.Lineage(id=1))
    training = Training(recipe, root, root / "data", world, link, start)
    training.open(start)
    return training


def timed(training: Training, steps: int) -> float:
    """Seconds of so many steps, until the device has done all that was asked of it."""
    training.world.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        step(training)
    training.world.synchronize()
    return time.perf_counter() - began


def timed_steered(training: Training, steps: int) -> tuple[float, float]:
    """The same with a checkpoint and boundaries; and the main thread's CPU seconds in these."""
    training.world.synchronize()
    began, own = time.perf_counter(), 0.0
    for number in range(steps):
        before = time.thread_time()
        if number == 0:
            training.save()
        boundary(training)
        own += time.thread_time() - before
        step(training)
    training.world.synchronize()
    return time.perf_counter() - began, own


def flops(training: Training, causal: bool) -> float:
    """A token's operations, as the trainer counts them, or with the half of attention that a causal mask leaves."""
    model, context = training.recipe.model, training.stage.stage.context
    whole = training.model.flops_per_token(context)
    return whole - 6.0 * model.num_layers * model.num_heads * model.head * context if causal else whole


def alone(root: Path, steps: int) -> dict[str, Any]:
    link = Losses()
    training = opened(root, link)
    timed(training, WARM)
    if training.world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [timed(training, 1) for _ in range(steps)]
    training.reporter.flush()
    on_gpu = training.world.device.type == "cuda"
    stage = training.stage.stage
    found = {
        "step_seconds": seconds,
        "tokens_a_step": stage.global_batch * stage.context,
        "flops_a_token": flops(training, causal=False),
        "causal_flops_a_token": flops(training, causal=True),
        "parameters": sum(parameter.numel() for parameter in training.model.parameters().values()),
        "losses": link.found,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
    }
    training.close()
    return found


def steered(root: Path, steps: int) -> dict[str, Any]:
    hello = p.RankHello(version=p.VERSION, run="bench", generation=1, term=1, pid=os.getpid(), world=1)
    link = Measured(Logged(RankLink(root / "control" / "address", hello)))
    training = opened(root, link)
    found: dict[str, Any] = {"steps_a_block": steps, "with_seconds": [], "without_seconds": [], "own_cpu_seconds": 0.0}
    timed_steered(training, WARM)
    cpu = 0.0
    for pair in range(PAIRS):
        for on in (True, False) if pair % 2 else (False, True):
            training.checkpointer.join()
            training.reporter.flush()
            training.checkpointer.poll()
            link.flush(60.0)
            shutil.rmtree(root / "checkpoints", ignore_errors=True)
            (root / "checkpoints").mkdir()
            if not on:
                training.reporter._link = NoLink()
                found["without_seconds"].append(timed(training, steps))
                continue
            training.reporter._link = link
            sent, threads, before = link.seconds, link_cpu(), time.process_time()
            seconds, own = timed_steered(training, steps)
            found["with_seconds"].append(seconds)
            found["own_cpu_seconds"] += own + link.seconds - sent + link_cpu() - threads
            cpu += time.process_time() - before
    found["cpu_seconds"] = cpu
    training.close()
    link.close()
    return found


def main() -> None:
    task, root, steps, result = sys.argv[1:]
    Path(result).write_text(json.dumps({"alone": alone, "steered": steered}[task](Path(root), int(steps))))


if __name__ == "__main__":
    leave_after(main)
