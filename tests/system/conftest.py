from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.harness import Run, recipe_text
from tests.system.preload import built


@pytest.fixture(scope="session")
def environment() -> Iterator[dict[str, str]]:
    """Directories of their own for sockets, caches and home, short enough for a socket's path."""
    base = Path(tempfile.mkdtemp(prefix="mw-"))
    runtime = base / "run"
    runtime.mkdir(mode=0o700)
    places = {"HOME": str(base), "XDG_RUNTIME_DIR": str(runtime), "XDG_CACHE_HOME": str(base / "cache")}
    before = {k: os.environ.get(k) for k in places}
    yield {**os.environ, **places, "OMP_NUM_THREADS": "1"}
    for key, value in before.items():
        if value is None:
            os.environ.pop(key, None)
        else:
            os.environ[key] = value
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards that all runs of the session share; the first run builds them."""
    return tmp_path_factory.mktemp("data") / "shards"


@pytest.fixture
def make_run(tmp_path: Path, environment: dict[str, str]) -> Iterator[Callable[[str], Run]]:
    made: list[Run] = []

    def make(name: str = "run") -> Run:
        run = Run(tmp_path / name, environment)
        made.append(run)
        return run

    yield make
    for run in made:
        run.clear()


@pytest.fixture
def run(make_run: Callable[[str], Run]) -> Run:
    return make_run("run")


@pytest.fixture
def clock(tmp_path: Path) -> Path:
    """A file that says by how many seconds the clock is wrong, read by a library that is loaded before the C library."""
    built("clock", tmp_path)
    file = tmp_path / "clock"
    file.write_text("0")
    return file


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], data: Path) -> Iterator[Run]:
    """A run of the default recipe that nobody touched, finished."""
    run = Run(tmp_path_factory.mktemp("reference") / "run", environment)
    run.start(recipe_text(data))
    run.wait_state("finished", timeout=120)
    yield run
    run.clear()
