"""Parts that a package outside the tree brings, used through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.harness import Run, recipe_text

BACKEND = '''
"""A backend for machines of ours: this one, under another name."""

from launcher.backends.local import LocalBackend


class Here(LocalBackend):
    """Notes in a file that it was asked."""

    async def start(self, node):
        with open(self._paths.root / "asked", "a") as file:
            file.write(node + "\\n")
        return await super().start(node)
'''


@pytest.fixture
def package(tmp_path: Path, make_run: Callable[[str], Run]) -> Callable[[str, str], Run]:
    """Installs a package of one module with one entry point; returns a run that sees it."""

    def install(entry: str, code: str) -> Run:
        place = tmp_path / "site"
        information = place / "watchbits-1.0.dist-info"
        information.mkdir(parents=True)
        (place / "watchbits.py").write_text(code)
        (information / "METADATA").write_text("Metadata-Version: 2.1\nName: watchbits\nVersion: 1.0\n")
        (information / "entry_points.txt").write_text(entry)
        run = make_run("run")
        run.environment = run.environment | {"PYTHONPATH": str(place)}
        return run

    return install


def test_a_backend_of_another_package_starts_the_agents(package: Callable[[str, str], Run], data: Path) -> None:
    run = package("[midwatch.backends]\nhere = watchbits:Here\n", BACKEND)
    run.start(recipe_text(data, steps=6, sft_steps=2).replace("ranks_per_node = 2", 'backend = "here"\nranks_per_node = 2'))
    assert run.wait_state("finished", timeout=120).step == 8
    assert (run.root / "asked").read_text().count("\n") == 1


def test_a_broken_backend_is_named_and_stops_only_what_asks_for_it(package: Callable[[str, str], Run], data: Path) -> None:
    run = package("[midwatch.backends]\nhere = watchbits:Here\n", "import nothing_like_it\n")
    broken, sound = run.root.parent / "broken.toml", run.root.parent / "sound.toml"
    sound.write_text(recipe_text(data))
    broken.write_text(sound.read_text().replace("ranks_per_node = 2", 'backend = "here"\nranks_per_node = 2'))
    done = run.midwatch("check", str(broken))
    assert done.returncode == 2
    assert 'backend "here" of package watchbits cannot be loaded (watchbits:Here)' in done.stderr
    assert "No module named 'nothing_like_it'" in done.stderr and "Traceback" not in done.stderr
    assert run.midwatch("check", str(sound)).returncode == 0


def test_a_backend_that_nobody_brings_is_refused_with_those_there_are(package: Callable[[str, str], Run], data: Path) -> None:
    run = package("[midwatch.backends]\nhere = watchbits:Here\n", BACKEND)
    file = run.root.parent / "r.toml"
    file.write_text(recipe_text(data).replace("ranks_per_node = 2", 'backend = "there"\nranks_per_node = 2'))
    done = run.midwatch("check", str(file))
    assert done.returncode == 2
    assert "must be one of local, ssh, slurm, pbs, external, here, but it is 'there'" in done.stderr


READER = '''
"""Poems: paragraphs between lines of three stars."""

from shards.readers.files import stream
from shards.tokenization.records import Document

SUFFIXES = (".poem",)
KINDS = ("text",)
OPTIONS = ()


def read(source, unit, reading):
    for path in unit.paths:
        with stream(path, reading) as file:
            for number, part in enumerate(file.read().decode().split("***")):
                yield Document(f"{path}:{number}", (part.strip(),), ("text",), f"{path}:{number}")
'''


def spec(place: Path, out: Path, kind: str, poems: Path) -> str:
    source = {"name": "poems", "kind": kind, "origin": "poem", "path": str(poems)}
    place.write_text(json.dumps({"out": str(out), "tokenizer": {"vocab": 330}, "data": {"source": [source]}}))
    return str(place)


def test_a_reader_of_another_package_reads_a_source(package: Callable[[str, str], Run], tmp_path: Path) -> None:
    run = package("[midwatch.readers]\npoem = watchbits\n", READER)
    poems = tmp_path / "poems"
    poems.mkdir()
    (poems / "a.poem").write_text("***".join(f"The {n}th stanza, of moon and june, number {n}." for n in range(50)))
    place = tmp_path / "spec.json"
    done = run.midwatch("shards", "build", "--spec", spec(place, tmp_path / "out", "text", poems), timeout=120)
    assert done.returncode == 0, done.stderr
    shown = run.midwatch("shards", "inspect", str(tmp_path / "out"))
    assert "poem: " in shown.stdout and "1 files" in shown.stdout, shown.stdout
    done = run.midwatch("shards", "build", "--spec", spec(place, tmp_path / "out2", "sft", poems))
    assert done.returncode == 2 and 'origin poem is of kind "text"' in done.stderr


def test_a_broken_reader_is_named_and_stops_only_what_asks_for_it(package: Callable[[str, str], Run], data: Path) -> None:
    run = package("[midwatch.readers]\npoem = watchbits\n", "1 / 0\n")
    sound, broken = run.root.parent / "sound.toml", run.root.parent / "broken.toml"
    sound.write_text(recipe_text(data))
    broken.write_text(sound.read_text().replace('origin = "stdlib-code"', 'origin = "poem"\npath = "."'))
    done = run.midwatch("check", str(broken))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert 'reader "poem" of package watchbits cannot be loaded (watchbits): ZeroDivisionError: division by zero' in done.stderr
    assert run.midwatch("check", str(sound)).returncode == 0
