"""What a forward keeps for its backward, and what it computes again instead: activation checkpointing (Chen et al. 2016)."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from trainer.model.offloading import buffers_of, on_host

Mode = Literal["none", "selective", "block", "offloaded"]

_aten = torch.ops.aten
_KEPT = {
    _aten.mm.default,
    _aten.addmm.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}
"""Dear to compute and cheap to keep: Korthikanti et al. 2022, section 5, the other way round."""
_passing = False


def checkpointed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The function of x, of which only x is kept."""
    found: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return found


def recomputed(mode: Mode, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The function of x; for its backward is kept what the mode says."""
    if mode == "none" or not torch.is_grad_enabled():
        return function(x)
    if mode == "selective":
        contexts = functools.partial(create_selective_checkpoint_contexts, _policy)
        found: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
        return found
    if mode == "offloaded" and x.device.type != "cpu":
        # The compiler does not trace our own hooks.
        kept = save_on_cpu(pin_memory=x.is_cuda) if torch.compiler.is_compiling() else on_host(buffers_of(x.device))
        with kept:
            return checkpointed(function, x)
    return checkpointed(function, x)


@contextlib.contextmanager
def skip_saving(wanted: bool = True) -> Iterator[None]:
    """Where wanted, nothing that is computed meanwhile is kept by "selective": its backward does not look at it."""
    global _passing
    before, _passing = _passing, _passing or wanted
    try:
        yield
    finally:
        _passing = before


def _policy(ctx: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = not _passing and (operation in _KEPT or operation.namespace in ("flash_attn", "torch_attn"))
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
