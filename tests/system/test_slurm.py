"""The Slurm that the system tests run on: it runs jobs on its nodes and leaves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.slurm import Slurm, require_slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    require_slurm()
    with Slurm(("n1", "n2"), tmp_path_factory.mktemp("slurm")) as made:
        yield made


def test_a_command_runs_on_both_nodes(slurm: Slurm) -> None:
    done = slurm.run("srun", "-N2", "hostname")
    assert sorted(done.stdout.split()) == ["n1", "n2"], done.stderr + slurm.logs()


def test_a_batch_job_runs_a_step_on_all_its_nodes(slurm: Slurm, tmp_path: Path) -> None:
    script, out = tmp_path / "job.sh", tmp_path / "out"
    script.write_text("#!/bin/sh\nhostname\nsrun hostname\n")
    done = slurm.run("sbatch", "-N2", "-o", str(out), str(script))
    assert done.returncode == 0, done.stderr + slurm.logs()
    slurm.wait_for("squeue -h", "")
    first, *rest = out.read_text().split()
    assert (first, sorted(rest)) == ("n1", ["n1", "n2"])


def test_nothing_is_left_of_it(tmp_path: Path) -> None:
    require_slurm()
    with Slurm(("n1",), tmp_path) as slurm:
        slurm.run("sbatch", "-o", "/dev/null", "--wrap", "sleep 100")
        slurm.wait_for("squeue -h -o %t", "R")
        place, processes = slurm.configuration.parent, slurm.hosts.pids("n1")
        assert len(processes) >= 3, "sshd, slurmd and slurmstepd at least"
    assert not place.exists()
    assert slurm.hosts.pids("n1") == []
