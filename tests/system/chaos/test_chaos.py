"""Faults at random moments, on real hosts: nothing that was promised is broken, and the weights are those of a quiet run."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.system.chaos.faults import Theatre
from tests.system.chaos.invariants import broken
from tests.system.chaos.play import Play
from tests.system.harness import Run, gone, recipe_text
from tests.system.hosts import Hosts, require
from tests.system.preload import built

NAMES = ("n1", "n2", "n3")
FAULTS = int(os.environ.get("CHAOS_FAULTS", "500"))
KINDS = tuple(filter(None, os.environ.get("CHAOS_KINDS", "").split(",")))


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The run's own disk, small enough to be filled."""
    require()
    place = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", str(place)], check=True)
    subprocess.run(["mount", "--make-shared", str(place)], check=True)  # what is mounted in it is seen by the hosts too
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="module")
def hosts(disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(NAMES, tmp_path_factory.mktemp("hosts")) as made:
        yield made


@pytest.fixture
def errors(tmp_path: Path) -> Path:
    """A file that says with which error the controller's writes to the journal fail."""
    file = tmp_path / "errors"
    file.write_text("0")
    return file


def begin(make_run: Callable[[str], Run], data: Path, hosts: Hosts, disk: Path, clock: Path, errors: Path) -> Run:
    run = make_run("chaos")
    run.root = disk / f"run-{os.getpid()}-{random.getrandbits(32):08x}"
    libraries = f"{clock.parent / 'clock.so'} {built('disk', clock.parent)}"
    files = {"CLOCK_FILE": str(clock), "DISK_FILE": str(errors)}
    run.environment = {**run.environment, **files, "LD_PRELOAD": libraries}
    options = ", ".join(f'"{o}"' for o in hosts.options)
    nodes = 'backend = "ssh"\nhosts = ["n[1-3]"]\nnodes = 2\nranks_per_node = 1\nquarantine_after = 1_000_000'
    cluster = f"{nodes}\nssh_options = [{options}]"
    text = recipe_text(data, steps=1_000_000, every=20, restarts=20).replace("ranks_per_node = 2", cluster)
    file = disk.parent / f"{run.root.name}.toml"
    file.write_text(text)
    done = run.midwatch("run", str(file), "--dir", str(run.root), "--detach", "--no-check")
    assert done.returncode == 0, done.stderr
    return run


def ends_as_if_nothing_had_been(run: Run, make_run: Callable[[str], Run], data: Path) -> None:
    """The losses along the line, and the weights at its end, are bit for bit those of a run on one machine that nobody touched."""
    end = run.done("checkpoint")
    step, saved = end.step, str(end.detail["checkpoint"])
    mine = [(row.step, row.value) for row in run.rows("train/loss") if row.step <= (step or 0)]
    weights = run.weights(saved)
    run.done("stop")
    quiet = make_run(f"quiet-{run.root.name}")
    quiet.start(recipe_text(data, steps=1_000_000, every=100_000).replace("every = 100000", f"every = {step}"))
    quiet.wait(lambda s: any(c.step == step for c in s.checkpoints), 300)
    theirs = [(row.step, row.value) for row in quiet.rows("train/loss") if row.step <= (step or 0)]
    assert mine == theirs
    assert weights == quiet.weights(next(c.id for c in quiet.snapshot().checkpoints if c.step == step))
    quiet.done("stop-now")


def test_a_few_faults(make_run: Callable[[str], Run], data: Path, hosts: Hosts, disk: Path, clock: Path, errors: Path) -> None:
    run = begin(make_run, data, hosts, disk, clock, errors)
    play = Play(Theatre(run, hosts, disk, clock, errors), seed=int(os.environ.get("CHAOS_SEED", "11")))
    for kinds in (
        ("rank killed",),
        ("controller killed", "scan", "rank forged", "clock"),
        ("link cut",),
        ("journal errs", "checkpoints away"),
    ):
        print(play.act(*kinds))
    assert broken(run) == []
    ends_as_if_nothing_had_been(run, make_run, data)


@pytest.mark.soak
def test_no_host_keeps_a_process_of_a_deleted_run(
    make_run: Callable[[str], Run], data: Path, hosts: Hosts, disk: Path, clock: Path, errors: Path
) -> None:
    run = begin(make_run, data, hosts, disk, clock, errors)
    run.wait_step(20)
    before = [run.controller(), *run.agents(), *run.ranks(), *run.forks()]
    deadline = time.monotonic() + 20
    while run.root.exists() and time.monotonic() < deadline:
        shutil.rmtree(run.root, ignore_errors=True)  # whoever writes while it is deleted makes it fail
        time.sleep(0.05)
    assert gone(before, 20) and not run.root.exists()


@pytest.mark.soak
def test_many_faults(make_run: Callable[[str], Run], data: Path, hosts: Hosts, disk: Path, clock: Path, errors: Path) -> None:
    """CHAOS_FAULTS of them from CHAOS_SEED on, of CHAOS_KINDS or of any; fifty a run, which is then compared with a quiet one."""
    seed = int(os.environ.get("CHAOS_SEED", "1"))
    dice = random.Random(seed)
    done = 0
    while done < FAULTS:
        run = begin(make_run, data, hosts, disk, clock, errors)
        play = Play(Theatre(run, hosts, disk, clock, errors), seed=seed + done)
        for _ in range(min(50, FAULTS - done)):
            count = 1 if dice.random() < 0.8 else 2
            cost = play.act(*(dice.choice(KINDS) if KINDS else None for _ in range(count)))
            done += 1
            print(done, cost, flush=True)
            assert broken(run) == [], run.story()
        ends_as_if_nothing_had_been(run, make_run, data)
        shutil.rmtree(run.root, ignore_errors=True)
