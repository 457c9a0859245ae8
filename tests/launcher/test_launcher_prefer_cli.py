"""`midwatch prefer` on a run that is over: screen, controller and probe, the first two killed; and shards of what was chosen."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest
from launcher_model import talking_recipe, write_model, write_tokenizer

from midwatch.journal import entries as j
from midwatch.journal.journal import Journal
from midwatch.protocol import Lineage
from midwatch.recipe import dump_recipe
from midwatch.run_directory import read_address
from shards.build.build import build
from shards.sampling.batches import BatchFeed
from shards.spec import Build, Data, Source, TokenizerSpec

READ = 0.5
"""Seconds that a pair is in sight before a key is pressed."""


@pytest.fixture
def over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A finished run with a checkpoint, and no controller."""
    for name, place in (("XDG_RUNTIME_DIR", "r"), ("XDG_CACHE_HOME", "c")):
        (tmp_path / place).mkdir(mode=0o700)
        monkeypatch.setenv(name, str(tmp_path / place))
    root, recipe = tmp_path / "run", talking_recipe()
    (root / "journal").mkdir(parents=True)
    (root / "recipe.toml").write_text(dump_recipe(recipe))
    write_tokenizer(root)
    digest = write_model(recipe, root, "a", "a", 50)
    journal = Journal(root / "journal", 1.0, "host", 1)
    committed = j.CheckpointCommitted(
        time=2.0, id="a", digest=digest, step=50, lineage=1, stage="first", stage_step=50, ended=True, generation=1, bytes=1,
        suspect=False, seconds=0.1, stall_seconds=0.0,
    )  # fmt: skip
    lineage = Lineage(id=1, time=1.0)
    journal.append(
        j.RunBegan(time=1.0, name="talk", recipe=recipe.digest()),
        j.LineageOpened(time=1.0, lineage=lineage),
        committed,
        j.StateChanged(time=3.0, state="finished"),
    )
    journal.close()
    yield root
    if (root / "control" / "address").exists():
        with contextlib.suppress(ProcessLookupError):
            os.kill(controller(root), signal.SIGKILL)


def controller(root: Path) -> int:
    address = read_address(root / "control" / "address")
    assert address is not None
    return address.pid


def lines(root: Path) -> list[dict[str, Any]]:
    file = root / "preferences" / "anna.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


class Screen:
    """A real process at a real terminal."""

    def __init__(self, root: Path, prompts: Path) -> None:
        words = ["-P", "-m", "midwatch", "prefer", str(root), "--as", "anna", "--prompts", str(prompts), "--limit", "6"]
        self.root = root
        self.process = pexpect.spawn(sys.executable, words, timeout=40, dimensions=(24, 100), env={**os.environ, "TERM": "xterm"})
        self.process.expect("which is the better answer")

    def decide(self, key: str) -> None:
        before = len(lines(self.root))
        self.press(key)
        self.until(lambda: len(lines(self.root)) == before + 1)

    def press(self, key: str) -> None:
        time.sleep(READ)
        self.process.send(key)

    def until(self, condition: Callable[[], object], seconds: float = 30.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            with contextlib.suppress(pexpect.TIMEOUT):
                self.process.expect("\0", timeout=0.05)  # so that what it draws is read


def midwatch(*words: str) -> str:
    done = subprocess.run([sys.executable, "-P", "-m", "midwatch", "prefer", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_chosen_survives_every_kill_and_becomes_shards_that_reward_and_dpo_read(over: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"all is well at turn {n} of the watch" for n in range(12)))
    screen = Screen(over, prompts)
    screen.decide("1")
    first = controller(over)
    os.kill(first, signal.SIGKILL)
    screen.press("2")
    screen.until(lambda: len(lines(over)) == 2 and controller(over) != first)
    screen.decide("t")
    screen.process.kill(signal.SIGKILL)
    screen.process.wait()

    screen = Screen(over, prompts)
    for key in ("u", "2", "1", "x"):
        screen.decide(key)
    screen.process.send("q")
    screen.process.expect("the run is finished")
    told = lines(over)
    assert [each.get("choice", "undo") for each in told] == ["left", "right", "tie", "undo", "right", "left", "both-bad"]
    assert told[3]["decision"] == told[2]["id"] and told[4]["pair"] == told[2]["pair"], "the pair that was taken back came again"
    standing = [told[0], told[1], *told[4:]]
    assert len({each["pair"] for each in standing}) == len(standing) == 5

    found = json.loads(midwatch(str(over), "--agreement", "--json"))
    assert (found["decisions"], found["left"]["hits"], found["left"]["count"]) == ({"anna": 5}, 2, 4)
    assert "anna 5" in midwatch(str(over), "--agreement")
    out = tmp_path / "pairs.jsonl"
    assert "4 pairs; left out: 1 both bad" in midwatch(str(over), "--export", str(out))
    assert out.read_bytes() == (over / "preferences" / "pairs.jsonl").read_bytes(), "kept current all along"

    source = Source(name="chosen", kind="preference", origin="jsonl", path=str(over / "preferences" / "pairs.jsonl"))
    tokenizer = TokenizerSpec(path=str(over / "data" / "tokenizer.model"))
    shards = build(Build(data=Data(source=(source,), held_out=0.0), tokenizer=tokenizer, out=str(tmp_path / "shards")), workers=0)
    for objective in ("preference", "scored"):
        feed = BatchFeed(shards, "train", objective, 256, {"chosen": 1}, 0)  # type: ignore[arg-type]
        assert feed.samples_per_epoch("chosen") == 4
        batch = feed.read(0, 4)
        assert batch.tokens.shape == (8, 256) and (batch.mask.sum(axis=1) > 0).all()
    text = "".join(feed.decode(n) for n in range(4))
    assert all(each["prompt"][0]["content"] in text for each in map(json.loads, out.read_text().splitlines()))


def test_without_a_terminal_it_says_what_needs_none(over: Path) -> None:
    command = [sys.executable, "-P", "-m", "midwatch", "prefer", str(over)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and "--agreement" in done.stderr
    done = subprocess.run([*command, "--as", "../x"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "cannot name an annotator" in done.stderr
    assert "none yet" in midwatch(str(over), "--agreement")
