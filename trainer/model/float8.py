"""Matrix products in float8, by torchao: e4m3 forward, e5m2 for gradients (Micikevicius et al. 2022), sums in higher precision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from midwatch.recipe.load import RecipeError


def float8_product(scaling: str, device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """In place of `F.linear` without a bias. scaling: "tensorwise" or "rowwise".

    Where the device has no float8 (CPUs, GPUs before Ada) products are of numbers rounded to float8. Raises RecipeError where
    torchao is not installed.
    """
    try:
        from torchao.float8 import Float8LinearConfig
        from torchao.float8.float8_linear import matmul_with_hp_or_float8_args
        from torchao.float8.float8_training_tensor import LinearMMConfig, ScaledMMConfig
    except ImportError:
        raise RecipeError('[model] float8 needs the package `torchao` (pip install torchao), or float8 = "none"') from None
    has = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)
    config = Float8LinearConfig.from_recipe_name(scaling)
    products = (config.gemm_config_output, config.gemm_config_grad_input, config.gemm_config_grad_weight)
    ways = [ScaledMMConfig(not has, each.use_fast_accum, False, config.pad_inner_dim) for each in products]
    return functools.partial(_product, matmul_with_hp_or_float8_args, LinearMMConfig(*ways), config)


def _product(kernel: Any, ways: Any, config: Any, x: Tensor, weight: Tensor) -> Tensor:
    found: Tensor = kernel.apply(x, weight.t(), ways, config)
    return found
