"""KTO: equal to TRL's loss, the same at any number of ranks, and what its examples and its reference point are made of."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from test_trainer_post_training import against, gradient, mean, near, rows_of, series
from trainer_harness import Step, fresh, same_bits, steer, write_recipe

from midwatch.protocol import Op
from midwatch.recipe import Recipe, Stage
from midwatch.recipe.live_settings import check_setting, stage_settings
from shards.build.build import build
from shards.sampling.batches import Batch, BatchFeed
from shards.spec import Build, Source
from trainer.loop.reference_point import one_before, shifted
from trainer.objectives.kto import loss as kto
from trainer.objectives.objective import LabelledComparison

STEPS = 4


@against("trl.KTOTrainer._compute_loss")
def test_the_loss_of_labelled_responses(given: dict[str, Any], said: dict[str, Any]) -> None:
    policy, desirable = given["policy"].requires_grad_(), given["desirable"] > 0
    point = (given["mismatched"] - given["mismatched_reference"]).mean().clamp(min=0)
    near(point, said["kl"])
    settings = {name: given[name] for name in ("beta", "desirable_weight", "undesirable_weight")}
    compared = LabelledComparison(given["reference"], desirable, point)
    found, means = mean(kto.loss(policy, rows_of(given["mask"]), settings, compared))
    near(found, said["loss"])
    near(gradient(found, policy), said["gradient_policy"])
    told = kto.report({name: float(value) for name, value in means.items()})
    for name, metric in (("chosen", "chosen_reward"), ("rejected", "rejected_reward"), ("margin", "margin")):
        assert told.get(f"preference/{metric}") == (pytest.approx(said[name], abs=1e-6) if name in said else None)
    assert told["preference/reference_point"] == pytest.approx(said["kl"], abs=1e-6)


def test_an_empty_response_weighs_nothing_and_the_reference_point_takes_no_gradient() -> None:
    policy = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]], requires_grad=True)
    rows = rows_of(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    compared = LabelledComparison(torch.full((2, 2), -1.0), torch.tensor([True, False]), torch.tensor(0.5))
    settings = {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    found, weight, _ = kto.loss(policy, rows, settings, compared)
    # r = -3 + 2 = -1, and 1 - sigmoid(0.1 (-1 - 0.5)).
    assert found.item() == pytest.approx(1 - 1 / (1 + math.exp(0.15))) and float(weight) == 1
    assert not gradient(found, policy)[1].any()
    assert kto.weight(np.array([[1, 1], [0, 0]], np.float32)) == 1


def test_each_prompt_is_put_together_with_the_response_before_it() -> None:
    batch, previous = Batch.empty(3, 6, 0, [("a", 0, n) for n in range(3)]), Batch.empty(1, 6, 0, [("a", 0, 9)])
    put = ((previous, 0, [1, 2], [20, 21]), (batch, 0, [3], [30]), (batch, 1, [4, 5, 6, 7, 8], [40, 41]), (batch, 2, [9], []))
    for rows, row, prompt, response in put:
        ids = np.array([*prompt, *response], np.int64)
        rows.put(
            row,
            0,
            np.append(ids, 0) if not response else ids,
            np.arange(1, len(ids) + (not response)) >= len(prompt) if response else np.zeros(len(ids)),
            0,
        )
    found = kto.mismatched(batch, shifted(batch, previous))
    said = [
        (found.tokens[row][found.segments[row] >= 0].tolist(), found.targets[row][found.mask[row] > 0].tolist()) for row in range(3)
    ]
    assert said == [([3, 20], [20, 21]), ([4, 5, 6, 7, 8], [30]), ([], [])], "an empty response gives no row"
    assert [one_before(first, 8, 4) for first in (8, 9, 11)] == [11, 8, 10]


def stage_of(recipe: Recipe, **more: Any) -> Stage:
    dpo = recipe.stage[3]
    settings = {key: more.pop(key) for key in ("beta", "desirable_weight", "undesirable_weight") if key in more}
    stage = msgspec.structs.replace(dpo, name="kto", objective="kto", steps=STEPS, eval_every=2, **more)
    return stage.with_settings(**settings)


def test_a_preference_pair_is_two_labelled_responses(recipe: Recipe) -> None:
    assert recipe.data.dir is not None
    rows: dict[str, Batch] = {}
    for kind in ("labelled", "preference"):
        feed = BatchFeed(recipe.data.dir, "train", kind, 96, {"prefer": 1.0}, seed=0)  # type: ignore[arg-type]
        rows[kind] = feed.samples("prefer", 0, 4 if kind == "labelled" else 2)
    labelled, pairs = rows["labelled"], rows["preference"]
    assert labelled.desirable.tolist() == [True, False, True, False]
    for name in ("tokens", "targets", "mask", "segments", "positions"):
        assert np.array_equal(getattr(labelled, name), getattr(pairs, name)[[0, 2, 1, 3]]), name


@pytest.fixture(scope="module")
def rated(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """With responses that have a label besides the pairs."""
    place = tmp_path_factory.mktemp("rated")
    lines = [{"prompt": f"What is {n}?", "completion": f"A number, {n}.", "label": n % 2 == 0} for n in range(40)]
    (place / "ratings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = tuple(source for source in recipe.data.source if source.name in ("topics", "prefer"))
    ratings = Source(name="ratings", kind="unpaired", origin="jsonl", path=str(place / "ratings.jsonl"))
    data = msgspec.structs.replace(recipe.data, source=(*kept, ratings), dir=str(place / "out"))
    build(Build(data=data, tokenizer=recipe.tokenizer, out=str(place / "out"), seed=0), workers=0)
    return msgspec.structs.replace(recipe, data=data)


def test_a_run_is_the_same_on_one_rank_and_two_and_when_it_is_stopped(rated: Recipe, tmp_path: Path) -> None:
    recipe, mixture = rated, {"prefer": 1.0, "ratings": 1.0}
    stage = stage_of(recipe, desirable_weight=1.33, micro_batch=3, mixture=mixture)
    short = msgspec.structs.replace(recipe.stage[0], steps=2, eval_every=100, eval_samples=1, prompts=(), mixture={"topics": 1.0})
    whole = msgspec.structs.replace(recipe, stage=(short, stage))
    told = {size: steer(write_recipe(tmp_path / f"on{size}", whole), size=size) for size in (1, 2)}
    names = (
        "train/loss",
        "preference/margin",
        "preference/reference_point",
        "eval/prefer/loss",
        "eval/prefer/margin",
        "eval/ratings/loss",
        "policy/kl",
    )
    for name in names:
        assert series(told[1], name) == pytest.approx(series(told[2], name), abs=2e-6), name
    losses, margins = series(told[1], "train/loss")[2:], series(told[1], "preference/margin")
    # At first the policy is the reference: every term is its weight over two.
    good = series(told[1], "preference/desirable_fraction")[0]
    assert losses[0] == pytest.approx((1.33 * good + (1 - good)) / 2, abs=1e-6)
    assert margins[0] == pytest.approx(0, abs=1e-6) and margins[-1] > 0
    assert len(series(told[1], "preference/reference_point")) == STEPS and min(series(told[1], "preference/reference_point")) >= 0
    root = write_recipe(tmp_path / "stopped", whole)
    stopped = steer(root, Step(Op.STOP, after=4), size=1)
    steer(root, start=fresh(checkpoint=stopped.all("Ended")[0]["checkpoint"], generation=2), size=1)
    assert same_bits(root / "checkpoints" / "6-1-kto", tmp_path / "on1" / "checkpoints" / "6-1-kto")


def test_its_settings_are_live_and_a_step_needs_two_samples(recipe: Recipe) -> None:
    stage = stage_of(recipe, beta=0.3)
    assert {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.0}.items() <= stage_settings(recipe, stage).items()
    assert check_setting(recipe, stage, "undesirable_weight", 1.33) == 1.33
    with pytest.raises(ValueError, match="no setting"):
        check_setting(recipe, stage, "label_smoothing", 0.1)
    assert stage.problems() == []
    alone = msgspec.structs.replace(stage, global_batch=1)
    assert ("global_batch", "must be at least 2: kto compares samples of a step") in alone.problems()
