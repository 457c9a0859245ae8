"""What policies write is kept once, survives a controller's death, and stays small."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from launcher_desk import Desk, desk_at

from launcher.cli import samples as command
from launcher.controller.core import rollout_samples as module
from launcher.controller.core.queries import Queries
from launcher.controller.core.rollout_samples import Samples
from launcher.controller.core.snapshot import SnapshotBuilder
from midwatch import protocol as p
from midwatch.metrics.m4_columns import LineageSegment

PATH = [LineageSegment(1, -1, 40), LineageSegment(2, 40, None)]


def sample(step: int, reward: float | None = 0.0, kl: float = 0.0, tokens: int = 1, lineage: int = 1, text: str = "x") -> p.Sampled:
    return p.Sampled(stage="ppo", step=step, lineage=lineage, prompt="why?", text=text, reward=reward, kl=kl, tokens=tokens)


def rollouts(store: Samples, first: int, count: int, each: int = 6, source: str = "1/telemetry") -> None:
    """In each the first is the best, the second the worst, the third the longest, the fourth the furthest."""
    number = store._newest.get(source, 0)
    for step in range(first, first + count):
        for at in range(each):
            number += 1
            values = {0: {"reward": 9.0}, 1: {"reward": -9.0}, 2: {"tokens": 99}, 3: {"kl": 9.0}}.get(at, {})
            store.add(source, number, 1.0, sample(step, text=f"{step}/{at}", **values))  # type: ignore[arg-type]


def ask(store: Samples, **changes: object) -> p.SampleReply:
    return store.find(p.SampleQuery(id=1, **changes), PATH)  # type: ignore[arg-type]


def texts(store: Samples, **changes: object) -> list[str]:
    return [found.text for found in ask(store, **changes).samples]


def test_samples_come_in_every_order(tmp_path: Path) -> None:
    store = Samples(tmp_path, 1)
    for number, (step, reward, kl, tokens) in enumerate(
        [(1, 0.5, 1.0, 3), (2, -1.0, 9.0, 2), (3, 2.0, 3.0, 8), (4, None, 0.0, 1)], 1
    ):
        store.add("s", number, 1.0, sample(step, reward, kl, tokens, text=str(step)))
    assert texts(store) == ["4", "3", "2", "1"]
    assert texts(store, order="reward") == ["3", "1", "2", "4"]
    assert texts(store, order="worst") == ["2", "1", "3", "4"], "what has no reward comes last"
    assert texts(store, order="kl")[0] == "2" and texts(store, order="longest")[0] == "3"
    assert texts(store, offset=1, limit=2) == ["3", "2"] and ask(store, limit=2).total == 4
    assert texts(store, start=2, stop=4) == ["3", "2"]
    assert texts(store, pattern="^[13]$") == ["3", "1"] and ask(store, pattern="^[13]$", limit=1).total == 2
    assert texts(store, pattern="WHY", offset=3) == ["1"]
    assert texts(store, stage="sft") == [] and ask(store, stage="sft").stages == ("ppo",)
    assert [found.prompt for found in ask(store, cut=2, limit=1).samples] == ["wh"]
    assert [found.text for found in ask(store, sample="s/2").samples] == ["2"]


def test_what_a_rollback_has_undone_is_told_apart(tmp_path: Path) -> None:
    store = Samples(tmp_path, 1)
    for number, (step, lineage) in enumerate([(39, 1), (40, 1), (44, 1), (40, 2), (44, 2)], 1):
        store.add("s", number, 1.0, sample(step, lineage=lineage))
    found = [(each.lineage, each.step, each.on_line) for each in ask(store).samples]
    assert found == [(2, 44, True), (2, 40, True), (1, 44, False), (1, 40, False), (1, 39, True)]
    assert len(ask(store, lineage=1).samples) == 3


def test_a_resend_changes_nothing_not_even_to_the_next_controller(tmp_path: Path) -> None:
    store = Samples(tmp_path, 1)
    assert store.add("1/telemetry", 7, 1.0, sample(1)) and not store.add("1/telemetry", 7, 1.0, sample(1))
    store.add("1/telemetry", 9, 1.0, sample(1, text="last"))
    later = Samples(tmp_path, 2)  # the first is killed: nothing is closed
    assert not later.add("1/telemetry", 7, 2.0, sample(1)) and not later.add("1/telemetry", 9, 2.0, sample(1))
    assert later.add("1/telemetry", 10, 2.0, sample(2, text="new")) and later.add("2/telemetry", 1, 2.0, sample(3, text="newer"))
    assert texts(later) == ["newer", "new", "last", "x"] and later.taken == 4


def test_a_torn_last_line_is_passed_over(tmp_path: Path) -> None:
    store = Samples(tmp_path, 1)
    for number in (1, 2, 3):
        store.add("s", number, 1.0, sample(number, text=f"{number}"))
    (file,) = tmp_path.glob("*.jsonl")
    os.truncate(file, file.stat().st_size - 20)
    later = Samples(tmp_path, 2)
    assert texts(later) == ["2", "1"]
    assert later.add("s", 3, 2.0, sample(3, text="3"))  # it was never acknowledged, so it is sent again
    assert texts(Samples(tmp_path, 3)) == ["3", "2", "1"]
    file.write_bytes(file.read_bytes().replace(b'"step":1', b'"step"?1'))
    assert texts(Samples(tmp_path, 3)) == ["3", "2"]


def test_old_rollouts_are_thinned_to_the_telling_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 4)
    monkeypatch.setattr(module, "WHOLE", 8)
    monkeypatch.setattr(module, "SINGLE", 16)
    store = Samples(tmp_path, 1)
    rollouts(store, 0, 28)
    store.sync()
    by_step: dict[int, list[str]] = {}
    for found in reversed(ask(store, limit=1000).samples):
        by_step.setdefault(found.step, []).append(found.text.partition("/")[2])
    assert all(len(by_step[step]) == 6 for step in range(20, 28)), "the newest 8 rollouts are whole"
    assert all(by_step[step] == ["0", "1", "2", "3"] for step in range(12, 20))
    old = {step: kept for step, kept in by_step.items() if step < 12}
    assert [len(kept) for kept in old.values()] == [4, 4, 4] and [*old] == [0, 4, 8], "four of each older chunk"
    assert all(json.loads(line)["step"] < 4 for line in (tmp_path / "000001-00000.jsonl").read_text().splitlines())
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.jsonl")}
    again = Samples(tmp_path, 2)
    again.sync()
    assert {file.name: file.read_bytes() for file in tmp_path.glob("*.jsonl")} == before
    assert texts(again, limit=1000) == texts(store, limit=1000)


def test_what_is_thinned_while_it_is_asked_for_is_never_mixed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    monkeypatch.setattr(module, "WHOLE", 2)
    store = Samples(tmp_path, 1)
    for first in range(0, 40, 4):
        rollouts(store, first, 4)
        store.sync()
        assert all(found.text.startswith(f"{found.step}/") for found in ask(store, limit=1000).samples)


def test_a_disk_that_refuses_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Samples(tmp_path, 1)
    store.add("s", 1, 1.0, sample(1, text="1"))
    write = os.write

    def half(handle: int, content: bytes) -> int:
        write(handle, content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "write", half)
    with pytest.raises(OSError, match="No space"):
        store.add("s", 2, 1.0, sample(2, text="2"))
    monkeypatch.undo()
    assert store.add("s", 3, 1.0, sample(3, text="3"))
    assert texts(Samples(tmp_path, 2)) == ["3", "1"] == texts(store)


# In a controller


@pytest.fixture
async def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Desk]:
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        yield desk


async def test_samples_of_rollouts_stay_out_of_the_journal(desk: Desk) -> None:
    entries = len(desk.journal.entries)
    for number in (100, 101, 101):
        desk.reports.metrics("1/telemetry", p.Numbered(number=number, body=sample(25, text=f"{number}")))
    assert len(desk.journal.entries) == entries
    assert SnapshotBuilder(desk.context).snapshot().samples == 2
    desk.says(p.Sampled(stage="first", step=25, lineage=1, prompt="Once", text="upon a time"))
    queries = Queries(desk.context, desk.term._commits, SnapshotBuilder(desk.context))
    reply = await queries.answer(p.SampleQuery(id=3))
    assert isinstance(reply, p.SampleReply) and reply.id == 3 and reply.stages == ("first", "ppo")
    assert [(found.text, found.on_line) for found in reply.samples] == [("101", True), ("100", True), ("upon a time", True)]
    assert SnapshotBuilder(desk.context).snapshot().samples == 3
    for bad in (p.SampleQuery(id=4, pattern="("), p.SampleQuery(id=4, offset=-1)):
        assert isinstance(await queries.answer(bad), p.Refused)


async def test_where_there_is_no_room_for_samples_training_goes_on(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bool:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(desk.context.samples, "add", full)
    for number in (100, 101):
        assert not desk.reports.metrics("1/telemetry", p.Numbered(number=number, body=sample(25)))
    assert [e.text for _, e in desk.journal.entries if "are not stored" in getattr(e, "text", "")] == [
        f"{desk.paths.samples}: No space left on device; the policy's samples are not stored"
    ]


def test_the_command_tells_each_sample_and_lets_no_escape_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Samples(tmp_path, 1)
    store.add("s", 1, 1.0, sample(44, 1.5, 12.25, 7, text="first\x1b[2J line\nsecond [bold]"))
    store.add("s", 2, 1.0, sample(45, 0.5, 2.0, 9, lineage=2, text="other"))

    class Answering:
        def __init__(self, *_: object, **__: object) -> None: ...
        async def __aenter__(self) -> Answering:
            return self

        async def __aexit__(self, *_: object) -> None: ...
        async def ask(self, query: p.SampleQuery, expect: object) -> p.SampleReply:
            return store.find(query, PATH)

    monkeypatch.setattr(command, "Client", Answering)
    monkeypatch.setattr(command, "find_anywhere", Path)
    given = {"run": "r", "stage": "", "sort": "reward", "limit": 5, "grep": "", "json": False}
    assert command.samples(argparse.Namespace(**given)) == 0
    out = capsys.readouterr().out
    assert "ppo step 44, lineage 1 (rolled back), reward 1.5, KL 12.25, 7 tokens\nwhy?\nfirst" in out
    assert "second [bold]" in out and "\x1b[2J" not in out and out.index("44") < out.index("45")
    assert command.samples(argparse.Namespace(**{**given, "json": True, "limit": 1})) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line)["reward"] == 1.5
    assert command.samples(argparse.Namespace(**{**given, "stage": "dpo"})) == 0
    assert "no such samples" in capsys.readouterr().err
    assert command.samples(argparse.Namespace(**{**given, "limit": 0})) == 2
