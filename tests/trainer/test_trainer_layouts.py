"""A run that is laid out anew at each of its restarts: the whole pipeline, its checkpoints moving from one layout to the next."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from safetensors.torch import load_file
from trainer_harness import Step, fresh, logged, state, steer, tensors, write_recipe

from midwatch.protocol import Op
from midwatch.recipe import Parallel, Recipe
from trainer.control.standalone import newest
from trainer.huggingface.export import export

LEGS: list[tuple[int, int, Parallel, int]] = [
    (3, 4, Parallel(tensor=2, pipeline=2), 1),
    (8, 4, Parallel(), 4),
    (14, 2, Parallel(pipeline=2), 1),
    (20, 4, Parallel(tensor=2), 2),
    (26, 4, Parallel(hsdp_shard_size=2, offload="parameters"), 1),
    (29, 4, Parallel(pipeline=2), 2),
    (30, 1, Parallel(), 1),
]
"""Up to which step, on how many ranks, in which mesh, with how many sharing a row."""


def lay_out(recipe: Recipe, ranks: int, parallel: Parallel, context: int) -> Recipe:
    stages = tuple(
        msgspec.structs.replace(stage, context_parallel=context, activation_checkpointing="block", loss_chunk_tokens=50)
        for stage in recipe.stage
    )
    cluster = msgspec.structs.replace(recipe.cluster, ranks_per_node=ranks)
    return msgspec.structs.replace(recipe, cluster=cluster, parallel=parallel, stage=stages)


def test_checkpoints_move_between_layouts_through_the_whole_pipeline(recipe: Recipe, finished: Path, tmp_path: Path) -> None:
    """Every leg of the run has other ranks and another mesh; losses and exams are those of the run on two plain ranks."""
    root = tmp_path / "run"
    found: dict[str, dict[int, float]] = {}
    for number, (until, ranks, parallel, context) in enumerate(LEGS, 1):
        write_recipe(root, lay_out(recipe, ranks, parallel, context))
        checkpoints = root / "checkpoints"
        id = newest(checkpoints) if checkpoints.exists() else None
        script = [] if until == 30 else [Step(Op.STOP, after=until - 1, number=number)]
        told = steer(root, *script, size=ranks, start=fresh(generation=number, checkpoint=id, applied=number - 1))
        for body in told.all("Metrics"):
            for name, value in body["values"].items():
                found.setdefault(name, {}).setdefault(body["step"], value)
        if parallel.tensor > 1 and parallel.pipeline > 1:
            a_part_of_each_rank_goes_out_whole(root, tmp_path / "out")
    expected = values(finished)
    assert sorted(found["train/loss"]) == list(range(1, 31)) and found.keys() == expected.keys() | {"perf/pipeline_bubble"}
    for name, rows in expected.items():
        # Fresh responses of a policy are drawn by each replica for itself.
        if not name.startswith(("perf/", "policy/")):
            assert found[name] == pytest.approx(rows, abs=1e-4), name
    assert state(root / "checkpoints" / "30-1-dpo")["origin"]["products"].keys() == {"pretrain", "extend", "sft"}


def a_part_of_each_rank_goes_out_whole(root: Path, to: Path) -> None:
    id = newest(root / "checkpoints")
    assert id is not None
    export(root, id, to)
    found, ours = load_file(to / "model.safetensors"), tensors(root / "checkpoints" / id)
    for theirs, name in (("mlp.down_proj", "mlp.down"), ("self_attn.o_proj", "attention.out"), ("mlp.up_proj", "mlp.up")):
        written = found[f"model.layers.1.{theirs}.weight"].numpy()
        assert (written == ours[f"model.blocks.1.{name}.weight"]).all(), name


def values(root: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for body in logged(root):
        if body.get("type") == "Metrics":
            for name, value in body["values"].items():
                found.setdefault(name, {})[body["step"]] = value
    return found
