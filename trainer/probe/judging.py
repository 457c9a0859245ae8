"""What the run's reward model makes of an answer."""

from __future__ import annotations

from pathlib import Path

import torch

from midwatch.checkpoint_format import manifest
from midwatch.recipe import Recipe
from trainer.control.standalone import committed
from trainer.model.decoder import Decoder
from trainer.probe.weights import Weights


class Judge:
    """A reward model, whole, on one device."""

    def __init__(self, id: str, decoder: Decoder, context: int) -> None:
        self.id, self._decoder, self._context = id, decoder, context

    @torch.no_grad()
    def score(self, ids: list[int]) -> float | None:
        """Of a conversation; None where it is longer than what the model was trained on."""
        if not ids or len(ids) > self._context:
            return None
        tokens = torch.tensor([ids], device=next(self._decoder.parameters()).device)
        positions = torch.arange(len(ids), device=tokens.device)[None]
        found: torch.Tensor = self._decoder(tokens, positions, torch.zeros_like(tokens))
        return float(found[0, -1])


class RewardScorer:
    """Scores by the newest reward model there is; loaded when it is first wanted."""

    def __init__(self, recipe: Recipe, run: Path, device: torch.device) -> None:
        self._recipe, self._run, self._device = recipe, run, device
        self._seen: frozenset[str] = frozenset()
        self._newest: str | None = None
        self._judge: Judge | None = None

    def __call__(self, ids: list[int]) -> float | None:
        """Of a conversation; None where the run has no reward model yet. Raises CheckpointError."""
        id = self._find()
        if id is None:
            return None
        if self._judge is None or self._judge.id != id:
            self._judge = load(self._recipe, self._run, id, self._device)
        return self._judge.score(ids)

    def _find(self) -> str | None:
        """The checkpoint that ends the newest reward stage of the run; looked for anew as checkpoints come and go."""
        checkpoints = self._run / "checkpoints"
        names = [stage.name for stage in self._recipe.stage if stage.scalar]
        there = frozenset(path.name for path in checkpoints.iterdir()) if names and checkpoints.is_dir() else frozenset()
        if there != self._seen:
            self._seen, self._newest = there, None
            for directory, state in committed(checkpoints):
                ended = state["stage_name"] in names and state.get("ended")
                self._newest = directory.name if ended else self._newest
        return self._newest


def load(recipe: Recipe, run: Path, id: str, device: torch.device) -> Judge:
    """Raises CheckpointError."""
    directory = run / "checkpoints" / id
    known, _ = manifest.read(directory)
    entries = {name.removeprefix("model."): entry for name, entry in known.tensors.items() if name.startswith("model.")}
    stage = recipe.stage[recipe.stage_index(str(known.state["stage_name"]))]
    with torch.device("meta"):
        decoder = Decoder(recipe.model, entries["embedding.weight"].shape[0], scalar=True)
    dtype = torch.bfloat16 if recipe.model.dtype == "bfloat16" else torch.float32
    decoder = decoder.to(dtype).to_empty(device=device).requires_grad_(False)
    decoder.set_positions(stage.rope or recipe.model.rope, recipe.stage[0].context, stage.position_factor)
    weights = Weights(directory, entries)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.copy_(weights[name])
    return Judge(id, decoder, stage.context)
