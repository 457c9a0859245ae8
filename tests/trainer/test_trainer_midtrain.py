"""Mid-training as recipes/midtrain.toml has it, made small: a base of one source learns two others and is asked what it forgot."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import msgspec
import pytest
from trainer_harness import MakeRun, Told, steer, write_recipe

from midwatch.recipe import Recipe, load_recipe
from shards.build.build import build
from shards.spec import Build
from tests.hugging_face import RECIPES, at_hand
from tests.miniature import miniature
from trainer.huggingface.export import export

SOURCES = {
    "general": {"origin": "stdlib-topics", "max_tokens": 60_000},
    "german": {"origin": "stdlib-docs", "max_tokens": 60_000},
    "medicine": {"origin": "stdlib-code", "max_tokens": 30_000},
}
STEPS = 12


@pytest.fixture
def run(make_run: MakeRun, tmp_path: Path) -> Path:
    """The recipe at 1:128, beginning from a base that has read one source alone, its shards built."""
    base = make_run(
        "base", steps=40, global_batch=8, micro_batch=4, context=64, mixture={"topics": 1.0}, prompts=(), eval_every=100
    )
    steer(base)
    file = at_hand(RECIPES / "midtrain.toml", tmp_path)
    shutil.rmtree(tmp_path / "Llama-3.1-8B")
    export(base, "latest", tmp_path / "Llama-3.1-8B")
    small = miniature(load_recipe(file), SOURCES, length=128, steps=STEPS, batch=4, rate=10.0, eval_every=6)
    data = msgspec.structs.replace(small.data, dir=str(tmp_path / "data"))
    build(Build(data=data, tokenizer=small.tokenizer, out=str(tmp_path / "data"), seed=0), workers=0)
    return write_recipe(tmp_path / "run", msgspec.structs.replace(small, data=data))


def evaluations(told: Told) -> dict[int, dict[str, float]]:
    """Held-out losses by step and source; of one step and source the first, as they are kept."""
    found: dict[int, dict[str, float]] = {}
    for body in told.all("Metrics"):
        losses = {name.split("/")[1]: value for name, value in body["values"].items() if re.fullmatch("eval/.+/loss", name)}
        if losses:
            found[body["step"]] = losses | found.get(body["step"], {})
    return found


def test_mid_training_learns_another_source_and_every_evaluation_tells_what_it_forgets(run: Path) -> None:
    recipe: Recipe = load_recipe(run / "recipe.toml")
    found = evaluations(steer(run))
    assert list(found) == [0, 6, STEPS, STEPS + 6, 2 * STEPS]
    first, second = {"general", "german"}, {"general", "german", "medicine"}
    assert [set(losses) for losses in found.values()] == [first] * 2 + [second] * 3, "the new one before the second stage began"
    assert found[0]["general"] < found[0]["german"], "the base has read the one, and not the other"
    assert found[STEPS]["german"] < found[0]["german"]
    assert found[2 * STEPS]["medicine"] < found[STEPS]["medicine"]

    export(run, "latest", run.parent / "out")
    known = json.loads((run.parent / "out" / "midwatch.json").read_text())
    assert known["began_with"] == {"from": recipe.model.source, "digest": recipe.model.source_digest}
    assert [(stage["name"], sorted(stage["corpora"])) for stage in known["stages"]] == [
        ("language", sorted(first)),
        ("domain", sorted(second)),
    ]
    assert all(corpus["origin"].startswith("stdlib-") for stage in known["stages"] for corpus in stage["corpora"].values())


def test_sources_that_only_an_earlier_stage_reads_are_evaluated_still(run: Path) -> None:
    recipe = load_recipe(run / "recipe.toml")
    alone = msgspec.structs.replace(recipe.stage[1], mixture={"medicine": 1.0})
    write_recipe(run, msgspec.structs.replace(recipe, stage=(recipe.stage[0], alone)))
    found = evaluations(steer(run))
    assert set(found[2 * STEPS]) == {"general", "german", "medicine"}
