"""Checkpoints on disk: any number of ranks, no pickle, and nothing of a damaged one reaches a live tensor."""

from __future__ import annotations

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from trainer_harness import (
    MakeRun,
    Ranks,
    Step,
    Told,
    fresh,
    logged,
    logs,
    losses,
    same_bits,
    start_ranks,
    steer,
    tensors,
    train_plain,
)

from midwatch.checkpoint_format import manifest, verify
from midwatch.checkpoint_format.manifest import FORMAT, CheckpointError, Manifest
from midwatch.protocol import Op
from trainer.checkpoint import storage
from trainer.checkpoint.direct_io import BLOCK, Sink, block_tensor, blocks
from trainer.control.standalone import committed, newest, prune, sweep

HEAD = Manifest(format=FORMAT, id="7-1", generation=1, files={}, state={"step": 7}, tensors={}, world=1)


@pytest.fixture(scope="module")
def alone() -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert dist.group.WORLD is not None
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def saved(alone: dist.ProcessGroup, tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    content = {
        "matrix": torch.randn(37, 5, generator=generator),
        "half": torch.randn(9, generator=generator).bfloat16(),
        "count": torch.tensor(3.0),
        "none": torch.empty(0, 4),
    }
    directory = tmp_path / "7-1"
    storage.save(directory, content, content, HEAD, alone, lambda: False)
    return directory, content


def load(directory: Path, targets: dict[str, Tensor], group: dist.ProcessGroup) -> None:
    known, _ = manifest.read(directory)
    storage.load(directory, known, targets, lambda problem: problem, group)


def blank(content: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.full_like(tensor, 5) for name, tensor in content.items()}


def untouched(targets: dict[str, Tensor]) -> bool:
    return all(bool((tensor == 5).all()) for tensor in targets.values())


def test_what_is_loaded_is_what_was_saved(saved: tuple[Path, dict[str, Tensor]], alone: dist.ProcessGroup) -> None:
    directory, content = saved
    targets = blank(content)
    load(directory, targets, alone)
    assert all(torch.equal(targets[name], tensor) for name, tensor in content.items())
    assert verify.problems(directory) == []


def test_the_format_is_as_described(saved: tuple[Path, dict[str, Tensor]]) -> None:
    directory, content = saved
    assert sorted(path.name for path in directory.iterdir()) == ["manifest.msgpack", "rank-00000.bin"]
    raw = msgspec.msgpack.decode((directory / "manifest.msgpack").read_bytes())
    assert manifest.read_header(directory).files == manifest.read(directory)[0].files, "which the controller reads"
    assert (raw["format"], raw["id"], raw["generation"], raw["world"], raw["state"]) == (3, "7-1", 1, 1, {"step": 7})
    assert all(chunk["start"] % 64 == 0 for entry in raw["tensors"].values() for chunk in entry["chunks"])
    entry = raw["tensors"].pop("half")
    assert entry["dtype"] == "bfloat16"
    (directory / "manifest.msgpack").write_bytes(msgspec.msgpack.encode(raw))
    assert np.array_equal(tensors(directory)["matrix"], content["matrix"].numpy())


def flip(directory: Path) -> str:
    file = directory / "rank-00000.bin"
    content = bytearray(file.read_bytes())
    content[700] ^= 0x10
    file.write_bytes(content)
    return "rank-00000.bin"


def truncate(directory: Path) -> str:
    file = directory / "rank-00000.bin"
    os.truncate(file, file.stat().st_size - 10)
    return "rank-00000.bin"


def lose(directory: Path) -> str:
    (directory / "rank-00000.bin").unlink()
    return "rank-00000.bin"


def lose_manifest(directory: Path) -> str:
    (directory / "manifest.msgpack").unlink()
    return "manifest.msgpack"


class Trap:
    """Makes a directory when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.place),)


def booby_trap(directory: Path) -> str:
    trap = pickle.dumps(Trap(directory / "sprung"))
    (directory / "manifest.msgpack").write_bytes(trap)
    (directory / ".metadata").write_bytes(trap)
    return "manifest.msgpack"


def reach_outside(directory: Path) -> str:
    (directory.parent / "other.bin").write_bytes((directory / "rank-00000.bin").read_bytes())
    return _change(directory, lambda raw: {**raw, "files": {**raw["files"], "../other.bin": raw["files"]["rank-00000.bin"]}})


def other_format(directory: Path) -> str:
    return _change(directory, lambda raw: {**raw, "format": 1})


def hole(directory: Path) -> str:
    def change(raw: dict[str, Any]) -> dict[str, Any]:
        raw["tensors"]["matrix"]["chunks"] = []
        return raw

    return _change(directory, change)


def overrun(directory: Path) -> str:
    def change(raw: dict[str, Any]) -> dict[str, Any]:
        raw["tensors"]["matrix"]["chunks"][0]["start"] = 1 << 40
        return raw

    return _change(directory, change)


def _change(directory: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> str:
    file = directory / "manifest.msgpack"
    file.write_bytes(msgspec.msgpack.encode(change(msgspec.msgpack.decode(file.read_bytes()))))
    return "manifest.msgpack"


@pytest.mark.parametrize("damage", [flip, truncate, lose, lose_manifest, booby_trap, reach_outside, other_format, hole, overrun])
def test_a_damaged_checkpoint_is_refused_by_name_and_changes_nothing(
    damage: Callable[[Path], str], saved: tuple[Path, dict[str, Tensor]], alone: dist.ProcessGroup
) -> None:
    directory, content = saved
    bad = damage(directory)
    targets = blank(content)
    with pytest.raises(CheckpointError, match=bad):
        load(directory, targets, alone)
    assert untouched(targets)
    assert any(bad in problem for problem in verify.problems(directory))
    assert not (directory / "sprung").exists()


def test_every_flipped_bit_is_noticed(saved: tuple[Path, dict[str, Tensor]], alone: dist.ProcessGroup) -> None:
    directory, content = saved
    file = directory / "rank-00000.bin"
    whole = file.read_bytes()
    for at in range(0, len(whole), 13):
        changed = bytearray(whole)
        changed[at] ^= 1
        file.write_bytes(changed)
        assert verify.problems(directory)
        targets = blank(content)
        try:
            load(directory, targets, alone)
        except CheckpointError:
            assert untouched(targets)
        else:  # a zero between chunks, which is no tensor's
            assert all(torch.equal(targets[name], tensor) for name, tensor in content.items())


def test_another_models_checkpoint_is_refused(saved: tuple[Path, dict[str, Tensor]], alone: dist.ProcessGroup) -> None:
    directory, _ = saved
    for targets in ({"matrix": torch.zeros(37, 6)}, {"matrix": torch.zeros(37, 5).double()}, {"missing": torch.zeros(1)}):
        with pytest.raises(CheckpointError, match=r"manifest\.msgpack.*(matrix|missing)"):
            load(directory, targets, alone)


def test_a_save_given_up_leaves_no_manifest(alone: dist.ProcessGroup, tmp_path: Path) -> None:
    content = {"a": torch.zeros(10)}
    with pytest.raises(storage.Abandoned):
        storage.save(tmp_path / "x", content, content, HEAD, alone, lambda: True)
    assert not (tmp_path / "x" / "manifest.msgpack").exists()


def test_tensors_of_another_layout_are_planned_anew(alone: dist.ProcessGroup, tmp_path: Path) -> None:
    for number, shape in enumerate([(3, 2), (3, 2), (2, 3), (7,), (7,)]):
        content = {"a": torch.rand(shape), "b": torch.rand(2, number + 1 if number > 2 else 1)}
        storage.save(tmp_path / f"{number}", content, content, HEAD, alone, lambda: False)
        targets = blank(content)
        load(tmp_path / f"{number}", targets, alone)
        assert all(torch.equal(targets[name], tensor) for name, tensor in content.items())


def test_memory_of_any_place_is_written_in_whole_blocks() -> None:
    laid_out = block_tensor(torch.Size((5, 300)), torch.float32)
    laid_out.copy_(torch.rand(5, 300))
    around = torch.rand(3 * BLOCK)
    for tensor in (laid_out, around[1:1501].view(5, 300), laid_out.t(), block_tensor(torch.Size(()), torch.int64).fill_(7)):
        data = blocks(tensor)
        plain = tensor.contiguous().numpy().tobytes()
        assert len(data) % BLOCK == 0 and bytes(data) == plain + bytes(-len(plain) % BLOCK)
    assert blocks(laid_out).obj.ctypes.data == laid_out.data_ptr(), "what is laid out for it is not copied again"  # type: ignore[attr-defined]


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_what_may_not_pass_the_page_cache_goes_through_it(place: str, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if place == "memory" else tmp_path) as directory:
        file = Path(directory) / "file"
        with Sink(file) as sink:
            sink.write(memoryview(b"lengths that are no multiple of a block, "))
            sink.write(memoryview(b"and an end that is cut off"))
            sink.finish(44)
        assert file.read_bytes() == b"lengths that are no multiple of a block, and"


@pytest.mark.parametrize("size", [1, 3])
def test_a_checkpoint_of_two_ranks_loads_on_another_number(stopped: Path, size: int) -> None:
    again = steer(
        stopped, Step(Op.PAUSE), Step(Op.CHECKPOINT), Step(Op.STOP), size=size, start=fresh(2, checkpoint="7-1", generation=2)
    )
    written = again.all("Ended")[0]["checkpoint"]
    assert written == "7-2" and same_bits(stopped / "checkpoints" / "7-1", stopped / "checkpoints" / written)
    assert msgspec.msgpack.decode((stopped / "checkpoints" / written / "manifest.msgpack").read_bytes())["world"] == size


def test_one_two_or_three_ranks_and_any_micro_batch_give_the_same_losses(make_run: MakeRun) -> None:
    found = []
    for name, size, micro in (("a", 1, 6), ("b", 2, 5), ("c", 3, 1)):
        root = make_run(name, micro_batch=micro, steps=4, global_batch=7)
        train_plain(root, size)
        found.append([losses(logged(root))[1, step] for step in range(1, 5)])
        read = [body["values"]["data/docs/fraction"] for body in logged(root) if "data/docs/fraction" in body["values"]]
        found[-1] += [round(7 * fraction) for fraction in read]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-6)


def test_a_full_disk_fails_one_checkpoint_and_training_goes_on(quiet: Path, stopped: Path) -> None:
    """Files may not grow beyond what a checkpoint needs: as on a full disk, the write itself fails."""
    root = stopped
    whole = [path.name for path in sorted((root / "checkpoints").iterdir())]
    before = {name: (root / "checkpoints" / name / "manifest.msgpack").read_bytes() for name in whole}
    told = steer(
        root,
        Step(Op.CHECKPOINT, after=8, number=2),
        Step(Op.RESUME, phase="paused", number=3),
        Step(Op.STOP_NOW, phase="paused", looks=3, number=4),
        start=fresh(checkpoint=whole[-1], generation=2, applied=1),
        limit=20_000,
    )
    failed = told.all("CheckpointFailed")
    assert any(body["numbers"] == [2] and "File too large" in body["reason"] and "rank-0000" in body["reason"] for body in failed)
    assert losses(told.bodies)[1, 12] == losses(Told.read(quiet).bodies)[1, 12]
    assert any(body["level"] == "alarm" and "cannot end" in body["text"] for body in told.all("Note"))
    assert [path.name for path in sorted((root / "checkpoints").iterdir())] == whole
    for name, content in before.items():
        assert verify.problems(root / "checkpoints" / name) == []
        assert (root / "checkpoints" / name / "manifest.msgpack").read_bytes() == content


def test_a_suspect_checkpoint_is_marked_and_no_restart_point(make_run: MakeRun) -> None:
    root = make_run()
    ranks: Ranks = start_ranks(root, 2, poisoned)
    assert ranks.wait() == [0, 0], logs(root)
    names = [directory.name for directory, _ in committed(root / "checkpoints")]
    assert "8-1" in names and (root / "checkpoints" / "8-1" / "suspect").exists()
    assert not (root / "checkpoints" / "4-1" / "suspect").exists()
    assert {body["step"]: body["values"].get("train/skipped_updates") for body in logged(root)}[8] == 1.0
    said: list[str] = []
    (root / "checkpoints" / "12-1-pretrain" / "suspect").touch()
    assert newest(root / "checkpoints", said.append) == "4-1"
    assert len(said) == 2


def poisoned(root: Path) -> None:
    """The gradient of step 8 is not finite."""
    from trainer.optimizer import Optimizer

    plain = Optimizer.squared_norm
    calls = []

    def squared_norm(self: Optimizer) -> Tensor:
        calls.append(1)
        return plain(self) * (float("nan") if len(calls) == 8 else 1.0)

    Optimizer.squared_norm = squared_norm  # type: ignore[method-assign]
    from trainer_harness import plain as run

    run(root)


def test_pruning_spares_stage_ends_and_goldens(quiet: Path, tmp_path: Path) -> None:
    checkpoints = Path(shutil.copytree(quiet / "checkpoints", tmp_path / "checkpoints"))
    for name in ("8-1.1", "8-1.2"):
        shutil.copytree(checkpoints / "8-1", checkpoints / name)
    (checkpoints / "4-1" / "GOLDEN").touch()
    (checkpoints / ".g1-13-1").mkdir()
    prune(checkpoints, 2)
    sweep(checkpoints)
    assert sorted(path.name for path in checkpoints.iterdir()) == ["12-1-pretrain", "4-1", "8-1.1", "8-1.2"]


def test_a_damaged_newest_checkpoint_is_passed_over(quiet: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(quiet, tmp_path / "run"))
    flip(root / "checkpoints" / "12-1-pretrain")
    (root / "checkpoints" / "12-1-pretrain").rename(root / "checkpoints" / "12-1-x")
    train_plain(root)
    assert "going back to an earlier one" in (root / "rank-0.log").read_text()
    assert same_bits(root / "checkpoints" / "12-1-pretrain", quiet / "checkpoints" / "12-1-pretrain")
