"""Stages that make data: the policy answers prompts, the answers are sorted or mended, and become sources for later stages.

A step is a batch of prompts. What it makes lies in RUN/made/STAGE/PART-STEP-LINEAGE.jsonl as soon as it is made, to be read and
edited; a step that is taken again, after a crash or a rollback, writes its file again. When the stage ends, the files of the line
that led there become shards, in a directory of the stage's product, which the checkpoints after it name.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from midwatch.recipe import Recipe, Stage
from midwatch.recipe.stage import PARTS
from shards.build.build import build
from shards.build.report import left_out
from shards.common.errors import ShardError
from shards.spec import Build, Source
from shards.spec import TokenizerSpec as TokenizerSpec
from shards.tokenization.tokenizer import FILE_NAME as TOKENIZER_FILE
from trainer.checkpoint.dcp_files import make_below
from trainer.distributed.mesh import together
from trainer.progress import Files, checkpoint_id
from trainer.stage.training import Training

Made = dict[str, list[dict[str, Any]]]
"""Records of each part."""


def keep(training: Training, made: Mapping[str, list[dict[str, Any]]]) -> bool:
    """Writes what a step has made, on rank 0; whether it could. The step is the one that is about to be counted."""
    at, stage = training.progress, training.stage.stage
    place = directory(training.root, stage)
    number = at.stage_step + 1

    def write() -> None:
        try:
            make_below(training.root, place)
            for part in PARTS[stage.objective]:
                body = b"".join(msgspec.json.encode(record) + b"\n" for record in made.get(part, ()))
                file = place / _name(part, number, at.lineage)
                temporary = file.with_name(f".{file.name}.{os.getpid()}")
                with temporary.open("wb") as target:
                    target.write(body)
                    target.flush()
                    os.fsync(target.fileno())
                temporary.rename(file)
        except OSError as error:
            raise ShardError(f"{error.filename or place}: {error.strerror} (make room or access)") from None

    problem = together(write if training.world.is_rank_zero else _nothing, training.world, ShardError)
    if problem:
        training.hold_for_data(problem)
        return False
    if at.files and at.files[-1].lineage == at.lineage:
        at.files[-1].last = number
    else:
        at.files.append(Files(lineage=at.lineage, first=number, last=number))
    return True


def directory(root: Path, stage: Stage) -> Path:
    return root / "made" / stage.name


def _name(part: str, step: int, lineage: int) -> str:
    return f"{part}-{step:06d}-{lineage}.jsonl"


def _nothing() -> None:
    pass


def finish(training: Training) -> None:
    """Makes shards of all that the stage has made, before its product is saved. Raises ShardError, on all ranks alike."""
    at, stage = training.progress, training.stage.stage
    name = f"{stage.name}/{checkpoint_id(at)}"
    sources = [source for source in training.recipe.data.source if source.origin == "stage" and source.stage == stage.name]
    if sources and at.made.get(stage.name) != name:
        began = time.monotonic()
        training.phase("saving")

        def make() -> None:
            _shards(training, sources, training.root / "made" / name)

        problem = together(make if training.world.is_rank_zero else _nothing, training.world, ShardError)
        if problem:
            raise ShardError(problem)
        names = ", ".join(source.name for source in sources)
        training.note("info", f'stage "{stage.name}" has made {names}, in {time.monotonic() - began:.1f} s')
        for said in left_out(training.root / "made" / name):
            training.note("warning", f'stage "{stage.name}": {said}')
    at.made = at.made | {stage.name: name}


def _shards(training: Training, sources: list[Source], out: Path) -> None:
    """Of each source that this stage makes, from the files of its steps, side by side in one directory."""
    at, stage = training.progress, training.stage.stage
    shutil.rmtree(out, ignore_errors=True)
    steps = [(number, part.lineage) for part in at.files for number in range(part.first, part.last + 1)]
    found = []
    for source in sources:
        assert source.part is not None
        text = out.with_name(f"{out.name}.{source.part}.jsonl")
        with text.open("wb") as target:
            for step in steps:
                target.write((directory(training.root, stage) / _name(source.part, *step)).read_bytes())
        if not text.stat().st_size:
            raise ShardError(f'{text}: stage "{stage.name}" has made nothing of "{source.part}" (take more steps, or roll back)')
        found.append(msgspec.structs.replace(source, origin="jsonl", path=str(text), stage=None, part=None))
    data = msgspec.structs.replace(training.recipe.data, source=tuple(found))
    tokenizer = _tokenizer(training.recipe, training.data)
    build(Build(data=data, tokenizer=tokenizer, out=str(out), seed=training.recipe.run.seed), workers=0)


def _tokenizer(recipe: Recipe, data: Path) -> TokenizerSpec:
    """The run's own, brought along."""
    if recipe.tokenizer.path is not None:
        return recipe.tokenizer
    return TokenizerSpec(path=str(data / TOKENIZER_FILE), template=recipe.tokenizer.template)
