"""AdamW over this rank's parts of the parameters, and the learning rate's schedule.

It works on plain local tensors through torch's fused kernel: the shards' layout matters to checkpoints only, and a non-finite
gradient is passed over on the device, without waiting for it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from midwatch.recipe.stage import Stage
from trainer.distributed.mesh import copies, like, local
from trainer.transfer import host_memory, on_device

STREAMED = 8
"""Parameters whose moments are fetched at a time from the host's memory."""


def learning_rate(stage: Stage, settings: dict[str, float], step: int, peak_of: str = "lr") -> float:
    """For the update after `step` updates of the stage: linear warm-up, cosine to `min_lr_ratio` of the peak, then constant.

    Loshchilov and Hutter 2017, equation 5, without restarts. peak_of: the setting that is the peak.
    """
    peak, floor, warm = settings[peak_of], settings["min_lr_ratio"], stage.resolved_warmup_steps
    if step < warm:
        part = (step + 1) / warm
    else:
        done = min(1.0, (step - warm) / max(1, stage.steps - warm))
        part = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
    return peak * part * settings["lr_scale"]


class Optimizer:
    """Moments of each parameter, in float32; matrices decay, norms do not.

    Loshchilov and Hutter 2019, algorithm 2. `skipped` counts the updates passed over since the run's beginning.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        device: torch.device,
        owned: Collection[str] | None = None,
        offload: bool = False,
        streamed: bool | None = None,
    ) -> None:
        """owned: names of those whose gradients count here, where others count on another rank. offload: moments to the host.

        streamed: whether moments are fetched for an update, a few parameters at a time; None: where they are another memory's.
        """
        self._parameters, self._device = dict(parameters), device
        self.skipped = torch.zeros((), dtype=torch.float32, device=device)
        self._step = torch.zeros((), dtype=torch.float32, device=device)
        """Updates taken in this stage."""
        self._parts = {name: local(parameter) for name, parameter in self._parameters.items()}
        self._weights = {name: 1 / copies(self._parameters[name]) for name in self._parts if owned is None or name in owned}
        """Of each gradient's square in the whole norm's; together the ranks that have it count it once."""
        self._streamed = offload and device.type == "cuda" if streamed is None else streamed
        self._first = {name: self._moment(part) for name, part in self._parts.items()}
        self._second = {name: self._moment(part) for name, part in self._parts.items()}

    def _moment(self, part: Tensor) -> Tensor:
        if self._streamed:
            return host_memory(part.nbytes, pinned=self._device.type == "cuda").view(part.dtype).view(part.shape)
        return torch.zeros_like(part)

    def reset(self) -> None:
        """As a stage begins: no moments, no steps."""
        self._arrive()
        for tensor in (*self._first.values(), *self._second.values(), self._step):
            tensor.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """All state, under its names in a checkpoint; sharded as the parameters are."""
        self._arrive()
        found = {"optimizer.step": self._step, "optimizer.skipped": self.skipped}
        for name, parameter in self._parameters.items():
            found[f"optimizer.first.{name}"] = like(parameter, self._first[name])
            found[f"optimizer.second.{name}"] = like(parameter, self._second[name])
        return found

    def _arrive(self) -> None:
        """Waits for moments that are on their way back to the host, which is about to look at them."""
        if self._streamed and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def squared_norm(self) -> Tensor:
        """Of this rank's part of the gradient; to be summed over ranks."""
        found = [(self._weights[name], gradient) for name, gradient in self._gradients() if name in self._weights]
        if not found:
            return torch.zeros((), device=self._device)
        norms = torch.stack([norm.float() for norm in torch._foreach_norm([gradient for _, gradient in found])])
        weights = on_device([weight for weight, _ in found], torch.float32, norms.device)
        return (norms.square() * weights).sum().to(self._device)

    @torch.no_grad()
    def update(self, settings: dict[str, float], lr: float, eps: float, norm: Tensor) -> None:
        """Clips by the whole gradient's norm and steps; leaves everything as it is if the norm is not finite."""
        bad = (~torch.isfinite(norm)).float()
        self.skipped += bad
        shrink = (settings["max_grad_norm"] / (norm + 1e-6)).clamp(max=1.0)
        named = self._gradients()
        if named:
            place = named[0][1].device
            torch._foreach_mul_([gradient for _, gradient in named], shrink.to(place))
            at, passed = self._step.to(place), bad.to(place)
            for decays in (True, False):
                group = [(name, gradient) for name, gradient in named if (self._parameters[name].ndim > 1) == decays]
                decay = settings["weight_decay"] if decays else 0.0
                for start in range(0, len(group), self._stride(len(group))):
                    part = group[start : start + self._stride(len(group))]
                    self._adamw(part, at, passed, (settings["beta1"], settings["beta2"]), lr, decay, eps)
        self._step += 1 - bad
        for parameter in self._parameters.values():
            parameter.grad = None

    def _stride(self, count: int) -> int:
        """Parameters that are updated at a time: all, or a few where their moments have to be fetched."""
        return STREAMED if self._streamed else max(1, count)

    def _adamw(
        self,
        group: Sequence[tuple[str, Tensor]],
        at: Tensor,
        bad: Tensor,
        betas: tuple[float, float],
        lr: float,
        decay: float,
        eps: float,
    ) -> None:
        moments = [[held[name] for name, _ in group] for held in (self._first, self._second)]
        used = moments
        if self._streamed:
            used = [[moment.to(self._device, non_blocking=True, copy=True) for moment in each] for each in moments]
        if group:
            adamw(
                [self._parts[name] for name, _ in group],
                [gradient for _, gradient in group],
                used[0],
                used[1],
                [],
                list(at.repeat(len(group)).unbind()),
                fused=True,
                found_inf=bad,
                amsgrad=False,
                beta1=betas[0],
                beta2=betas[1],
                lr=lr,
                weight_decay=decay,
                eps=eps,
                maximize=False,
            )
        if self._streamed:
            for kept, new in zip(moments, used, strict=True):
                for moment, value in zip(kept, new, strict=True):
                    moment.copy_(value, non_blocking=True)

    def _gradients(self) -> list[tuple[str, Tensor]]:
        """This rank's parts of them, but for empty ones."""
        found = [(name, local(p.grad)) for name, p in self._parameters.items() if p.grad is not None]
        return [(name, gradient) for name, gradient in found if gradient.numel()]


def total(values: Tensor) -> Tensor:
    """Summed over all ranks, in place, without waiting for the device."""
    dist.all_reduce(values)
    return values
