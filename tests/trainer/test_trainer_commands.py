"""Orders at the boundary: each does what the table says, on every rank, once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from trainer_harness import MakeRun, Step, Told, build_small, fresh, same_bits, state, steer, write_recipe

from midwatch.protocol import Op, Replay
from midwatch.recipe import Recipe


def rollback(checkpoint: str, lineage: int, **more: Any) -> dict[str, Any]:
    return {"checkpoint": checkpoint, "lineage": {"id": lineage}, **more}


def steer_once(
    factory: pytest.TempPathFactory, recipe: Recipe, name: str, *script: Step, stages: int = 1, **more: Any
) -> tuple[Path, Told]:
    """A run that several tests look at."""
    from msgspec.structs import replace

    root = write_recipe(factory.mktemp(name) / "run", replace(recipe, stage=recipe.stage[:stages]))
    return root, steer(root, *script, **more)


@pytest.fixture(scope="module")
def paused(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    """Paused at step 4, told to checkpoint what is there already, rolled back to where it was, resumed."""
    return steer_once(
        tmp_path_factory,
        recipe,
        "paused",
        Step(Op.PAUSE, after=3),
        Step(Op.CHECKPOINT, looks=10),
        Step(Op.ROLLBACK, rollback("4-1", 2)),
        Step(Op.RESUME, looks=20),
    )


@pytest.fixture(scope="module")
def settings(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    """Settings set while it is paused and while it trains, twice, and wrong ones; a checkpoint after the first."""
    return steer_once(
        tmp_path_factory,
        recipe,
        "settings",
        Step(Op.PAUSE, after=3),
        Step(Op.SET, {"key": "max_grad_norm", "value": 0.5}, looks=10, again=True),
        Step(Op.CHECKPOINT),
        Step(Op.RESUME),
        Step(Op.SET, {"key": "max_grad_norm", "value": -1}, after=5),
        Step(Op.SET, {"key": "bet", "value": 1}),
        Step(Op.SET, {"key": "lr_scale", "value": 0.25}),
        Step(Op.SET, {"key": "mixture.docs", "value": 0}, after=8),
        Step(Op.SET, {"key": "max_grad_norm", "value": 2.0}, after=9, number=2),
    )


@pytest.fixture(scope="module")
def rolled_back(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Told]:
    """Rolled back from step 10 to step 4, and there again with data passed over and a scaled learning rate."""
    return steer_once(
        tmp_path_factory,
        recipe,
        "rolled-back",
        Step(Op.ROLLBACK, rollback("4-1", 2), after=9),
        Step(Op.ROLLBACK, rollback("4-1", 3, skip=3, lr_scale=0.5), after=9),
    )


def test_pausing_resuming_and_rolling_back_to_where_it_was_changes_no_bit(quiet: Path, paused: tuple[Path, Told]) -> None:
    steered, told = paused
    assert same_bits(quiet / "checkpoints" / "12-1-pretrain", steered / "checkpoints" / "12-2-pretrain")
    assert [told.outcome(number)["step"] for number in (1, 3, 4)] == [4, 4, 4]
    assert told.outcome(3)["detail"] == {"lineage": 2, "step": 4, "undone": 0}
    assert [body["phase"] for body in told.all("Phase")].count("paused") >= 1


def test_a_checkpoint_that_is_there_is_not_written_again(paused: tuple[Path, Told]) -> None:
    _, told = paused
    assert told.outcome(2)["detail"] == {"checkpoint": "4-1"}
    assert [body["id"] for body in told.all("CheckpointReady")].count("4-1") == 1


def test_the_log_tells_what_was_ordered_and_what_came_of_it(paused: tuple[Path, Told]) -> None:
    said = (paused[0] / "rank-0.log").read_text()
    for line in (
        "command 1: pause",
        "step 4: paused",
        "command 2: done at step 4 checkpoint=4-1",
        "command 3: rollback checkpoint=4-1 lineage=2",
        "command 3: done at step 4 lineage=2 step=4 undone=0",
        "step 4: resumed",
        "checkpoint 12-2-pretrain: committed",
        "finished, checkpoint 12-2-pretrain",
    ):
        assert line in said, said
    assert (paused[0] / "rank-1.log").read_text() == "", "the others write only what is their own"


def test_a_checkpoint_is_answered_by_its_commit_and_however_often_it_is_asked_for_written_once(make_run: MakeRun) -> None:
    """Two orders for it at one boundary; the first sent again before the commit, and again after it."""
    root = make_run(checkpoint={"every": 100})
    told = steer(
        root,
        Step(Op.PAUSE, after=4),
        Step(Op.CHECKPOINT, looks=3, wait=False),
        Step(Op.CHECKPOINT, looks=3, wait=False),
        Step(Op.CHECKPOINT, looks=10, wait=False, number=2),
        Step(Op.CHECKPOINT, looks=50, wait=False, number=2),
        Step(Op.STOP_NOW, looks=55, number=4),
        lag=12,
    )
    ready = told.all("CheckpointReady")
    assert [body["id"] for body in ready] == ["5-1", "5-1"] and ready[0] == ready[1]
    assert ready[0]["numbers"] == [2] and not ready[0]["suspect"] and ready[0]["loss"] == told.losses()[1, 5]
    order = [(body["type"], body.get("number")) for body in told.bodies if body["type"] in ("CheckpointReady", "Outcome")]
    assert order[1:] == [("CheckpointReady", None)] * 2 + [("Outcome", 3), ("Outcome", 2), ("Outcome", 4)]
    assert told.outcome(2)["detail"] == told.outcome(3)["detail"] == {"checkpoint": "5-1"}
    assert (root / "rank-0.log").read_text().count("checkpoint 5-1: begun") == 1


def test_a_checkpoint_that_joins_one_on_its_way_is_told_with_that_ones_step_however_late(make_run: MakeRun) -> None:
    root = make_run(checkpoint={"every": 100})
    told = steer(
        root,
        Step(Op.PAUSE, after=4),
        Step(Op.CHECKPOINT, looks=3, wait=False),
        Step(Op.CHECKPOINT, looks=3, wait=False),
        Step(Op.RESUME, looks=4, wait=False),
        Step(Op.STOP_NOW, looks=25, number=5),
        lag=12,
    )
    saved, resumed = told.outcome(3), told.outcome(4)
    assert saved["detail"] == {"checkpoint": "5-1"} and told.bodies.index(saved) > told.bodies.index(resumed)
    assert saved["step"] == 5, "the step that was saved, not the one at which its commit was heard of"
    assert max(body["step"] for body in told.all("Metrics")) > 5


def test_a_changed_setting_makes_another_checkpoint_of_the_same_step(settings: tuple[Path, Told]) -> None:
    root, told = settings
    ids = [body["id"] for body in told.all("CheckpointReady")]
    assert ids[:2] == ["4-1", "4-1.1"]
    assert state(root / "checkpoints" / "4-1")["settings"]["max_grad_norm"] == 1.0
    assert state(root / "checkpoints" / "4-1.1")["settings"]["max_grad_norm"] == 0.5


def test_what_is_saved_after_a_restart_is_not_taken_for_an_older_checkpoint_of_that_step(
    settings: tuple[Path, Told], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(settings[0], tmp_path / "run"))
    told = steer(
        root,
        Step(Op.CHECKPOINT, number=21),
        Step(Op.SET, {"key": "max_grad_norm", "value": 0.7}),
        Step(Op.CHECKPOINT),
        Step(Op.STOP_NOW),
        start=fresh(checkpoint="4-1.1", generation=2, applied=20, paused=True),
    )
    assert told.outcome(21)["detail"] == {"checkpoint": "4-1.1"}
    assert [body["id"] for body in told.all("CheckpointReady")] == ["4-1.2"]
    assert state(root / "checkpoints" / "4-1.2")["settings"]["max_grad_norm"] == 0.7


def test_rollback_takes_the_same_steps_again(rolled_back: tuple[Path, Told]) -> None:
    _, told = rolled_back
    losses = told.losses()
    assert told.outcome(1)["detail"] == {"lineage": 2, "step": 4, "undone": 6}
    assert [losses[2, step] for step in range(5, 11)] == [losses[1, step] for step in range(5, 11)]


def test_rollback_skips_data_and_scales_the_learning_rate(rolled_back: tuple[Path, Told]) -> None:
    root, told = rolled_back
    losses = told.losses()
    rates = {
        (body["lineage"], body["step"]): body["values"].get("train/lr")
        for body in told.all("Metrics")
        if "train/lr" in body["values"]
    }
    assert losses[3, 5] != losses[1, 5]
    assert rates[3, 5] == 0.5 * rates[1, 5]
    kept = state(root / "checkpoints" / "12-3-pretrain")
    assert (kept["position"], kept["lineage"], kept["settings"]["lr_scale"]) == ((12 + 3) * 6, 3, 0.5)


def test_rollback_to_a_stages_end_begins_the_next_and_to_an_earlier_stage_rebuilds_it_in_place(
    finished: Path, make_run: MakeRun
) -> None:
    steered = make_run("steered", stages=4)
    told = steer(
        steered, Step(Op.ROLLBACK, rollback("12-1-pretrain", 2), after=15), Step(Op.ROLLBACK, rollback("8-1", 3), after=27)
    )
    losses = told.losses()
    assert told.outcome(1)["detail"] == {"lineage": 2, "step": 12, "undone": 4}
    assert [losses[2, step] for step in range(13, 16)] == [losses[1, step] for step in range(13, 16)]
    assert told.outcome(2)["detail"] == {"lineage": 3, "step": 8, "undone": 20}
    assert [body["stage"] for body in told.all("StageBorder") if body["event"] == "begin" and body["lineage"] == 3] == [
        "extend",
        "sft",
        "dpo",
    ]
    assert state(steered / "checkpoints" / "30-3-dpo")["reference"] == "24-3-sft"
    before = [(body["lineage"], body["step"], body["values"].get("eval/topics/loss_before")) for body in told.all("Metrics")]
    before = [row for row in before if row[2] is not None]
    at_12 = before[0][2]
    assert [row for row in before if row[1] == 12] == [(1, 12, at_12), (2, 12, at_12), (3, 12, at_12)], "once each time"
    assert [row[:2] for row in before if row[1] > 12] == [(2, 18), (2, 24), (3, 18), (3, 24)]
    assert same_bits(finished / "checkpoints" / "30-1-dpo", steered / "checkpoints" / "30-3-dpo")


def test_stopped_with_a_checkpoint_started_again_and_refused_a_damaged_one_it_ends_with_the_same_bits(
    quiet: Path, stopped: Path
) -> None:
    ended = Told.read(stopped).all("Ended")[0]
    assert (ended["cause"], ended["checkpoint"]) == ("stopped", "7-1")
    file = stopped / "checkpoints" / "4-1" / "rank-00001.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    again = steer(
        stopped, Step(Op.ROLLBACK, rollback("4-1", 2), after=10, number=2), start=fresh(checkpoint="7-1", applied=1, generation=2)
    )
    outcome = again.outcome(2)
    assert not outcome["ok"] and "4-1/rank-00001.bin" in outcome["reason"]
    assert same_bits(stopped / "checkpoints" / "12-1-pretrain", quiet / "checkpoints" / "12-1-pretrain")


def test_set_changes_the_learning_rate_from_the_next_step_on(settings: tuple[Path, Told]) -> None:
    _, told = settings
    assert told.outcome(7)["detail"] == {"key": "lr_scale", "old": 1.0, "new": 0.25}
    at = told.outcome(7)["step"]
    rates = {body["step"]: body["values"]["train/lr"] for body in told.all("Metrics") if "train/lr" in body["values"]}
    assert rates[at + 1] < 0.3 * rates[at]


def test_set_of_a_mixture_changes_what_is_read(settings: tuple[Path, Told]) -> None:
    _, told = settings
    at = told.outcome(8)["step"]
    read = {body["step"]: body["values"]["data/docs/fraction"] for body in told.all("Metrics") if "train/lr" in body["values"]}
    assert sum(read[step] for step in range(1, at + 1)) > 0
    assert at < 12 and sum(read[step] for step in range(at + 1, 13)) == 0


def test_set_out_of_bounds_is_refused_with_what_is_possible(settings: tuple[Path, Told]) -> None:
    _, told = settings
    assert not told.outcome(5)["ok"] and "between" in told.outcome(5)["reason"]
    assert not told.outcome(6)["ok"] and "no setting" in told.outcome(6)["reason"]


def test_an_order_sent_twice_is_applied_once(settings: tuple[Path, Told]) -> None:
    _, told = settings
    assert told.outcome(2)["detail"] == {"key": "max_grad_norm", "old": 1.0, "new": 0.5}
    assert [body["settings"]["max_grad_norm"] for body in told.all("Phase")][-1] == 0.5


def test_settings_are_replayed_at_their_steps(settings: tuple[Path, Told], make_run: MakeRun) -> None:
    once, told = settings
    details = [(told.outcome(number)["step"], told.outcome(number)["detail"]) for number in (2, 7, 8)]
    again = make_run("again")
    steer(again, start=fresh(replays=tuple(Replay(step=step, key=each["key"], value=each["new"]) for step, each in details)))
    assert same_bits(once / "checkpoints" / "12-1-pretrain", again / "checkpoints" / "12-1-pretrain")


def test_advance_ends_the_stage_with_its_product_and_begins_the_next_or_a_later_one(make_run: MakeRun) -> None:
    root = make_run(stages=4)
    told = steer(root, Step(Op.ADVANCE, after=5), Step(Op.ADVANCE, {"to": "pretrain"}, after=8), Step(Op.ADVANCE, {"to": "dpo"}))
    assert told.outcome(1)["detail"] == {"stage": "extend", "checkpoint": "5-1-pretrain"}
    assert not told.outcome(2)["ok"] and "not a stage after" in told.outcome(2)["reason"]
    at = told.outcome(3)["step"]
    assert told.outcome(3)["detail"] == {"stage": "dpo", "checkpoint": f"{at}-1-extend"}
    ends = [(body["stage"], body["product"]) for body in told.all("StageBorder") if body["event"] == "end"]
    assert ends == [("pretrain", "5-1-pretrain"), ("extend", f"{at}-1-extend"), ("dpo", f"{at + 6}-1-dpo")]
    assert state(root / "checkpoints" / f"{at + 6}-1-dpo")["reference"] == f"{at}-1-extend"


def test_orders_are_obeyed_while_paused_and_it_stays_paused(make_run: MakeRun) -> None:
    told = steer(
        make_run(stages=2),
        Step(Op.PAUSE, after=3),
        Step(Op.SET, {"key": "max_grad_norm", "value": 2.0}, looks=3),
        Step(Op.ADVANCE, looks=3),
        Step(Op.STOP, looks=10),
    )
    assert [told.outcome(number)["step"] for number in (1, 2, 3, 4)] == [4, 4, 4, 4]
    assert told.all("Ended")[0] == {"type": "Ended", "cause": "stopped", "step": 4, "checkpoint": "4-1.1"}


def test_stop_now_leaves_no_checkpoint_and_what_an_earlier_generation_applied_is_not_applied_again(make_run: MakeRun) -> None:
    root = make_run(checkpoint={"every": 100})
    told = steer(
        root,
        Step(Op.STOP, after=3, number=7, wait=False),
        Step(Op.STOP_NOW, after=6, number=8),
        start=fresh(applied=7),
    )
    assert told.all("Ended")[0]["cause"] == "stopped-now" and told.all("Ended")[0]["step"] >= 6
    assert not list((root / "checkpoints").iterdir()) if (root / "checkpoints").exists() else True


def test_a_start_that_is_paused_holds_at_its_first_boundary_and_release_checkpoints_there(make_run: MakeRun) -> None:
    told = steer(make_run(), Step(Op.RELEASE, looks=20), start=fresh(paused=True))
    assert told.all("Ended")[0] == {"type": "Ended", "cause": "released", "step": 0, "checkpoint": "0-1"}
    assert told.outcome(1)["detail"] == {"checkpoint": "0-1"} and not told.losses()


def test_a_start_skips_and_scales_as_its_lineage_says(stopped: Path) -> None:
    steer(stopped, start=fresh(2, checkpoint="7-1", generation=2, applied=1, skip=2, lr_scale=0.5))
    kept = state(stopped / "checkpoints" / "12-2-pretrain")
    assert (kept["position"], kept["settings"]["lr_scale"]) == ((12 + 2) * 6, 0.5)


def test_a_pause_holds_between_batches_of_evaluation(make_run: MakeRun) -> None:
    """The first look for orders that comes between boundaries is in the evaluation at the stage's beginning."""
    root = make_run()
    told = steer(root, Step(Op.PAUSE, looks=1), Step(Op.RESUME, looks=10), Step(Op.PAUSE, after=3), Step(Op.STOP))
    kinds = [body.get("phase") for body in told.bodies if body["type"] == "Phase"]
    assert kinds[:4] == ["training", "evaluating", "paused", "evaluating"]
    assert told.outcome(1)["step"] == told.outcome(2)["step"] == 0


