"""The docs name every recipe key and every live setting."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from midwatch.objectives.registry import built_in
from midwatch.recipe import Checkpoint, Cluster, Data, Model, Probe, Report, Rope, Run, Source, Stage, TokenizerSpec, Watch
from midwatch.recipe.generate import Generate
from midwatch.recipe.live_settings import stage_settings
from midwatch.recipe.load import load_recipe
from midwatch.recipe.rollout import Rollout

ROOT = Path(__file__).parents[2]


STRUCTS = [Run, Model, TokenizerSpec, Data, Source, Stage, Rope, Rollout, Generate, Cluster, Checkpoint, Report, Probe, Watch]


@pytest.mark.parametrize("struct", [*STRUCTS, *(pytest.param(spec.settings, id=spec.name) for spec in built_in())])
def test_the_recipe_reference_names_every_key(struct: type[msgspec.Struct]) -> None:
    page = (ROOT / "docs/recipe.md").read_text()
    missing = [key for key in struct.__struct_encode_fields__ if not re.search(rf"\b{key}\b", page)]
    assert missing == []


def test_the_guide_names_every_live_setting() -> None:
    page = (ROOT / "docs/guide.md").read_text()
    recipe = load_recipe(ROOT / "recipes/smoke.toml")
    keys = {k for stage in recipe.stage for k in stage_settings(recipe, stage) if not k.startswith("mixture.")}
    assert [key for key in sorted(keys) if f"`{key}`" not in page] == []
