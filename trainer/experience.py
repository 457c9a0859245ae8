"""What a policy learns from at the moment: one rollout's responses with all that was noted when they were drawn.

Whole on every rank and of one shape throughout a stage, so that a checkpoint in the middle of a rollout holds it, and any number
of ranks goes on with it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from launcher.recipe import Stage
from trainer.batch import Rows, of_one, trimmed
from trainer.objectives.ppo import Experience as Noted

_IDS = ("tokens", "targets", "segments")
_NOTED = ("old", "advantages", "returns", "old_values", "reference")


class Experience:
    """Tensors [responses, context] on the device."""

    def __init__(self, responses: int, context: int, device: torch.device, *, critic: bool) -> None:
        self._critic = critic
        self._held = {name: torch.zeros(responses, context, dtype=torch.int64, device=device) for name in _IDS}
        noted = (name for name in _NOTED if critic or name not in ("returns", "old_values"))
        self._held |= {name: torch.zeros(responses, context, device=device) for name in ("mask", *noted)}

    @property
    def responses(self) -> int:
        return len(self._held["tokens"])

    def tensors(self) -> dict[str, Tensor]:
        """Of a checkpoint, by name, live; the same on every rank."""
        return {f"rollout.{name}": tensor for name, tensor in self._held.items()}

    def put(self, rows: Rows, noted: Noted) -> None:
        """Takes a rollout's place."""
        for name, tensor in ((name, each) for part in (rows, noted) for name, each in part._asdict().items()):
            if name in self._held and tensor is not None:
                self._held[name].copy_(tensor)

    def weight(self, chosen: Tensor) -> int:
        """Tokens of these responses; chosen: their numbers."""
        return int(self._held["mask"][chosen].sum())

    def length(self) -> int:
        """About that of the longest response with its prompt."""
        return trimmed(self._held["segments"].to(torch.int32).cpu().numpy())

    def parts(self, chosen: Tensor, samples: int, size: int, length: int) -> Iterator[tuple[Rows, Noted]]:
        """These responses, cut behind `length` tokens and filled up to `samples` with what weighs nothing.

        In parts of `size`, the last one of what is left.
        """
        for start in range(0, samples, size):
            stop = min(start + size, samples)
            mine = chosen[start:stop]
            missing = stop - start - len(mine)
            found = {name: torch.cat([held[mine, :length], held.new_zeros(missing, length)]) for name, held in self._held.items()}
            rows = of_one(found["tokens"], found["targets"], found["mask"], found["segments"])
            yield rows, Noted(*(found.get(name) for name in _NOTED))  # type: ignore[arg-type]  # the first two are always there


def experience_of(stage: Stage, device: torch.device) -> Experience | None:
    """As large as the stage's rollouts; None where there are none."""
    if not stage.draws:
        return None
    count = stage.prompts_drawn * stage.rollout.responses
    return Experience(count, stage.context, device, critic=stage.objective == "ppo")
