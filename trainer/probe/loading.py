"""A checkpoint, whole, on one device: its weights, verified as they are read, its tokenizer, its stage's positions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from midwatch.checkpoint_format import manifest
from midwatch.checkpoint_format.directory import GOLDEN
from midwatch.checkpoint_format.manifest import CheckpointError
from midwatch.protocol import ProbeAsk, ProbeTurn
from midwatch.recipe import Recipe, Stage
from shards.tokenization.tokenizer import FILE_NAME as TOKENIZER_FILE
from shards.tokenization.tokenizer import Tokenizer
from trainer.control.standalone import committed
from trainer.generate import Engine, Request
from trainer.probe.weights import Weights
from trainer.progress import TrainProgress, from_manifest

RUNNING = 8
"""Answers at a time; more wait."""
CACHED_TOKENS = 32_768
"""Room in the KV cache, where four whole contexts are not less and one is not more."""
MOST_ALTERNATIVES = 50
PAGES = {"cpu": 16, "cuda": 256}
"""Tokens of a page."""


@dataclass
class Loaded:
    """A checkpoint that can be asked."""

    stage: Stage
    tokenizer: Tokenizer
    engine: Engine

    def form(self, ask: ProbeAsk) -> Literal["chat", "text"]:
        if ask.form == "auto":
            return "text" if self.stage.spec.by_text else "chat"
        return ask.form

    def request(self, ask: ProbeAsk, turns: tuple[ProbeTurn, ...]) -> Request:
        """turns: what was said before, to this checkpoint."""
        if self.form(ask) == "chat":
            said = [*((turn.role, turn.text) for turn in turns), ("user", ask.prompt)]
            prompt, _ = self.tokenizer.chat(said)
        else:
            prompt = self.tokenizer.prompt(ask.prompt)
        return Request(
            prompt=tuple(prompt),
            limit=ask.limit,
            temperature=ask.temperature,
            top_p=ask.top_p,
            top_k=ask.top_k,
            seed=ask.seed,
            stops=frozenset(self.tokenizer.stops),
            stop_strings=ask.stop_strings,
            alternatives=min(ask.alternatives, MOST_ALTERNATIVES),
        )


def load(recipe: Recipe, run: Path, id: str, device: torch.device) -> Loaded:
    """Raises CheckpointError and ShardError."""
    directory = run / "checkpoints" / id
    known, _ = manifest.read(directory)
    progress = from_manifest(known.state, str(directory), recipe)
    tokenizer = _tokenizer(recipe, run, directory, progress)
    entries = {name.removeprefix("model."): entry for name, entry in known.tensors.items() if name.startswith("model.")}
    if "embedding.weight" not in entries:
        raise CheckpointError(f"{directory}: holds no whole model (use another checkpoint)")
    stage = recipe.stage[progress.stage]
    if stage.scalar:
        raise CheckpointError(
            f"{directory}: holds a reward model, which scores texts and writes none (use another stage's checkpoint)"
        )
    context = max(each.context for each in recipe.stage[: progress.stage + 1])
    page = PAGES.get(device.type, PAGES["cpu"])
    engine = Engine(
        recipe.model,
        entries["embedding.weight"].shape[0],
        device,
        context,
        pages=math.ceil(max(context, min(4 * context, CACHED_TOKENS)) / page),
        page=page,
        running=RUNNING,
        decode=tokenizer.decode,
    )
    needed = {name: tuple(parameter.shape) for name, parameter in engine.runner.decoder.named_parameters()}
    for name, shape in needed.items():
        if name not in entries or entries[name].shape != shape:
            raise CheckpointError(f"{directory}: its {name} is not that of this recipe's model (use another checkpoint)")
    engine.set_rope(stage.rope or recipe.model.rope, recipe.stage[0].context, stage.position_factor)
    engine.refresh(Weights(directory, {name: entries[name] for name in needed}).items(), progress.step)
    return Loaded(stage, tokenizer, engine)


def find(run: Path, name: str) -> str:
    """The id of a checkpoint, or of the `newest`, or of the newest `golden` one. Raises CheckpointError.

    A controller has found the id already; without one there is no journal to say which lineage is in force.
    """
    if "/" not in name and not name.startswith(".") and (run / "checkpoints" / name).is_dir():
        return name
    found = [directory for directory, _ in committed(run / "checkpoints")]
    wanted = {"newest": found, "golden": [directory for directory in found if (directory / GOLDEN).exists()]}.get(name)
    if wanted:
        return wanted[-1].name
    there = ", ".join(directory.name for directory in found[-8:]) or "none"
    raise CheckpointError(f'{run}: there is no checkpoint "{name}" (there are: {there})')


def _tokenizer(recipe: Recipe, run: Path, directory: Path, progress: TrainProgress) -> Tokenizer:
    file = (Path(recipe.data.dir) if recipe.data.dir is not None else run / "data") / TOKENIZER_FILE
    tokenizer = Tokenizer.load(file)
    if progress.origin.tokenizer and tokenizer.hash != progress.origin.tokenizer:
        raise CheckpointError(f"{file}: is not the tokenizer that {directory.name} was trained with (put that one back)")
    return tokenizer
