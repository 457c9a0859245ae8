"""What a policy learns from at the moment: one rollout's responses with all that was noted when they were drawn.

Whole on every rank and of one shape throughout a stage, so that a checkpoint in the middle of a rollout holds it, and any number
of ranks goes on with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from midwatch.recipe import Stage
from trainer.batches import DeviceRows, of_one, trimmed
from trainer.objectives.ppo.loss import RolloutData as Noted
from trainer.transfer import sent

_IDS = ("tokens", "targets", "segments")
_NOTED = ("old", "advantages", "returns", "old_values", "reference")


class RolloutBuffer:
    """Tensors [responses, context] on the device."""

    def __init__(self, responses: int, context: int, device: torch.device, *, critic: bool) -> None:
        self._critic = critic
        self._held = {name: torch.zeros(responses, context, dtype=torch.int64, device=device) for name in _IDS}
        noted = (name for name in _NOTED if critic or name not in ("returns", "old_values"))
        self._held |= {name: torch.zeros(responses, context, device=device) for name in ("mask", *noted)}
        self._mask: NDArray[np.float32] | None = None
        self._length: int | None = None

    @property
    def responses(self) -> int:
        return len(self._held["tokens"])

    def tensors(self) -> dict[str, Tensor]:
        """Of a checkpoint, by name, live; the same on every rank."""
        return {f"rollout.{name}": tensor for name, tensor in self._held.items()}

    def put(self, rows: DeviceRows, noted: Noted) -> None:
        """Takes a rollout's place."""
        self._mask = self._length = None
        for name, tensor in ((name, each) for part in (rows, noted) for name, each in part._asdict().items()):
            if name in self._held and tensor is not None:
                self._held[name].copy_(tensor)

    def mask(self) -> NDArray[np.float32]:
        """[responses, context]: 1 at the targets that are learned from. On the host: read once a rollout, not at every update."""
        if self._mask is None:
            self._mask = self._held["mask"].cpu().numpy()
        return self._mask

    def length(self) -> int:
        """About that of the longest response with its prompt."""
        if self._length is None:
            self._length = trimmed(self._held["segments"].to(torch.int32).cpu().numpy())
        return self._length

    def parts(self, chosen: Tensor, samples: int, size: int, length: int) -> Iterator[tuple[DeviceRows, Noted]]:
        """These responses, cut behind `length` tokens and filled up to `samples` with what weighs nothing.

        chosen: their numbers, on the host. In parts of `size`, the last one of what is left.
        """
        device = self._held["tokens"].device
        for start in range(0, samples, size):
            stop = min(start + size, samples)
            mine = sent(chosen[start:stop], device)
            missing = stop - start - len(mine)
            found = {name: torch.cat([held[mine, :length], held.new_zeros(missing, length)]) for name, held in self._held.items()}
            rows = of_one(found["tokens"], found["targets"], found["mask"], found["segments"])
            yield rows, Noted(*(found.get(name) for name in _NOTED))  # type: ignore[arg-type]  # the first two are always there


def experience_of(stage: Stage, device: torch.device) -> RolloutBuffer | None:
    """As large as the stage's rollouts; None where there are none."""
    if not stage.draws:
        return None
    count = stage.prompts_drawn * stage.rollout_settings.num_generations
    return RolloutBuffer(count, stage.context, device, critic=stage.spec.critic)
