"""The command line over damaged and hostile files: a plain reason and exit status 1 or 2, or it works; never a traceback."""

from __future__ import annotations

import contextlib
import io
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from launcher.cli.__main__ import main
from shards.build.build import build
from shards.format import manifest
from shards.spec import Build, Data, Source, TokenizerSpec
from tests.fuzzing import COUNT, Subject, holds, scratch
from tests.hugging_face import RECIPES

COMMANDS = (
    ("inspect",), ("verify",), ("verify", "--quick"), ("cat", "--document", "0"), ("cat", "--tokens", "0:50"),
    ("cat", "--sample", "0", "--context", "32"), ("stats",), ("stats", "--quick"), ("diff", "WHOLE"), ("merge",),
)  # fmt: skip


def called(*words: str | Path) -> tuple[int, str]:
    """Exit status and standard error of `midwatch WORDS`, in this process: what it raises is raised here."""
    said, before = io.StringIO(), sys.argv
    sys.argv = ["midwatch", *map(str, words)]
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            try:
                status = main()
            except SystemExit as error:  # of argparse
                status = int(error.code or 0)
    finally:
        sys.argv = before
    return status, said.getvalue()


def is_plain(status: int, said: str) -> bool:
    return status in (0, 1, 2) and "Traceback" not in said and (status != 2 or bool(said.strip()))


def fuzz_recipe(place: Path, command: str) -> Subject:
    file = place / "recipe.toml"

    def load(raw: bytes) -> None:
        file.write_bytes(raw)
        status, said = called(command, file)
        assert is_plain(status, said), (status, said)

    return Subject(command, [(RECIPES / name).read_bytes() for name in ("demo.toml", "align.toml")], load, (), "toml", quick=80)


def small(place: Path) -> Path:
    source = Source(name="chat", kind="sft", origin="stdlib-sft", max_documents=40)
    data = Data(source=(source,), frame_tokens=256, shard_tokens=4096, held_out=0.1, level=3)
    return build(Build(data=data, tokenizer=TokenizerSpec(vocab=400, sample_bytes=50_000), out=str(place / "out")), workers=0)


def fuzz_shards(place: Path) -> Subject:
    """A manifest, with its digest, under one command after the other."""
    root = small(place)
    shutil.copytree(root, place / "whole")
    file = root / "chat" / "train" / manifest.FILE_NAME

    def seal(raw: bytes) -> bytes:
        try:
            said = msgspec.json.decode(raw, type=manifest.SplitManifest)
        except (ValueError, RecursionError):
            return raw
        return raw.replace(f'"digest":"{said.digest}"'.encode(), f'"digest":"{said.computed_digest()}"'.encode())

    def load(raw: bytes) -> None:
        file.write_bytes(raw)
        name, *rest = random.Random(raw).choice(COMMANDS)
        words = ["shards", name, str(root), *rest]
        if name == "merge":
            shutil.rmtree(place / "merged", ignore_errors=True)
            words = ["shards", "merge", str(place / "merged"), str(root)]
        status, said = called(*[str(place / "whole") if word == "WHOLE" else word for word in words])
        assert is_plain(status, said), (words, status, said)

    seed = msgspec.json.encode(msgspec.json.decode(file.read_bytes()))
    return Subject("shards commands", [seed], load, (), "json", seal=seal, quick=200)


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "check": lambda place: fuzz_recipe(place, "check"),
    "plan": lambda place: fuzz_recipe(place, "plan"),
    "shards": fuzz_shards,
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_command_on_a_damaged_file_says_why_in_plain_words(tmp_path: Path, name: str) -> None:
    with scratch(tmp_path) as place:
        holds(SUBJECTS[name](place))


@pytest.mark.soak
@pytest.mark.parametrize("name", SUBJECTS)
def test_a_command_on_thousands_of_damaged_files_says_why_in_plain_words(tmp_path: Path, name: str) -> None:
    with scratch(tmp_path) as place:
        holds(SUBJECTS[name](place), COUNT, seed=1)


@pytest.mark.parametrize("number", [10**300, "9" * 5000], ids=["300 digits", "5,000 digits"])
def test_an_argument_beyond_all_numbers_is_refused(number: object) -> None:
    status, said = called("plan", "--days", "9", "--gpus", str(number))
    assert status == 2 and "--gpus" in said


RECIPE_FAULTS = {
    "an integer of thousands of digits": (
        "seed = 7",
        f"seed = {'7' * 5000}",
        ":6: not valid TOML: an integer has thousands of digits",
    ),
    "an integer beyond 64 bits": ("seed = 7", f"seed = {10**23}", f":6: run.seed: {10**23} does not fit in 64 bits"),
    "layers beyond any model": (
        "num_layers = 4",
        "num_layers = 2147483648",
        "[model] num_layers: 2147483648 is more than any model has",
    ),
    "heads beyond any model": (
        "num_heads = 4",
        "num_heads = 2147483647",
        "[model] num_heads: 2147483647 is more than any model has",
    ),
    "ranks without end": ("ranks_per_node = 2", "ranks_per_node = 99999999999", "[cluster] ranks_per_node: must be at most"),
    "nodes without end": ("ranks_per_node = 2", 'nodes = "1:99999999999"', "[cluster] nodes: must be a number"),
    "a threshold that is no number": ("not_finite = true", "above = nan", "above: must be a finite number"),
}


@pytest.mark.parametrize("what", RECIPE_FAULTS)
def test_check_names_the_line_of_a_number_that_cannot_be(tmp_path: Path, what: str) -> None:
    old, new, says = RECIPE_FAULTS[what]
    text = (RECIPES / "demo.toml").read_text()
    assert old in text
    file = tmp_path / "r.toml"
    file.write_text(text.replace(old, new, 1))
    done = subprocess.run([sys.executable, "-m", "midwatch", "check", file], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) <= 3, done.stderr
