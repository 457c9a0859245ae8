"""The pipeline bubble: the part of a step in which a stage of the pipeline has nothing to do."""

from __future__ import annotations

import msgspec

from launcher.plan.units import PlanError


class Bubble(msgspec.Struct, frozen=True):
    pipeline: int
    """Stages of the pipeline, each on ranks of its own."""
    micro_batches: int
    virtual: int
    """Parts of the model that each pipeline stage holds; 1: not interleaved."""
    share_of_step: float
    """Idle time over the step's."""
    over_ideal_time: float
    """Idle time over the time without any."""


def bubble(pipeline: int, micro_batches: int, virtual: int = 1) -> Bubble:
    """Under 1F1B, interleaved where `virtual` is above 1 (Narayanan et al. 2021, sections 2.2.1 and 2.2.2).

    Over the ideal time it is (P - 1) / (V M), so of the step it is (P - 1) / (V M + P - 1). Raises PlanError.
    """
    for name, value in (("--pipeline", pipeline), ("--micro-batches", micro_batches), ("--virtual", virtual)):
        if value < 1:
            raise PlanError(f"{name}: {value} must be at least 1")
    if virtual > 1 and micro_batches % pipeline:
        up = -(-micro_batches // pipeline) * pipeline
        raise PlanError(
            f"--virtual {virtual}: the interleaved schedule takes a multiple of {pipeline} micro-batches, not {micro_batches} "
            f"(use {up}, or --virtual 1)"
        )
    idle, work = pipeline - 1, virtual * micro_batches
    return Bubble(pipeline, micro_batches, virtual, idle / (work + idle), idle / work)
