"""AdamW over this rank's parts of the parameters, and the learning rate's schedule.

It works on plain local tensors through torch's fused kernel: the shards' layout matters to checkpoints only, and a non-finite
gradient is passed over on the device, without waiting for it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from launcher.recipe.stage import Stage
from trainer.parallel import like, local


def learning_rate(stage: Stage, settings: dict[str, float], step: int) -> float:
    """For the update after `step` updates of the stage: linear warm-up, cosine to `min_lr_ratio` of the peak, then constant.

    Loshchilov and Hutter 2017, equation 5, without restarts.
    """
    peak, floor, warm = settings["lr"], settings["min_lr_ratio"], stage.warmup_steps
    if step < warm:
        part = (step + 1) / warm
    else:
        done = min(1.0, (step - warm) / max(1, stage.steps - warm))
        part = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    return peak * part * settings["lr_scale"]


class Optimizer:
    """Moments and step counts, float32, one of each a parameter; matrices decay, norms do not.

    Loshchilov and Hutter 2019, algorithm 2. `skipped` counts the updates passed over since the run's beginning.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], device: torch.device) -> None:
        self._parameters = dict(named)
        self._device = device
        self.skipped = torch.zeros((), dtype=torch.float32, device=device)
        self._parts = {name: local(parameter) for name, parameter in self._parameters.items()}
        self._first = {name: torch.zeros_like(part) for name, part in self._parts.items()}
        self._second = {name: torch.zeros_like(part) for name, part in self._parts.items()}
        self._steps = torch.zeros(len(self._parts), dtype=torch.float32, device=device)
        self._counts = dict(zip(self._parts, self._steps.unbind(), strict=True))

    def reset(self) -> None:
        """As a stage begins: no moments, no steps."""
        for tensor in (*self._first.values(), *self._second.values(), self._steps):
            tensor.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """All state, under its names in a checkpoint; sharded as the parameters are."""
        found = {"optimizer.steps": self._steps, "optimizer.skipped": self.skipped}
        for name, parameter in self._parameters.items():
            found[f"optimizer.first.{name}"] = like(parameter, self._first[name])
            found[f"optimizer.second.{name}"] = like(parameter, self._second[name])
        return found

    def squared_norm(self) -> Tensor:
        """Of this rank's part of the gradient; to be summed over ranks."""
        gradients = [local(p.grad) for p in self._parameters.values() if p.grad is not None]
        norms = torch._foreach_norm([g for g in gradients if g.numel()])
        return torch.stack([norm.float() for norm in norms]).square().sum() if norms else torch.zeros((), device=self._device)

    @torch.no_grad()
    def update(self, settings: dict[str, float], lr: float, eps: float, norm: Tensor) -> None:
        """Clips by the whole gradient's norm and steps; leaves everything as it is if the norm is not finite."""
        bad = (~torch.isfinite(norm)).float()
        self.skipped += bad
        shrink = (settings["clip"] / (norm + 1e-6)).clamp(max=1.0)
        named = [(name, local(p.grad)) for name, p in self._parameters.items() if p.grad is not None]
        torch._foreach_mul_([gradient for _, gradient in named], shrink)
        for decays in (True, False):
            group = [(name, g) for name, g in named if (self._parameters[name].ndim > 1) == decays and g.numel()]
            if not group:
                continue
            adamw(
                [self._parts[name] for name, _ in group],
                [gradient for _, gradient in group],
                [self._first[name] for name, _ in group],
                [self._second[name] for name, _ in group],
                [],
                [self._counts[name] for name, _ in group],
                fused=True,
                found_inf=bad,
                amsgrad=False,
                beta1=settings["beta1"],
                beta2=settings["beta2"],
                lr=lr,
                weight_decay=settings["weight_decay"] if decays else 0.0,
                eps=eps,
                maximize=False,
            )
        for parameter in self._parameters.values():
            parameter.grad = None


def total(values: Tensor) -> Tensor:
    """Summed over all ranks, in place, without waiting for the device."""
    dist.all_reduce(values)
    return values
