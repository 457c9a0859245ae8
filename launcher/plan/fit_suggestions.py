"""What would make a stage fit: settings tried one after the other, those that cost least first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

from msgspec.structs import replace

from launcher.plan.activations import Checkpointing
from launcher.plan.memory import memory
from launcher.plan.units import PlanError
from midwatch.recipe import Model, Parallel, Stage

WORTH = 0.95
"""A way is taken where it leaves less than this part of the peak, or makes the stage fit."""
_CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "block", "offloaded")
_OFFLOADS: tuple[Literal["none", "optimizer", "parameters"], ...] = ("none", "optimizer", "parameters")
_SIZES = (2, 4, 8, 16, 32, 64)


class Case(NamedTuple):
    model: Model
    stage: Stage
    parallel: Parallel
    ranks: int


Change = tuple[str, Case]
"""As it stands in the recipe, and what it makes of the case."""


def ways_out(case: Case, vocabulary: int, room_bytes: float, tensor: int) -> list[str]:
    """Settings with which the stage fits on a GPU; the last one is in words where none are enough. tensor: the most to advise."""
    taken: list[str] = []
    peak = _peak(case, vocabulary)
    for kind in (_batch, _recomputing, _tiles, _contexts, lambda case: _tensors(case, tensor), _offloading, _types, _gpus):
        best: Change | None = None
        for words, changed in kind(case):
            found = _peak(changed, vocabulary)
            if found <= room_bytes:
                return [*taken, words]
            if found < WORTH * peak:
                peak, best = found, (words, changed)
        if best is not None:
            taken.append(best[0])
            case = best[1]
    return [*taken, "a shorter context" if case.stage.context > 8192 else "a smaller model"]


def _peak(case: Case, vocabulary: int) -> float:
    """Infinite for what cannot be."""
    try:
        return memory(case.model, vocabulary, case.stage, case.ranks, False, case.parallel).peak_bytes
    except PlanError:
        return float("inf")


def _batch(case: Case) -> Iterator[Change]:
    if case.stage.micro_batch > 1:
        yield "micro_batch = 1", case._replace(stage=replace(case.stage, micro_batch=1))


def _recomputing(case: Case) -> Iterator[Change]:
    now = _CHECKPOINTING.index(case.stage.activation_checkpointing)
    for kind in _CHECKPOINTING[now + 1 : 3]:
        yield f'activation_checkpointing = "{kind}"', case._replace(stage=replace(case.stage, activation_checkpointing=kind))


def _tiles(case: Case) -> Iterator[Change]:
    if case.stage.loss_chunk_tokens > 1024:
        yield "loss_chunk_tokens = 1024", case._replace(stage=replace(case.stage, loss_chunk_tokens=1024))


def _contexts(case: Case) -> Iterator[Change]:
    for size in _SIZES:
        if size > case.stage.context_parallel and size % case.stage.context_parallel == 0:
            yield f"context_parallel = {size}", case._replace(stage=replace(case.stage, context_parallel=size))


def _tensors(case: Case, most: int) -> Iterator[Change]:
    for size in _SIZES:
        parallel = replace(case.parallel, tensor=size)
        if case.parallel.tensor < size <= most and not parallel.problems(case.model):
            yield f"tensor = {size}", case._replace(parallel=parallel)


def _offloading(case: Case) -> Iterator[Change]:
    if case.stage.activation_checkpointing == "block":
        offloaded = replace(case.stage, activation_checkpointing="offloaded")
        yield 'activation_checkpointing = "offloaded"', case._replace(stage=offloaded)
    for kind in _OFFLOADS[_OFFLOADS.index(case.parallel.offload) + 1 :]:
        yield f'offload = "{kind}"', case._replace(parallel=replace(case.parallel, offload=kind))


def _types(case: Case) -> Iterator[Change]:
    if case.model.dtype == "float32":
        yield 'dtype = "bfloat16"', case._replace(model=replace(case.model, dtype="bfloat16"))


def _gpus(case: Case) -> Iterator[Change]:
    for times in _SIZES:
        yield f"{times * case.ranks} GPUs", case._replace(ranks=times * case.ranks)
