"""Builds whose steps run on a cluster: the same bytes as at home."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from shards.build.build import build
from shards.common.errors import ShardError
from shards.filters.settings import Quality
from shards.readers import stdlib
from shards.spec import Build, Clean, Data, Slurm, Source, TokenizerSpec
from tests.system.slurm import Slurm as RealSlurm
from tests.system.slurm import require_slurm


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Build:
    directory = tmp_path_factory.mktemp("inputs")
    texts = [path.read_bytes().decode("utf-8", "replace") for _, path in stdlib.files()][:80]
    for number in range(4):
        own = texts[number::4] + texts[:2]
        (directory / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in own))
    source = Source(name="a", kind="text", origin="jsonl", path=str(directory))
    data = Data(source=(source,), clean=Clean(chunk_bytes=200_000), frame_tokens=1024, held_out=0.1, executor_tasks=3)
    return Build(data=data, tokenizer=TokenizerSpec(vocab=800, sample_bytes=200_000), out="")


def content(out: Path) -> dict[str, bytes]:
    names = [path for path in out.rglob("*") if path.is_file() and path.name not in ("build.json", ".lock")]
    return {str(path.relative_to(out)): path.read_bytes() for path in names}


@pytest.fixture(scope="module")
def home(spec: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the build gives here."""
    return content(build(msgspec.structs.replace(spec, out=str(tmp_path_factory.mktemp("home") / "out")), workers=0))


def on(spec: Build, executor: str, out: Path) -> Build:
    slurm = Slurm(partition="all", time="0:10:00", sbatch={"mem-per-cpu": "1M"})  # of which its nodes say they have none
    data = msgspec.structs.replace(spec.data, executor=executor, slurm=slurm)
    return msgspec.structs.replace(spec, data=data, out=str(out))


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealSlurm]:
    require_slurm()
    with RealSlurm(("n1", "n2"), tmp_path_factory.mktemp("slurm")) as made:
        yield made


def test_slurm_jobs_build_the_same(spec: Build, home: dict[str, bytes], slurm: RealSlurm, tmp_path: Path) -> None:
    path = tmp_path / "spec.json"
    path.write_bytes(msgspec.json.encode(on(spec, "slurm", tmp_path / "out")))
    done = slurm.run(sys.executable, "-m", "shards", "build", "--spec", str(path), "--workers", "0", timeout=150)
    assert done.returncode == 0, done.stdout + done.stderr + slurm.logs()
    assert content(tmp_path / "out") == home
    assert "jobs" not in {each.name for each in (tmp_path / "out").iterdir()}


def test_a_partition_that_is_not_there_is_said(spec: Build, slurm: RealSlurm, tmp_path: Path) -> None:
    build = on(spec, "slurm", tmp_path / "out")
    other = msgspec.structs.replace(build.data, slurm=Slurm(partition="nowhere"))
    path = tmp_path / "spec.json"
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(build, data=other)))
    done = slurm.run(sys.executable, "-m", "shards", "build", "--spec", str(path), "--workers", "0", timeout=60)
    assert done.returncode == 2
    assert 'there is no partition "nowhere" (there are: all;' in done.stderr and "Traceback" not in done.stderr


@pytest.mark.soak  # Ray takes five seconds a step to begin
def test_ray_tasks_build_the_same(spec: Build, home: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        assert content(build(on(spec, "ray", tmp_path / "out"), workers=0)) == home
    finally:
        ray.shutdown()


@pytest.mark.soak
def test_what_ended_a_task_elsewhere_is_said(spec: Build, tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "one document is not enough"}\n')
    data = msgspec.structs.replace(spec.data, clean=Clean(quality=Quality(good=str(few), bad=str(few))))
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        with pytest.raises(ShardError, match=r"training judges: the ray jobs ended and did nothing: .*1 good examples"):
            build(on(msgspec.structs.replace(spec, data=data), "ray", tmp_path / "out"), workers=0)
    finally:
        ray.shutdown()
