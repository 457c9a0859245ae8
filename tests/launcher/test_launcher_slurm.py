"""Slurm, without one: the batch script, what a job's standing is in words, and who reads a key file."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import msgspec
import pytest

from launcher.backends.base import StartError
from launcher.backends.external import JoiningBackend
from launcher.backends.slurm.jobs import Job, JobState, SlurmError, elsewhere, read_job, script, write_job
from midwatch.directory_identity import DirectoryId
from midwatch.journal.run_identity import claim
from midwatch.recipe import Cluster, Parallel, parse_recipe
from midwatch.run_directory import Address, RunPaths
from midwatch.transport.node_join import NodeJoin, check_url, make_key, read_key_file, ways_to
from midwatch.transport.tls_identity import KeysError
from tests.system.harness import recipe_text

CLUSTER = """backend = "slurm"
nodes = "12:16"
setup = ["module load cuda"]
threads = 4
[cluster.sbatch]
partition = "gpu"
time = "2-00:00:00"
signal_seconds = 120
lines = ["--gres=gpu:8", "#SBATCH --comment='a b'"]
"""


def batch_script(root: Path, name: str = "tiny") -> str:
    text = recipe_text(Path("/data"), steps=5).replace('device = "cpu"\n', f'device = "cpu"\n{CLUSTER}', 1).replace("tiny", name)
    return script(root, parse_recipe(text))


def test_the_batch_script_says_what_the_recipe_does() -> None:
    text = batch_script(Path("/shared/runs/a 100%"))
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]
    assert options[0] == "--job-name=tiny" and {"--nodes=12-16", "--requeue", "--no-kill"} <= set(options)
    assert {"--cpus-per-task=8", "--signal=B:USR1@120", "--partition=gpu", "--time=2-00:00:00"} <= set(options)
    assert '--output="/shared/runs/a 100%%/logs/slurm.log"' in options
    assert options[-2:] == ["--gres=gpu:8", "--comment='a b'"], "the operator's own come last, and win"
    assert (
        text.startswith("#!/bin/sh\n")
        and "\nmodule load cuda\nexec " in text
        and "-m launcher.backends.slurm.batch_main '/shared/runs/a 100%'" in text
    )
    assert subprocess.run(["sh", "-n"], input=text, text=True).returncode == 0


def test_slurm_is_asked_for_as_many_nodes_as_the_model_can_use() -> None:
    text = recipe_text(Path("/data"), steps=5).replace('device = "cpu"\n', f'device = "cpu"\n{CLUSTER}', 1)
    recipe = msgspec.structs.replace(parse_recipe(text), parallel=Parallel(pipeline=5))
    assert "\n#SBATCH --nodes=15\n" in script(Path("/run"), recipe)


def test_what_sbatch_cannot_be_told_is_refused() -> None:
    with pytest.raises(SlurmError, match="quote"):
        batch_script(Path('/shared/"x'))


def test_a_standing_in_words() -> None:
    waits = JobState("PENDING", "Resources", "2026-01-02T03:04:05")
    assert str(waits) == "pending (Resources), expected to start 2026-01-02 03:04:05"
    assert not waits.over and not waits.runs
    held = str(JobState("PENDING", "JobHeldUser", "2026-01-02T03:04:05"))
    assert held == "pending (JobHeldUser), and does not start by itself: it is held; scontrol release JOB lets it start"
    assert str(JobState("RUNNING", "None", "2026-01-02T03:04:05")) == "running"
    assert JobState("TIMEOUT").over and JobState("RUNNING").runs and not JobState("COMPLETING").over


def test_a_run_remembers_its_job(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    assert read_job(paths) is None and elsewhere(tmp_path) is None
    write_job(paths, Job("12", submitted=False))
    assert read_job(paths) == Job("12", submitted=False, directory=DirectoryId.of(paths.root))
    assert elsewhere(tmp_path) is None, "what lives in somebody else's allocation is found as any run is"
    paths.job.write_text("nonsense")
    assert read_job(paths) is None


@pytest.mark.parametrize("url", ["ws://a:1", "wss://a", "wss://:1", "wss://a:1/x", "wss://a:99999", "a:1", "wss://[::1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    assert "must be wss://HOST:PORT" in check_url(url)


def test_addresses_that_are_some() -> None:
    assert check_url("wss://a:1") == check_url("wss://[fd00::1]:7700/") == ""


def test_a_node_that_joins_tries_what_was_announced_and_what_it_was_told() -> None:
    told = NodeJoin("wss://told:1", "key")
    address = Address(term=1, url="unix:x", host="h", pid=1, remote="wss://a:1", also=("wss://told:1",))
    assert ways_to(None, None) == () and ways_to(None, told) == ("wss://told:1",)
    assert ways_to(address, told) == ("wss://a:1", "wss://told:1") == ways_to(address, None)


def test_a_key_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "run")
    paths.create()
    run = claim(paths, ()).run
    copy = RunPaths(Path(shutil.copytree(paths.root, tmp_path / "copy")))
    with pytest.raises(KeysError, match="a copy of another run"):
        make_key(copy, "n1")
    file = tmp_path / "key"
    file.touch(mode=0o600)
    file.write_bytes(make_key(paths, "n1"))
    key = read_key_file(file)
    assert (key.run, key.run_key) == (str(paths.root), run) and "PRIVATE" not in repr(key)
    for mode in (0o644, 0o604, 0o660, 0o620):
        file.chmod(mode)
        with pytest.raises(KeysError, match="others can read"):
            read_key_file(file)
    file.chmod(0o600)
    file.write_text("{}")
    with pytest.raises(KeysError, match="midwatch node key"):
        read_key_file(file)


async def test_nobody_starts_a_node_that_joins_by_itself(tmp_path: Path) -> None:
    backend = JoiningBackend(RunPaths(tmp_path), Cluster())
    assert backend.nodes == ()
    with pytest.raises(StartError, match="joins again"):
        await backend.start("n1")


@pytest.mark.parametrize(("limit", "again"), [("4:00", False), ("6:00", True), ("UNLIMITED", True)])
def test_a_job_whose_limit_leaves_no_time_to_train_is_not_queued_again(
    limit: str, again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The limit may be the partition's default, which the recipe does not say."""
    from test_launcher_recipe import GOOD

    from launcher.backends.slurm import batch_main

    paths = RunPaths(tmp_path)
    paths.recipe.write_text(GOOD + '\n[cluster]\nbackend = "slurm"\nnodes = 1\n')
    monkeypatch.setattr(batch_main, "time_limit", lambda job: limit)
    assert batch_main.Keeper(paths, "12")._worth_it() is again
    assert ("time limit is 240 s" in capsys.readouterr().err) is not again
