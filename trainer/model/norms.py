"""RMSNorm and LayerNorm over the width, their weights held by tensor-parallel ranks alike."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from midwatch.recipe.model import Model
from trainer.distributed.sequence_parallel import held


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, equation 4; computed in float32, and rounded once.

    By torch's own kernel, but for a CPU, where torch has none: it goes step by step and keeps what each step gave.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        weight = held(self.weight, partial=True)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():  # a compiler joins the steps by itself
            return cast(Tensor, _RMSNorm.apply(x, weight, self.eps))  # type: ignore[no-untyped-call]  # torch's is untyped
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps its input and a number a token, and goes back by LayerNorm's kernel, to which a mean of zero is given.

    That takes the mean of the normalized input's gradient off the result, which is then added again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        out: Tensor = (x * scale).mul_(weight)
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        width, kind = x.shape[-1], x.dtype
        gradient, x, wide = gradient.contiguous().to(scale.dtype), x.to(scale.dtype), weight.to(scale.dtype)
        of_x, of_weight, _ = torch.ops.aten.native_layer_norm_backward(
            gradient, x, [width], torch.zeros_like(scale), scale, wide, None, [True, True, False]
        )
        of_x.add_((gradient @ wide)[..., None].mul_(scale).div_(width))
        return of_x.to(kind), of_weight.to(weight.dtype), None


class LayerNorm(nn.LayerNorm):
    """Ba et al. 2016, equation 4."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else held(self.bias, partial=True)
        return F.layer_norm(x, self.normalized_shape, held(self.weight, partial=True), bias, self.eps)


def make_norm(config: Model) -> nn.Module:
    if config.norm == "rmsnorm":
        return RMSNorm(config.hidden_size, config.norm_eps)
    return LayerNorm(config.hidden_size, config.norm_eps, bias=config.bias)
