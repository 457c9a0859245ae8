"""Which directory a run is in, who it is, and which process is which: copies, moves, a clock that is set."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import psutil
import pytest
from launcher_desk import desk_at

from launcher.agent.place import Place, holder_of
from launcher.backends import local as local_module
from launcher.backends.local import LocalBackend
from launcher.backends.slurm.jobs import Job, read_job, write_job
from midwatch.directory_identity import DirectoryId, DirectoryWatch
from midwatch.journal import entries as j
from midwatch.journal.run_identity import claim, read_record, run_id
from midwatch.processes import birth_of, lives
from midwatch.recipe import Cluster
from midwatch.run_directory import Address, RunPaths, find_controller, is_foreign, write_address


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    made = RunPaths(tmp_path / "run")
    made.create()
    made.recipe.write_text("")
    return made


def copied(paths: RunPaths) -> RunPaths:
    return RunPaths(Path(shutil.copytree(paths.root, paths.root.with_name("copy"))))


def test_a_directory_keeps_its_identity_when_it_is_moved_and_a_copy_has_another(paths: RunPaths) -> None:
    here = DirectoryId.of(paths.root)
    assert not DirectoryId.of(copied(paths).root).same(here)
    paths.root.rename(paths.root.with_name("moved"))
    assert DirectoryId.of(paths.root.with_name("moved")).same(here)


def test_device_numbers_count_on_one_boot_alone() -> None:
    here = DirectoryId("boot", device=1, inode=7)
    assert not here.same(DirectoryId("boot", device=2, inode=7)), "another file system of this machine"
    assert here.same(DirectoryId("another", device=2, inode=7)), "the same storage as another host numbers it"
    assert not here.same(DirectoryId("another", device=1, inode=8))


def test_a_run_keeps_its_id_when_it_is_moved_and_a_copy_gets_one_of_its_own(paths: RunPaths) -> None:
    first = claim(paths, ())
    assert first.original is None and claim(paths, ()) == first and run_id(paths) == first.run
    copy = copied(paths)
    assert run_id(copy) == "", "the original's id is not the copy's"
    new = claim(copy, ())
    assert new.run != first.run and new.original == str(paths.root)
    assert claim(copy, ()).run == new.run
    moved = RunPaths(paths.root.rename(paths.root.with_name("moved")))
    assert claim(moved, ()) == first
    record = read_record(moved)
    assert record is not None and record.path == str(moved.root)


def test_a_lost_record_is_written_anew_with_the_id_that_the_journal_has(paths: RunPaths) -> None:
    entries = [(1, j.RunBegan(time=1.0, name="r", recipe="x", id="abc")), (2, j.RunCopied(time=2.0, id="def", original="abc"))]
    assert claim(paths, entries).run == "def"
    paths.record.write_bytes(b"\x00 damaged")
    assert claim(paths, entries) == ("def", None)


def test_a_copy_whose_first_controller_died_before_it_journaled_that_is_still_found_to_be_one(paths: RunPaths) -> None:
    entries = [(1, j.RunBegan(time=1.0, name="r", recipe="x", id=claim(paths, ()).run))]
    copy = copied(paths)
    new = claim(copy, entries)
    assert claim(copy, entries) == (new.run, "")


def test_an_address_and_a_job_that_were_copied_are_not_the_copys(paths: RunPaths) -> None:
    address = Address(term=1, url="unix:/x", host="far", pid=1, directory=DirectoryId.of(paths.root), path=str(paths.root))
    write_address(paths.address, address)
    write_job(paths, Job("12"))
    copy = copied(paths)
    assert find_controller(paths) == "elsewhere" and find_controller(copy) == "nowhere"
    assert is_foreign(copy, address) and not is_foreign(paths, address)
    job = read_job(paths)
    assert job is not None and job.id == "12" and read_job(copy) is None, "stopping the copy would cancel the original's job"


def test_a_directory_that_is_moved_deleted_or_replaced_is_noticed_after_a_moment(paths: RunPaths) -> None:
    now = 0.0
    watch = DirectoryWatch(paths.root, 2.0, clock=lambda: now)
    assert watch.missing() == "" and watch.lost() == ""
    moved = paths.root.rename(paths.root.with_name("moved"))
    assert f"it is at {moved}" in watch.missing() and watch.lost() == ""
    now = 1.9
    moved.rename(paths.root)
    assert watch.lost() == "", "storage that is away for a moment"
    paths.root.rename(moved)
    now = 3.0
    assert watch.lost() == ""
    shutil.copytree(moved, paths.root)
    now = 5.0
    assert "another directory is there now" in watch.lost()
    shutil.rmtree(moved)
    shutil.rmtree(paths.root)
    assert "deleted or moved" in watch.lost()
    watch.close()


def test_a_run_whose_recipe_and_journal_are_gone_is_missing_and_an_edit_of_the_recipe_is_not(paths: RunPaths) -> None:
    watch = DirectoryWatch(paths.root, 0.0)
    other = paths.root / "new"
    other.write_text("edited")
    os.replace(other, paths.recipe)
    assert watch.missing() == ""
    paths.recipe.unlink()
    assert "deleted or moved" in watch.missing()
    watch.close()


def test_storage_that_fails_is_not_taken_for_a_deleted_run(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = DirectoryWatch(paths.root, 0.0)

    def fail(*_: object, **__: object) -> os.stat_result:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "stat", fail)
    assert watch.missing() == ""


def test_a_deleted_run_directory_is_not_made_again(paths: RunPaths) -> None:
    address = Address(term=1, url="unix:/x", host="h", pid=1)
    shutil.rmtree(paths.root)
    with pytest.raises(FileNotFoundError):
        write_address(paths.address, address)
    assert not paths.root.exists()


# Processes


@pytest.fixture
def sleeper() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])


def test_a_process_is_known_by_its_birth_whatever_the_clock_says(
    sleeper: subprocess.Popen[bytes], paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    birth = birth_of(sleeper.pid)
    assert birth and lives(sleeper.pid, birth)
    real = psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 3600)  # as it is after the clock was set
    agent = j.AgentStarted(time=1.0, node="n", pid=sleeper.pid, birth=birth)
    backend = LocalBackend(paths, Cluster())
    assert backend.alive(agent)
    assert not backend.alive(msgspec.structs.replace(agent, birth=birth_of(os.getpid()))), "another process with its number"
    sleeper.kill()
    while (status := psutil.Process(sleeper.pid).status()) != psutil.STATUS_ZOMBIE:
        assert status
    assert not backend.alive(agent), "a zombie"
    sleeper.wait()
    assert not backend.alive(agent) and birth_of(sleeper.pid) == ""


# The place of an agent


def test_a_place_is_one_agents_until_that_has_gone(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    assert holder_of(paths, "n1") is None
    first, second = Place(paths, "n1"), Place(paths, "n1")
    assert first.take(0)
    first.sign()
    holder = holder_of(paths, "n1")
    assert holder is not None and (holder.pid, holder.leaving) == (os.getpid(), False)
    assert not second.take(10), "an agent that stays is not waited for"
    assert LocalBackend(paths, Cluster())._paths == paths and local_module.holder_of(paths, "n1") == holder
    first.sign(leaving=True)
    assert holder_of(paths, "n1") is None and not second.take(0.1)
    moved = RunPaths(paths.root.rename(paths.root.with_name("moved")))
    assert not Place(moved, "n1").take(0), "a moved directory has the same agents"
    first.close()
    assert second.take(1)
    second.close()


# A copy's first controller


async def test_a_copy_waits_until_it_is_resumed_and_leaves_the_originals_agents_and_commands_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from launcher.controller.core.copies import settle_copy

    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        command = desk.give("checkpoint")
        assert desk.ledger.generation_live and desk.ledger.agents
    copy = RunPaths(Path(shutil.copytree(tmp_path / "run", tmp_path / "copy")))
    monkeypatch.setattr("launcher.controller.supervision.generations.REUNION_SECONDS", 0.0)
    async with desk_at(copy.root, monkeypatch) as desk:
        settle_copy(desk.context, "/original")
        assert (desk.ledger.state, desk.ledger.generation_live, desk.ledger.agents) == ("released", False, {})
        assert "a copy of /original" in desk.ledger.reason
        assert desk.view(command).state == "cancelled" and "copied" in desk.view(command).reason
