"""Headless runs: the pipeline whole, scripts, signals, and what the exit status says."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from midwatch.watch_conditions import GROUP
from tests.packages import install
from tests.system.harness import MIDWATCH, Run, gone, recipe_text

ROOT = Path(__file__).parents[2]
SCRIPT = "15: checkpoint, golden; 25: pause; 27: resume; 35: rollback golden --skip 3 --lr-scale 0.5; 65: advance"


def test_smoke_goes_through_the_whole_pipeline_by_script(run: Run) -> None:
    done = run.midwatch(
        "run", str(ROOT / "recipes/smoke.toml"), "--dir", str(run.root), "--headless", "--script", SCRIPT, timeout=150
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ledger = run.ledger()
    assert [(c.verb, c.state) for c in ledger.commands.values()] == [
        ("checkpoint", "done"),
        ("golden", "done"),
        ("pause", "done"),
        ("resume", "done"),
        ("rollback", "done"),
        ("advance", "done"),
    ], done.stdout
    assert ledger.lineages[2].cause == "rollback" and ledger.lineages[2].skip == 3
    products = {stage: ledger.stage_record(stage) for stage in ("pretrain", "extend", "sft", "dpo")}
    assert all(record is not None and record.product for record in products.values())
    assert products["extend"].stage_steps < 20, "it was cut short"
    samples = {s.stage for s in ledger.samples}
    assert samples == {"pretrain", "extend", "sft", "dpo"}
    losses = run.rows("eval/code/loss")
    assert losses[-1].value < losses[0].value
    made_from = run.state(products["dpo"].product)["origin"]
    assert (
        set(made_from["products"]) == {"pretrain", "extend", "sft"} and made_from["tokenizer"] and made_from["shards"]["pretrain"]
    )


def test_json_lines_tell_the_course(run: Run, data: Path) -> None:
    file = run.root.parent / "r.toml"
    file.write_text(recipe_text(data, steps=40, sft_steps=5))
    done = run.midwatch("run", str(file), "--dir", str(run.root), "--json", timeout=120)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows[-1]["state"] == "finished" and rows[-1]["step"] == 45
    assert any("event" in row for row in rows)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("num_layers = 1", "num_layer = 1"), r":\d+: model: unknown key 'num_layer' \(did you mean 'num_layers'"),
        (("hidden_size = 32", 'hidden_size = "wide"'), r":\d+: model\.hidden_size: expected `int`"),
        (("num_heads = 2", "num_heads = 3"), r":\d+: \[model\] hidden_size: 32 does not divide among 3 heads"),
        (("mixture = { code = 1.0 }", "mixture = { cod = 1.0 }"), r':\d+: stage "pretrain": .*did you mean "code"'),
        (("[tokenizer]\n", '[tokenizer]\npath = "none.model"\n'), r"there is no file"),
        (('origin = "stdlib-code"', 'origin = "text"\npath = "nowhere/*.txt"'), r"there is nothing at"),
        (("[model]\n", "[model\n"), r":\d+: not valid TOML"),
    ],
)
def test_a_bad_recipe_ends_with_2_before_anything_starts(run: Run, data: Path, change: tuple[str, str], says: str) -> None:
    file = run.root.parent / "bad.toml"
    text = recipe_text(data)
    assert change[0] in text
    file.write_text(text.replace(*change))
    done = run.midwatch("run", str(file), "--dir", str(run.root), "--headless")
    assert done.returncode == 2
    assert re.search(says, done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not run.root.exists()


def test_shards_of_another_recipe_end_with_2(undisturbed: Run, run: Run, data: Path) -> None:
    file = run.root.parent / "other.toml"
    file.write_text(recipe_text(data).replace("vocab = 512", "vocab = 600"))
    done = run.midwatch("run", str(file), "--dir", str(run.root), "--headless")
    assert done.returncode == 2 and "another spec" in done.stderr


def test_a_signal_stops_with_a_checkpoint_and_status_4_and_resume_goes_on(run: Run, data: Path) -> None:
    file = run.root.parent / "r.toml"
    file.write_text(recipe_text(data, steps=5000))
    process = subprocess.Popen(
        [MIDWATCH, "run", str(file), "--dir", str(run.root), "--headless"],
        env=run.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not (run.root / "control/address").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    run.wait_step(10)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 4, output
    stop = next(c for c in run.ledger().commands.values() if c.verb == "stop")
    assert stop.state == "done" and stop.detail["checkpoint"] in run.ledger().checkpoints
    run.done("resume")
    assert run.wait_step(stop.step + 5).lineage == 1


def begin(run: Run, data: Path, *, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    file = run.root.parent / "r.toml"
    file.write_text(recipe_text(data, steps=20_000))
    words = [MIDWATCH, "run", str(file), "--dir", str(run.root), "--headless"]
    return subprocess.Popen(words, env=run.environment, stdout=stdout, stderr=subprocess.PIPE, text=True)


def until(condition: Callable[[], object], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_a_batch_systems_signal_stops_with_a_checkpoint_and_a_full_disk_under_the_lines_stops_nothing(run: Run, data: Path) -> None:
    with open("/dev/full", "w") as full:
        process = begin(run, data, stdout=full.fileno())
    until((run.root / "control/address").exists)
    run.wait_step(3)
    process.send_signal(signal.SIGUSR1)
    _, told = process.communicate(timeout=60)
    stop = next(c for c in run.ledger().commands.values() if c.verb == "stop")
    assert (process.returncode, stop.state) == (4, "done") and "SIGUSR1: stop, with a checkpoint" in told
    assert stop.detail["checkpoint"] in run.ledger().checkpoints
    assert told.count("No space left on device; the run continues, and nothing more is printed") == 1


def test_a_run_whose_lines_nobody_reads_any_more_is_stopped_with_a_checkpoint(run: Run, data: Path) -> None:
    process = begin(run, data)
    until((run.root / "control/address").exists)
    run.wait_step(3)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    told = process.stderr.read()
    assert process.wait(60) == 4 and "nobody reads standard output any more: stop, with a checkpoint" in told
    stop = next(c for c in run.ledger().commands.values() if c.verb == "stop")
    assert stop.state == "done" and stop.detail["checkpoint"] in run.ledger().checkpoints
    assert gone([*run.ranks(), *run.agents()], 10)


def test_a_signal_while_the_run_is_being_started_leaves_nothing_running(run: Run, data: Path) -> None:
    process = begin(run, data)
    until((run.root / "recipe.toml").exists)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 4, told
    assert not run.ranks() and not run.agents()


RULES = """
[[watch]]
name = "early"
metric = "train/loss"
condition = { name = "reached", step = 3 }
action = "set lr_scale=0.5"
cooldown = 10000
[[watch]]
name = "enough"
metric = "train/loss"
below = 6.0
action = "stop"
"""
REACHED = """
from midwatch.watch_conditions import Judgement, WatchCondition


