"""Runs inside a job of PBS. There is no PBS here: `pbs_tmrsh` is a stand-in that does what pbs_tmrsh(8) says, on this machine."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.system.harness import Run, gone, recipe_text

TMRSH = """#!/bin/sh
# Input is nobody's; output and errors are the job's; the status is the command's.
[ -n "$PBS_ENVIRONMENT" ] && [ -n "$PBS_JOBID" ] && [ -r "$PBS_NODEFILE" ] || { echo "pbs_tmrsh: not in a job" >&2; exit 255; }
host=$1; shift
grep -qx "$host" "$PBS_NODEFILE" || { echo "pbs_tmrsh: host \\"$host\\" is not a node in job <$PBS_JOBID>" >&2; exit 255; }
[ "$1" = -n ] && shift
"$@" </dev/null >>"$JOB_OUTPUT.o" 2>>"$JOB_OUTPUT.e"
"""
CLUSTER = 'backend = "pbs"\ninterface = "lo"\nranks_per_node = 2'


def recipe(data: Path, **more: int) -> str:
    return recipe_text(data, **more).replace("ranks_per_node = 2", CLUSTER)


@pytest.fixture
def job(tmp_path: Path, make_run: Callable[[str], Run]) -> Run:
    """A run whose commands are given inside a job of one node, which PBS names once for each of two processes."""
    run = make_run("run")
    command = tmp_path / "bin" / "pbs_tmrsh"
    command.parent.mkdir()
    command.write_text(TMRSH)
    command.chmod(0o755)
    (tmp_path / "nodes").write_text(f"{socket.gethostname()}\n" * 2)
    run.environment = run.environment | {
        "PATH": f"{command.parent}:{run.environment.get('PATH', os.defpath)}",
        "PBS_ENVIRONMENT": "PBS_BATCH",
        "PBS_JOBID": "17.server",
        "PBS_NODEFILE": str(tmp_path / "nodes"),
        "JOB_OUTPUT": str(tmp_path / "job"),
    }
    return run


def test_a_run_trains_on_the_nodes_of_its_job(job: Run, data: Path) -> None:
    job.start(recipe(data, steps=12, sft_steps=2, every=6))
    ledger = job.wait_state("finished", timeout=120)
    assert ledger.step == 14
    assert [node.name for node in ledger.nodes] == [socket.gethostname()]
    assert not list(job.root.glob("logs/*/pbs.key")), "the agent's key is deleted once it has begun"
    assert gone(job.agents(), 20)


def test_an_agent_that_dies_is_started_again(job: Run, data: Path) -> None:
    job.start(recipe(data, steps=100_000, every=25))
    job.wait_step(5)
    job.kill(*job.agents())
    job.wait(lambda s: s.generation == 2 and s.state == "training", timeout=90)


def test_outside_a_job_the_run_says_what_it_needs(run: Run, data: Path) -> None:
    file = run.root.parent / "r.toml"
    file.write_text(recipe(data))
    done = run.midwatch("run", str(file), "--dir", str(run.root), "--headless", timeout=90)
    assert done.returncode != 0
    assert "this is no PBS job: PBS_NODEFILE is not set" in done.stdout + done.stderr


def test_a_command_that_is_not_there_is_named(job: Run, data: Path) -> None:
    Path(job.environment["PATH"].partition(":")[0], "pbs_tmrsh").unlink()
    file = job.root.parent / "r.toml"
    file.write_text(recipe(data))
    done = job.midwatch("run", str(file), "--dir", str(job.root), "--headless", timeout=90)
    assert done.returncode != 0
    assert "pbs_tmrsh cannot be started: No such file or directory" in done.stdout + done.stderr
