"""Parts that a package outside the tree brings, used through the command line."""

from __future__ import annotations

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
