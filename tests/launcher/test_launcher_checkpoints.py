"""Checkpoints as files: what is not what was written is named; nothing of it is ever run; everything may be done twice."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash
from launcher_desk import write_checkpoint

from midwatch.checkpoint_format.directory import commit, mark_golden, remove, sweep
from midwatch.checkpoint_format.manifest import FILE_NAME, FORMAT, CheckpointError, read, read_header
from midwatch.checkpoint_format.verify import check_sizes, verify


@pytest.fixture
def there(tmp_path: Path) -> tuple[Path, str]:
    digest = write_checkpoint(tmp_path, "c", "c")
    return tmp_path / "c", digest


def rewritten(directory: Path, **changes: Any) -> str:
    content = msgspec.msgpack.encode(msgspec.msgpack.decode((directory / FILE_NAME).read_bytes()) | changes)
    (directory / FILE_NAME).write_bytes(content)
    return xxhash.xxh3_128_hexdigest(content)


def test_a_whole_checkpoint_verifies_and_tells_how_far_it_is(there: tuple[Path, str]) -> None:
    directory, digest = there
    seen: list[int] = []
    assert verify(directory, digest, seen.append).id == "c"
    assert sum(seen) == (directory / "data.bin").stat().st_size


def test_a_truncated_a_flipped_and_a_missing_file_are_named(there: tuple[Path, str]) -> None:
    directory, digest = there
    file = directory / "data.bin"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=f"{file}: corrupted: 99 bytes, 100"):
        check_sizes(directory, digest)
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    check_sizes(directory, digest)
    with pytest.raises(CheckpointError, match=f"{file}: corrupted"):
        verify(directory, digest)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"{file}: cannot be read: No such file"):
        verify(directory, digest)
    file.mkdir()
    with pytest.raises(CheckpointError, match=str(file)):
        verify(directory, digest)


def test_another_manifest_than_the_journals_is_refused(there: tuple[Path, str]) -> None:
    directory, digest = there
    rewritten(directory, generation=9)
    with pytest.raises(CheckpointError, match="is not what was committed"):
        verify(directory, digest)
    verify(directory)


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..", ".", "", "a/b", "nul\0", ".hidden", "a\\b", "x" * 300])
def test_a_path_that_leads_elsewhere_is_refused_by_the_controller_and_by_the_ranks(name: str, there: tuple[Path, str]) -> None:
    directory, _ = there
    digest = rewritten(directory, files={name: {"bytes": 1, "xxh3": "0"}}, tensors={}, world=1)
    for reader in (verify, read):
        with pytest.raises(CheckpointError, match="outside its directory"):
            reader(directory, digest)


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self._mark,))


@pytest.mark.parametrize("name", [FILE_NAME, "data.bin", ".metadata"])
def test_a_booby_trapped_checkpoint_runs_nothing(name: str, there: tuple[Path, str], tmp_path: Path) -> None:
    directory, digest = there
    mark = tmp_path / "sprung"
    trap = pickle.dumps(Trap(mark))
    (directory / name).write_bytes(trap)
    if name == ".metadata":
        verify(directory, digest)
    else:
        with pytest.raises(CheckpointError, match=name):
            verify(directory)
    assert not mark.exists()
    pickle.loads(trap)
    assert mark.exists(), "the trap would have worked"


@pytest.mark.parametrize("content", [b"", b"\xc1", b"\x91" * 100_000, b"\x81\xa2id\xa1\xff", b"\x80"])
def test_what_is_no_manifest_is_said_to_be_none(content: bytes, there: tuple[Path, str]) -> None:
    directory, _ = there
    (directory / FILE_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match="not a manifest"):
        read_header(directory)


@pytest.mark.parametrize("changes", [{"format": FORMAT + 1}, {"format": 1, "files": ["a", "b"]}], ids=["future", "past"])
def test_another_format_is_refused_with_the_way_out_whatever_else_it_holds(
    changes: dict[str, Any], there: tuple[Path, str]
) -> None:
    rewritten(there[0], **changes)
    for reader in (read_header, read):
        with pytest.raises(CheckpointError, match=rf"format {changes['format']}, .* \(.*the release that wrote it"):
            reader(there[0])


def test_a_state_that_is_none_is_refused(there: tuple[Path, str]) -> None:
    rewritten(there[0], state={"step": "seven"})
    with pytest.raises(CheckpointError, match=r"not a manifest: state: .*step"):
        read_header(there[0])


def test_committing_twice_is_harmless(tmp_path: Path) -> None:
    digest = write_checkpoint(tmp_path, ".writing-c", "c")
    commit(tmp_path, ".writing-c", "c")
    commit(tmp_path, ".writing-c", "c")
    verify(tmp_path / "c", digest)


def test_committing_over_another_is_refused_and_leaves_it_whole(tmp_path: Path) -> None:
    digest = write_checkpoint(tmp_path, "c", "c")
    write_checkpoint(tmp_path, ".writing-c", "c")
    with pytest.raises(CheckpointError, match="cannot become c"):
        commit(tmp_path, ".writing-c", "c")
    verify(tmp_path / "c", digest)


def test_removing_marking_and_sweeping_twice_are_harmless(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "c", "c")
    for golden in (True, True, False, False):
        mark_golden(tmp_path, "c", golden)
        assert (tmp_path / "c" / "GOLDEN").exists() == golden
    remove(tmp_path, "c")
    remove(tmp_path, "c")
    assert list(tmp_path.iterdir()) == [tmp_path / "home"]


def test_sweeping_takes_what_is_unfinished_and_nothing_else(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "whole", "whole")
    for name in (".writing-a", ".deleting-b", ".writing-whole"):
        write_checkpoint(tmp_path, name, "x")
    (tmp_path / ".writing-a" / FILE_NAME).unlink()
    assert sorted(sweep(tmp_path)) == [".deleting-b", ".writing-a"]
    assert sweep(tmp_path) == []
    assert sorted(d.name for d in tmp_path.iterdir()) == [".writing-whole", "home", "whole"]