class Reached(WatchCondition):
    step: int

    def judge(self):
        return lambda step, value: Judgement(step >= self.step, f"step {self.step}")
"""


def test_watch_rules_set_and_stop_and_one_has_a_condition_of_another_package(run: Run, data: Path, tmp_path: Path) -> None:
    run.environment["PYTHONPATH"] = str(install(tmp_path / "site", "reached", REACHED, GROUP, reached="reached:Reached"))
    file = run.root.parent / "r.toml"
    file.write_text(recipe_text(data, steps=5000, extra=RULES))
    done = run.midwatch("run", str(file), "--dir", str(run.root), "--headless", timeout=120)
    assert done.returncode == 3, done.stdout + done.stderr
    change, stop = run.ledger().commands.values()
    assert (change.verb, change.arguments, change.state) == ("set", {"key": "lr_scale", "value": 0.5}, "done"), change.reason
    assert (stop.verb, stop.author) == ("stop", "watch rule enough")
    assert run.ledger().settings["lr_scale"] == 0.5
    assert "early: train/loss is" in done.stdout and "threshold: step 3" in done.stdout


def test_a_run_that_cannot_start_ends_with_1(run: Run, data: Path, undisturbed: Run, tmp_path: Path) -> None:
    text = tmp_path / "empty"
    text.mkdir()
    (text / "a.jsonl").write_text("not json\n" * 20)
    recipe = recipe_text(tmp_path / "shards").replace(
        'origin = "stdlib-code"\nmax_documents = 12', f'origin = "jsonl"\npath = "{text}/*.jsonl"'
    )
    file = run.root.parent / "r.toml"
    file.write_text(recipe)
    done = run.midwatch("run", str(file), "--dir", str(run.root), "--headless", timeout=120)
    assert done.returncode == 1, done.stdout + done.stderr
    assert 'source "code": none of its 20 records is a document (not JSON: 20)' in done.stdout and "Traceback" not in done.stdout


def test_ones_own_jsonl_and_text_files_train(run: Run, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    words = (ROOT / "README.md").read_text() * 20
    (corpus / "notes.md").write_text(words)
    lines = [json.dumps({"prompt": f"What is {n}?", "response": f"{n} is the number after {n - 1}."}) for n in range(400)]
    (corpus / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    recipe = recipe_text(tmp_path / "shards", steps=20, sft_steps=5)
    recipe = recipe.replace('origin = "stdlib-code"\nmax_documents = 12', f'origin = "text"\npath = "{corpus}/*.md"')
    recipe = recipe.replace('origin = "stdlib-sft"\nmax_documents = 120', f'origin = "jsonl"\npath = "{corpus}/pairs.jsonl"')
    file = run.root.parent / "r.toml"
    file.write_text(recipe)
    done = run.midwatch("run", str(file), "--dir", str(run.root), "--headless", timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_long_pause_resumes(run: Run, data: Path) -> None:
    run.start(recipe_text(data, steps=5000))
    run.wait_step(5)
    step = run.done("pause").step
    time.sleep(8)
    assert run.snapshot().step == step
    run.done("resume")
    assert run.wait_step(step + 10).generation == 1


@pytest.mark.soak
def test_a_pause_longer_than_every_timeout_resumes(run: Run, data: Path) -> None:
    run.start(recipe_text(data, steps=50_000))
    run.wait_step(5)
    step = run.done("pause").step
    time.sleep(35 * 60)
    run.done("resume")
    assert run.wait_step(step + 10).generation == 1
