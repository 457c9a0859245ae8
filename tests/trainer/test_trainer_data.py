"""What a run reads: mixtures that come by the recipe, sources that are used up, files that are away for a while."""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from msgspec.structs import replace
from trainer_harness import Step, Told, fresh, same_bits, state, steer, write_recipe

from midwatch.protocol import Op
from midwatch.recipe import Recipe
from midwatch.recipe.data_sufficiency import shortages
from midwatch.recipe.mixture import Anneal
from shards.sampling.batches import BatchFeed


def prepared(recipe: Recipe, place: Path, data: Path | None = None, **settings: Any) -> Path:
    """A run of the first stage with these settings."""
    recipe = replace(recipe, stage=(replace(recipe.stage[0], **settings),))
    if data is not None:
        recipe = replace(recipe, data=replace(recipe.data, dir=str(data)))
    return write_recipe(place, recipe)


def fractions(told: Told, source: str) -> dict[int, float]:
    """By step."""
    name = f"data/{source}/fraction"
    return {body["step"]: body["values"][name] for body in told.all("Metrics") if name in body["values"]}


def texts(told: Told, level: str) -> list[str]:
    return [body["text"] for body in told.all("Note") if body["level"] == level]


ANNEAL = (Anneal(at=0.5, mixture={"docs": 1.0}), Anneal(at=9, mixture={"topics": 1.0}))


def test_a_mixture_of_the_recipe_comes_at_its_step_and_ends_what_an_operator_set(recipe: Recipe, tmp_path: Path) -> None:
    root = prepared(recipe, tmp_path / "run", anneal=ANNEAL)
    told = steer(root, Step(Op.SET, {"key": "mixture.docs", "value": 0.0}, after=2), Step(Op.STOP, after=6))
    again = steer(root, start=fresh(checkpoint=f"{told.outcome(2)['step']}-1", applied=2, generation=2))
    set_at, read = told.outcome(1)["step"], fractions(told, "docs") | fractions(again, "docs")
    assert set_at < 6 and [read[step] for step in range(set_at + 1, 7)] == [0.0] * (6 - set_at)
    assert [read[step] for step in range(7, 13)] == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    settings = {body["step"]: body["settings"] for body in again.all("Phase")}[12]
    assert (settings["mixture.docs"], settings["mixture.topics"]) == (0.0, 1.0)
    assert any("mixture of step 6: docs 1" in text for text in texts(told, "info"))


def test_a_run_with_scheduled_mixtures_and_limits_is_the_same_after_a_rollback_and_a_restart(
    recipe: Recipe, tmp_path: Path
) -> None:
    settings: Mapping[str, Any] = {
        "anneal": ANNEAL,
        "max_epochs": {"docs": 0.1},
        "mixture_by": "tokens",
        "mixture_temperature": 2.0,
    }
    quiet, roots = prepared(recipe, tmp_path / "quiet", **settings), prepared(recipe, tmp_path / "run", **settings)
    steer(quiet, size=1)
    told = steer(roots, Step(Op.ROLLBACK, {"checkpoint": "4-1", "lineage": {"id": 2}}, after=8), Step(Op.STOP, after=9), size=1)
    stopped = told.outcome(2)["step"]
    again = steer(roots, start=fresh(lineage=2, checkpoint=f"{stopped}-2", applied=2, generation=2), size=1)
    assert again.all("Ended")[0]["cause"] == "finished"
    assert same_bits(quiet / "checkpoints" / "12-1-pretrain", roots / "checkpoints" / "12-2-pretrain")


def test_a_skip_puts_off_the_mixture_so_that_it_comes_at_its_step(recipe: Recipe, tmp_path: Path) -> None:
    root = prepared(recipe, tmp_path / "run", anneal=ANNEAL[:1])
    told = steer(root, Step(Op.ROLLBACK, {"checkpoint": "4-1", "lineage": {"id": 2}, "skip": 3}, after=5))
    read = fractions(Told([body for body in told.bodies if body.get("lineage") == 2]), "docs")
    assert max(read[5], read[6]) < 1.0 and min(read[step] for step in range(7, 13)) == 1.0


def test_a_mixture_that_names_what_was_not_built_is_said_before_a_rank_starts(recipe: Recipe) -> None:
    stage = replace(recipe.stage[0], mixture={"topics.en": 1.0})
    (said,) = shortages(replace(recipe, stage=(stage,)), Path(recipe.data.dir or ""))
    assert f'stage "{stage.name}": there is no source "topics.en"' in said