def test_an_evaluation_is_left_when_a_paused_run_is_told_more(make_run: MakeRun) -> None:
    told = steer(make_run(), Step(Op.PAUSE, looks=1), Step(Op.STOP, looks=5))
    assert told.all("Ended")[0]["cause"] == "stopped"
    assert any("broken off" in body["text"] for body in told.all("Note"))


def test_a_refused_stage_end_holds_until_it_is_resumed(make_run: MakeRun) -> None:
    root = make_run()
    told = steer(root, Step(Op.RESUME, phase="paused", looks=3), refuse="12-1-pretrain")
    alarms = [body["text"] for body in told.all("Note") if body["level"] == "alarm"]
    assert any('stage "pretrain" cannot end' in text and "12-1-pretrain" in text for text in alarms)
    held = [body for body in told.all("Phase") if body["phase"] == "paused"]
    assert held[0]["step"] == told.outcome(1)["step"] == 12
    assert (root / "checkpoints" / "12-1-pretrain").is_dir() and told.all("Ended")[0]["cause"] == "finished"


def test_unreadable_shards_pause_the_run_with_an_alarm_and_it_goes_on_when_they_are_back(recipe: Recipe, tmp_path: Path) -> None:
    """In the middle of a stage, where only shards that are not open yet are missed; and where the next stage begins."""
    root = write_recipe(tmp_path / "run", build_small(recipe, tmp_path / "data"))
    first, second, away = (tmp_path / "data" / name / "train" for name in ("topics", "docs", "away"))
    away.parent.mkdir()
    second.rename(away.with_name("docs"))
    told = steer(
        root,
        Step(Op.PAUSE, after=3),
        Step(Op.RESUME, looks=3, moves=(first, away)),
        Step(Op.RESUME, phase="paused", looks=3),
        Step(Op.RESUME, phase="paused", looks=3, moves=(away, first)),
        Step(Op.RESUME, phase="paused", looks=3, moves=(away.with_name("docs"), second)),
    )
    alarms = [body for body in told.all("Note") if body["level"] == "alarm"]
    assert [str(first) in alarm["text"] for alarm in alarms] == [True, True, False]
    assert "tokens" in alarms[0]["text"] and 'no source "docs"' in alarms[2]["text"]
    assert 4 <= alarms[0]["step"] == alarms[1]["step"] < 12 and alarms[2]["step"] == 12
    assert [body["step"] for body in told.all("Metrics") if "train/loss" in body["values"]] == list(range(1, 19))
    assert told.all("Ended")[0]["cause"] == "finished"
