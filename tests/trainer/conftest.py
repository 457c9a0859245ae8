"""Shards of real text and a tiny recipe, built once; run directories made from them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from trainer_harness import MakeRun, Step, steer, torchrun, write_recipe

from midwatch.protocol import Op
from midwatch.recipe import Recipe, parse_recipe
from shards.build.build import build
from shards.spec import Build

# Files of tests run side by side; threads that wait for each other's cores take many times as long as one thread does.
torch.set_num_threads(1)

RECIPE = """
[run]
name = "tiny"
[model]
num_layers = 2
hidden_size = 32
num_heads = 4
num_kv_heads = 2
intermediate_size = 64
[tokenizer]
vocab = 512
sample_bytes = 150000
[data]
held_out = 0.1
[[data.source]]
name = "topics"
kind = "text"
origin = "stdlib-topics"
max_tokens = 60000
[[data.source]]
name = "docs"
kind = "text"
origin = "stdlib-docs"
max_tokens = 60000
[[data.source]]
name = "ask"
kind = "sft"
origin = "stdlib-sft"
max_documents = 120
[[data.source]]
name = "prefer"
kind = "preference"
origin = "stdlib-preference"
max_documents = 80
[checkpoint]
every = 4
[[stage]]
name = "pretrain"
objective = "pretrain"
steps = 12
context = 32
global_batch = 6
micro_batch = 2
lr = 1e-2
warmup_steps = 2
eval_samples = 4
eval_every = 5
mixture = {topics = 2, docs = 1}
prompts = ["The import statement"]
sample_tokens = 6
[[stage]]
name = "extend"
objective = "pretrain"
steps = 6
context = 64
global_batch = 4
lr = 3e-3
eval_samples = 4
mixture = {topics = 1}
rope = {kind = "yarn", factor = 2}
[[stage]]
name = "sft"
objective = "sft"
steps = 6
context = 96
global_batch = 4
lr = 3e-3
eval_samples = 4
mixture = {ask = 1}
prompts = ["What does this Python function do?"]
sample_tokens = 6
[[stage]]
name = "dpo"
objective = "dpo"
steps = 6
context = 96
global_batch = 4
micro_batch = 2
lr = 1e-3
eval_samples = 4
mixture = {prefer = 1}
sample_tokens = 6
"""


@pytest.fixture(scope="session")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """The tiny pipeline, its shards built."""
    parsed = parse_recipe(RECIPE, base=Path.cwd())
    place = tmp_path_factory.mktemp("data")
    build(Build(data=parsed.data, tokenizer=parsed.tokenizer, out=str(place), seed=0), workers=0)
    return msgspec.structs.replace(parsed, data=msgspec.structs.replace(parsed.data, dir=str(place)))


@pytest.fixture(scope="session")
def quiet(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first stage, undisturbed; not to be changed."""
    root = write_recipe(tmp_path_factory.mktemp("quiet") / "run", msgspec.structs.replace(recipe, stage=recipe.stage[:1]))
    steer(root)
    return root


@pytest.fixture(scope="session")
def _stopped(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = write_recipe(tmp_path_factory.mktemp("stopped") / "run", msgspec.structs.replace(recipe, stage=recipe.stage[:1]))
    steer(root, Step(Op.STOP, after=6))
    return root


@pytest.fixture
def stopped(_stopped: Path, tmp_path: Path) -> Path:
    """The first stage, stopped by order 1 after step 7, with the checkpoints 4-1 and 7-1."""
    return Path(shutil.copytree(_stopped, tmp_path / "stopped"))


@pytest.fixture(scope="session")
def finished(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole pipeline, undisturbed, by torchrun; not to be changed."""
    root = write_recipe(tmp_path_factory.mktemp("finished") / "run", recipe)
    process = torchrun(root)
    said, _ = process.communicate(timeout=120)
    (root / "said").write_text(said)
    assert process.returncode == 0, said
    return root


@pytest.fixture
def make_run(recipe: Recipe, tmp_path: Path) -> MakeRun:
    """Makes a run directory: `stages` keeps the first so many; other arguments replace values of every kept stage."""

    def make(name: str = "run", stages: int = 1, checkpoint: dict[str, Any] | None = None, **changes: Any) -> Path:
        kept = tuple(msgspec.structs.replace(stage, **changes) for stage in recipe.stage[:stages])
        changed = msgspec.structs.replace(
            recipe, stage=kept, checkpoint=msgspec.structs.replace(recipe.checkpoint, **(checkpoint or {}))
        )
        return write_recipe(tmp_path / name, changed)

    return make