def test_used_up_sources_pause_the_run_with_what_to_do_and_another_mixture_lets_it_go_on(recipe: Recipe, tmp_path: Path) -> None:
    stage, data = recipe.stage[0], Path(recipe.data.dir or "")
    size = BatchFeed(data, "train", "text", stage.context, {"topics": 1}, 0).samples_per_epoch("topics")
    limits = {"mixture": {"topics": 1.0, "docs": 0.0}, "max_epochs": {"topics": 33 / size}}
    root = prepared(recipe, tmp_path / "run", **limits)
    short = shortages(replace(recipe, stage=(replace(stage, **limits),)), data)
    assert len(short) == 1 and "after 33 samples, and 12 steps take 72" in short[0] and "at most 5 steps" in short[0]
    told = steer(root, Step(Op.SET, {"key": "mixture.docs", "value": 1.0}, phase="paused", looks=20))
    alarms = texts(told, "alarm")
    assert len(alarms) == 1 and 'used up after 33 samples: "topics"' in alarms[0] and "set mixture.SOURCE" in alarms[0]
    assert told.outcome(1)["step"] == 5
    read = fractions(told, "docs")
    assert read[5] == 0.0 and read[6] == 0.5 and read[7] == 1.0  # 3 of topics were left, and none is lost
    assert state(root / "checkpoints" / "12-1-pretrain")["settings"]["mixture.topics"] == 1.0


def test_a_file_that_is_away_pauses_the_run_with_an_alarm_and_it_goes_on_when_it_is_back(
    recipe: Recipe, quiet: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(recipe.data.dir or "", tmp_path / "data"))
    root = prepared(recipe, tmp_path / "run", data)
    file = next((data / "topics" / "train").glob("tokens-*.zst"))
    raw = file.read_bytes()
    file.unlink()
    done: list[Told] = []
    thread = threading.Thread(target=lambda: done.append(steer(root)), name="run")
    thread.start()
    try:
        deadline = time.monotonic() + 60
        while not texts(Told.read(root), "alarm") and time.monotonic() < deadline:
            time.sleep(0.1)
        damaged = bytearray(raw)
        damaged[40] ^= 1
        file.write_bytes(damaged)  # back, but not whole: another alarm, and nothing is read of it
        while len(texts(Told.read(root), "alarm")) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not Told.read(root).losses()
        whole = file.with_suffix(".new")
        whole.write_bytes(raw)
        whole.replace(file)
    finally:
        file.write_bytes(raw) if not file.exists() else None
        thread.join()
    told = done[0]
    alarms = texts(told, "alarm")
    assert len(alarms) == 2 and all(str(file) in alarm for alarm in alarms)
    assert "No such file" in alarms[0] and "tries again every" in alarms[0]
    assert any("can be read again" in text for text in texts(told, "info"))
    phases = [body["phase"] for body in told.all("Phase")]
    assert phases.count("paused") <= 2 and phases[phases.index("paused") + 1 :].count("training")
    assert same_bits(quiet / "checkpoints" / "12-1-pretrain", root / "checkpoints" / "12-1-pretrain")


def test_a_run_that_its_data_does_not_last_for_does_not_begin_and_says_how_many_steps_it_does(tmp_path: Path) -> None:
    (tmp_path / "short.toml").write_text(
        '[run]\nname = "short"\n[model]\nnum_layers = 1\nhidden_size = 16\nnum_heads = 2\n'
        "[tokenizer]\nvocab = 400\nsample_bytes = 100000\n"
        '[[data.source]]\nname = "t"\nkind = "text"\norigin = "stdlib-topics"\nmax_documents = 9\n[cluster]\nranks_per_node = 1\n'
        '[[stage]]\nname = "p"\nobjective = "pretrain"\nsteps = 4000\ncontext = 32\nglobal_batch = 8\nmixture = { t = 1 }\n'
        "max_epochs = { t = 2 }\n"
    )
    command = [sys.executable, "-m", "midwatch", "run", "short.toml", "--dir", "run", "--headless"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode != 0 and "Traceback" not in done.stdout + done.stderr
    assert "all its sources are used up after" in done.stdout and "4000 steps take 32,000 (raise max_epochs" in done.stdout
