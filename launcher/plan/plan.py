"""The figures of a recipe's plan, each with its unit in its name; `midwatch plan RECIPE --json` prints them as they are."""

from __future__ import annotations

import msgspec

from launcher.plan.accelerators import Accelerator, Precision
from launcher.plan.memory import Memory
from launcher.plan.mesh import Mesh
from launcher.plan.pipeline import Bubble


class Assumptions(msgspec.Struct, frozen=True):
    """What the recipe does not say."""

    gpu: str | None = None
    """An accelerator's name; None: the processor for a recipe that asks for it, else the usual one."""
    gpus: int | None = None
    """None: the recipe's ranks, all nodes present."""
    mfu: float = 0.4
    """Part of the peak rate that model FLOPs come to."""
    usd_per_hour: float | None = None
    precision: Precision | None = None
    """None: the recipe's compute type."""
    pipeline: int | None = None
    """None: the recipe's, and its parts of the layers."""
    micro_batches: int | None = None
    """None: the stage's own, on the ranks that are left when the pipeline has taken its own."""
    virtual: int | None = None
    """None: the recipe's, or 1 with a `pipeline`."""


class ParameterCounts(msgspec.Struct, frozen=True):
    total: int
    blocks: int
    embedding: int
    """Embedding, output layer (once where they are tied), table of positions and norms outside the blocks."""
    in_matrices: int
    """What each token is multiplied with."""


class Factors(msgspec.Struct, frozen=True):
    """What grows between two stages, and by how much. A change of context by x changes attention a sequence by x squared."""

    before: str
    after: str
    length: float
    kv_cache_per_sequence: float
    activations_per_sequence: float
    attention_flops_per_sequence: float
    attention_flops_per_token: float
    flops_per_token: float


class StagePlan(msgspec.Struct, frozen=True):
    name: str
    objective: str
    context_tokens: int
    steps: int
    tokens_per_step: int
    tokens: int
    """Positions that the stage computes, padding of unequal shares left out."""
    flops_per_token: float
    attention_share: float
    """Of the model FLOPs."""
    flops_per_step: float
    """All ranks; DPO's reference and the rows that fill up unequal shares included."""
    flops: float
    kv_cache_bytes_per_sequence: int
    mesh: Mesh
    memory_per_gpu: Memory
    """Of the rank that holds the most."""
    room_bytes: int | None
    """Memory of the device, where it is known."""
    fits: bool | None
    """None: the device's memory is not known."""
    bubble: Bubble | None
    step_seconds: float
    tokens_per_second: float
    """All ranks together."""
    seconds: float
    gpu_hours: float
    cost_usd: float
    cost_to_pretraining: float | None
    """Over that of the first pretraining stage."""


class Tokens(msgspec.Struct, frozen=True):
    """Pretraining held against Chinchilla's rule: 20 tokens a parameter."""

    pretraining_tokens: int
    tokens_per_parameter: float
    verdict: str
    chinchilla_tokens: float
    """For this size."""
    same_flops_parameters: float
    """Chinchilla's for the operations of pretraining, 6 N D."""
    same_flops_tokens: float


class Plan(msgspec.Struct, frozen=True):
    run: str
    vocabulary: int
    gpu: Accelerator
    gpu_assumed: bool
    gpus: int
    precision: Precision
    peak_flops_per_second_per_gpu: float
    mfu: float
    parameters: ParameterCounts
    kv_cache_bytes_per_token: int
    stages: tuple[StagePlan, ...]
    factors: tuple[Factors, ...]
    tokens: Tokens | None
    """None: nothing is pretrained."""
    seconds: float
    gpu_hours: float
    cost_usd: float
    notes: tuple[str, ...]
