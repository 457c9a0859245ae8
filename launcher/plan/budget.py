"""How large a model and how many tokens a compute budget allows: Chinchilla's rule.

Hoffmann et al. 2022 (Chinchilla) find that parameters N and tokens D should grow alike. The rule of thumb drawn from it is
used here: D = 20 N, with C = 6 N D operations (Kaplan et al. 2020), so N = sqrt(C / 120). N counts all parameters.
"""

from __future__ import annotations

import math

import msgspec

from launcher.plan.accelerators import Accelerator, Precision
from launcher.plan.units import PlanError

TOKENS_A_PARAMETER = 20.0
FLOPS_A_PARAMETER_AND_TOKEN = 6.0
SECONDS_A_DAY = 86_400.0


class TrainingState(msgspec.Struct, frozen=True):
    """Float32 training state of a model, over all ranks together: AdamW keeps two moments."""

    weights_bytes: float
    gradients_bytes: float
    optimizer_bytes: float

    @property
    def total_bytes(self) -> float:
        return self.weights_bytes + self.gradients_bytes + self.optimizer_bytes


class TrainingBudget(msgspec.Struct, frozen=True):
    """A size, its tokens, and what training takes."""

    parameters: float
    tokens: float
    tokens_per_parameter: float
    verdict: str
    flops: float
    days: float
    gpu_hours: float
    cost_usd: float
    gpus: int
    gpu: Accelerator
    precision: Precision
    mfu: float
    best_parameters: float
    """Chinchilla's for these operations."""
    best_tokens: float
    state: TrainingState
    state_bytes_per_gpu: float
    """Sharded over all GPUs; activations come on top."""


def state(parameters: float) -> TrainingState:
    """Weights and gradients of 4 bytes a parameter, optimizer of 8: 70B have 280 GB of weights and 560 GB of optimizer.

    Rajbhandari et al. 2020 (ZeRO), section 3.1, without the half-precision copies, which live only as long as a block computes.
    """
    return TrainingState(4.0 * parameters, 4.0 * parameters, 8.0 * parameters)


def best_size(flops: float) -> tuple[float, float]:
    """Parameters and tokens that use these operations best, by the rule of 20."""
    parameters = math.sqrt(flops / (FLOPS_A_PARAMETER_AND_TOKEN * TOKENS_A_PARAMETER))
    return parameters, TOKENS_A_PARAMETER * parameters


def verdict(tokens_per_parameter: float) -> str:
    """How tokens a parameter stand to Chinchilla's 20."""
    ratio = tokens_per_parameter / TOKENS_A_PARAMETER
    if ratio < 0.5:
        return "far below Chinchilla's 20 (undertrained for its size)"
    if ratio < 0.8:
        return "below Chinchilla's 20 (a smaller model would reach the same for less)"
    if ratio <= 1.25:
        return "about Chinchilla's 20 (the best size for its training compute)"
    return "above Chinchilla's 20 (as Llama 3 does: dearer to train than need be, cheaper to serve)"


def plan_budget(
    gpu: Accelerator,
    gpus: int,
    mfu: float,
    *,
    precision: Precision = "bfloat16",
    days: float | None = None,
    parameters: float | None = None,
    tokens: float | None = None,
) -> TrainingBudget:
    """From the days, the size, the tokens, or two of them; what is left out follows. Raises PlanError.

    Days alone give Chinchilla's best size and tokens; a size alone its 20 tokens a parameter, tokens alone the size that they
    suit; days with a size the tokens that fit in, days with tokens the size.
    """
    if days is not None and parameters is not None and tokens is not None:
        raise PlanError("--days, --params and --tokens: give two of them, the third follows")
    per_day = gpu.flops_per_second(precision) * gpus * mfu * SECONDS_A_DAY
    if days is not None:
        flops = days * per_day
        if parameters is not None:
            tokens = flops / (FLOPS_A_PARAMETER_AND_TOKEN * parameters)
        elif tokens is not None:
            parameters = flops / (FLOPS_A_PARAMETER_AND_TOKEN * tokens)
        else:
            parameters, tokens = best_size(flops)
    elif parameters is not None:
        tokens = TOKENS_A_PARAMETER * parameters if tokens is None else tokens
    elif tokens is not None:
        parameters = tokens / TOKENS_A_PARAMETER
    if parameters is None or tokens is None:
        raise PlanError("give a recipe, or a budget: --days 14, --params 7B, --tokens 2T, or two of these")
    flops = FLOPS_A_PARAMETER_AND_TOKEN * parameters * tokens
    hours = flops / per_day * 24 * gpus
    best = best_size(flops)
    held = state(parameters)
    return TrainingBudget(
        parameters=parameters,
        tokens=tokens,
        tokens_per_parameter=tokens / parameters,
        verdict=verdict(tokens / parameters),
        flops=flops,
        days=flops / per_day,
        gpu_hours=hours,
        cost_usd=hours * gpu.usd_per_hour,
        gpus=gpus,
        gpu=gpu,
        precision=precision,
        mfu=mfu,
        best_parameters=best[0],
        best_tokens=best[1],
        state=held,
        state_bytes_per_gpu=held.total_bytes / gpus,
    )
