"""The pipeline as a whole, under torchrun and with ranks killed."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from trainer_harness import MakeRun, logged, logs, losses, plain, same_bits, start_ranks, state, torchrun, train_plain, write_recipe

from midwatch.recipe import Recipe, parse_recipe
from shards.build.build import build
from shards.spec import Build


def test_torchrun_trains_the_whole_pipeline(finished: Path) -> None:
    names = {path.name for path in (finished / "checkpoints").iterdir()}
    assert {"12-1-pretrain", "18-1-extend", "24-1-sft", "30-1-dpo"} <= names
    assert "finished, checkpoint 30-1-dpo" in (finished / "said").read_text()


def test_held_out_loss_falls_in_each_stage(finished: Path) -> None:
    steps = {"topics": (0, 12, 0.5), "ask": (18, 24, 0.05)}
    found = {
        (name, body["step"]): body["values"][f"eval/{name}/loss"]
        for body in logged(finished)
        for name in steps
        if f"eval/{name}/loss" in body["values"]
    }
    for name, (before, after, fall) in steps.items():
        assert found[name, after] < found[name, before] - fall


def test_every_stage_is_examined_on_what_came_before(finished: Path) -> None:
    last = [body["values"] for body in logged(finished) if "eval/prefer/loss" in body["values"]][-1]
    assert {f"eval/{name}/loss" for name in ("topics", "docs", "ask", "prefer")} <= last.keys()
    assert {"policy/kl", "policy/kl_sequence", "policy/reward", "policy/entropy"} <= last.keys()


def test_a_product_names_what_it_was_made_from(finished: Path, recipe: Recipe) -> None:
    final = state(finished / "checkpoints" / "30-1-dpo")
    origin = final["origin"]
    assert origin["products"] == {"pretrain": "12-1-pretrain", "extend": "18-1-extend", "sft": "24-1-sft"}
    assert final["reference"] == "24-1-sft"
    assert origin["recipe"] and origin["tokenizer"]
    assert set(origin["shards"]) == {"pretrain", "extend", "sft", "dpo"}
    assert set(origin["shards"]["pretrain"]) == {"topics", "docs"}


def test_only_the_newest_passing_checkpoints_are_kept(finished: Path) -> None:
    passing = sorted(path.name for path in (finished / "checkpoints").iterdir() if path.name.count("-") == 1)
    assert passing == ["16-1", "20-1", "28-1"]


def test_a_run_without_a_controller_says_what_the_model_wrote(finished: Path) -> None:
    assert "'The import statement' ->" in (finished / "said").read_text()


@pytest.mark.soak
def test_torchrun_restarts_a_killed_rank_bit_for_bit(finished: Path, recipe: Recipe, tmp_path: Path) -> None:
    root = write_recipe(tmp_path / "run", recipe)
    process = torchrun(root, "--max-restarts=2")
    _until(lambda: (root / "checkpoints" / "8-1").is_dir())
    ranks = [int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _is_rank(int(pid), root)]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert same_bits(root / "checkpoints" / "30-1-dpo", finished / "checkpoints" / "30-1-dpo")


def _is_rank(pid: int, root: Path) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return str(root).encode() in words and b"torch.distributed.run" not in words


def _until(true: object, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.005)


def test_killed_during_a_save_it_ends_with_the_same_weights(quiet: Path, make_run: MakeRun) -> None:
    root = make_run()
    ranks = start_ranks(root, 2, plain)
    _until(lambda: any((root / "checkpoints").glob(".g*")))
    killed = ranks.alive()
    ranks.kill()
    assert killed, logs(root)
    train_plain(root)
    assert same_bits(root / "checkpoints" / "12-1-pretrain", quiet / "checkpoints" / "12-1-pretrain")
    assert not list((root / "checkpoints").glob(".g*"))


def test_a_finished_run_started_again_ends_at_once(finished: Path) -> None:
    before = len(logged(finished))
    train_plain(finished)
    assert len(logged(finished)) == before


def test_a_bad_recipe_is_said_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "recipe.toml").write_text("[run]\nname = 'x'\nseeed = 3\n")
    assert start_ranks(tmp_path, 1, plain).wait() == [78], "no other start would end otherwise"
    said = (tmp_path / "rank-0.log").read_text()
    assert "recipe.toml:3" in said and "Traceback" not in said


PINNED = """
[run]
name = "pinned"
seed = 3
[model]
num_layers = 2
hidden_size = 32
num_heads = 4
num_kv_heads = 2
intermediate_size = 64
[tokenizer]
vocab = 384
[data]
held_out = 0.0
[[data.source]]
name = "licence"
kind = "text"
origin = "text"
path = "LICENSE"
[[stage]]
name = "pretrain"
objective = "pretrain"
steps = 8
context = 32
global_batch = 8
lr = 1e-2
warmup_steps = 2
mixture = {licence = 1}
"""
PINNED_LOSSES = [5.9607, 5.8458, 5.4870, 5.4969, 5.0110, 4.8244, 4.8583, 4.6304]


def test_a_refactoring_keeps_the_losses(tmp_path: Path) -> None:
    recipe = parse_recipe(PINNED, base=Path(__file__).parents[2])
    root = write_recipe(tmp_path / "run", recipe)
    build(Build(data=recipe.data, tokenizer=recipe.tokenizer, out=str(root / "data"), seed=3), workers=0)
    train_plain(root)
    found = losses(logged(root))
    assert [found[1, step] for step in range(1, 9)] == pytest.approx(PINNED_LOSSES, abs=2e-3)
