"""Runs the steps of a build, on this machine's processes or on a cluster's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from shards.build.executors import run_elsewhere
from shards.build.models import beside
from shards.build.read import refuse_broken
from shards.build.steps import STEPS, BuildStep, do, forget, left
from shards.build.workspace import Work
from shards.common.progress import ProgressMeter
from shards.tokenization.encode import Workers

BEFORE_TOKENIZER = ("read", "sign", "exact", "near", "verify", "model", "clean", "make")
AFTER_TOKENIZER = ("encode",)


def begin(work: Work) -> None:
    """Make the working directory, or take over that of a killed build; nothing for a build without steps."""
    if work.has_steps:
        work.begin(list(STEPS), beside(work.clean))


def run(names: tuple[str, ...], work: Work, pool: Workers, meter: ProgressMeter) -> Work:
    """Do what is not done yet of these steps, in order; returns `work` as it is after them. A build may have no steps."""
    for name in names if work.has_steps else ():
        _run_step(STEPS[name], work, pool, meter)
        work = Work(work.build, work.key)  # one a step: what it remembers was known when the step began
        if name == "read":
            work.refuse_changed(beside(work.clean))
            refuse_broken(work)
        if name == "model":
            work.refuse_changed(beside(work.clean))
    return work


def _run_step(step: BuildStep, work: Work, pool: Workers, meter: ProgressMeter) -> None:
    forget()  # what another build in this process knew
    weights = {task: step.weight(work, task) for task in step.tasks(work)}
    waiting = left(step, work)
    total, done = sum(weights.values()), sum(weights.values()) - sum(weights[task] for task in waiting)
    unit = "bytes" if any(weight > 1 for weight in weights.values()) else "parts"
    meter.begin("clean", step.about, unit, total, done)
    for task in _tasks_done(step, work, waiting, pool):
        done += weights[task]
        meter.update(done, total)


def _tasks_done(step: BuildStep, work: Work, waiting: list[Any], pool: Workers) -> Iterator[Any]:
    if work.build.data.executor != "local":
        yield from run_elsewhere(step, work, waiting)
        return
    build = msgspec.json.encode(work.build)
    # The longest first, so that none is alone at the end.
    waiting = sorted(waiting, key=lambda task: -step.weight(work, task))
    for _, _, _, task in pool.run(do, ((build, work.key, step.name, task) for task in waiting)):
        yield task
