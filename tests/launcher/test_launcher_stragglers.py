"""Slow ranks are named once, after a set time at a set ratio, and again when they keep up."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from launcher_desk import NODE, Desk, desk_at, make_recipe

from launcher.controller.supervision.stragglers import Stragglers
from midwatch import protocol as p
from midwatch.journal import entries as j


class Watched:
    """Stragglers looked for on a desk, by a clock of the test's."""

    def __init__(self, desk: Desk) -> None:
        self.desk, self.now = desk, 0.0
        self.stragglers = Stragglers(desk.context, lambda: self.now)

    def ranks(self, *own: float, node: str = NODE, first: int = 0) -> None:
        beats = tuple(p.RankBeat(first + rank, 100 + rank, 5, 1.0, "training", each) for rank, each in enumerate(own))
        stats = p.NodeStats(
            node=node, time=1.0, cpus=(0.5,), memory_used=1, memory_total=2, generation=self.desk.ledger.generation, ranks=beats
        )
        self.desk.generations._pool.heard(node, stats)

    def look(self, seconds: float) -> None:
        for _ in range(int(seconds * 2)):
            self.now += 0.5
            self.stragglers.look()

    def notes(self) -> list[str]:
        return [f"{e.level}: {e.text}" for _, e in self.desk.journal.entries if isinstance(e, j.Noted)]

    def slow(self) -> list[int]:
        return [straggler.rank for straggler in self.desk.context.live.stragglers]


async def test_a_rank_that_stays_slow_is_named_once_and_again_when_it_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        watched = Watched(desk)
        watched.ranks(0.4, 0.41, 0.6, 0.39)
        watched.look(29)
        assert watched.slow() == [] and watched.notes() == []
        watched.look(2)
        assert watched.slow() == [2]
        told = "warning: rank 2 on node is slow: 600 ms of its own a step, 1.5 times the median of 4 ranks, for 30 s"
        assert watched.notes() == [told]
        watched.look(120)
        assert watched.notes() == [told]
        watched.ranks(0.4, 0.41, 0.42, 0.39)
        watched.look(29)
        assert watched.slow() == [2]
        watched.look(2)
        assert watched.slow() == [] and watched.notes() == [told, "info: rank 2 on node keeps up again"]
        view = desk.term.door._clients._view.snapshot()
        assert view.stragglers == ()


async def test_what_is_below_the_ratio_or_passes_is_not_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        watched = Watched(desk)
        for _ in range(6):
            watched.ranks(0.4, 0.51, 0.4)
            watched.look(40)
            watched.ranks(0.4, 0.9, 0.4)
            watched.look(20)
        assert watched.notes() == []


async def test_of_two_ranks_the_faster_is_the_yardstick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with desk_at(tmp_path / "run", monkeypatch, "training") as desk:
        watched = Watched(desk)
        watched.ranks(0.4, 0.6)
        watched.look(31)
        assert watched.slow() == [1]


async def test_a_slow_node_is_one_word_and_time_stands_still_while_nothing_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe()
    cluster = msgspec.structs.replace(recipe.cluster, straggler_ratio=1.2, straggler_seconds=10.0)
    async with desk_at(tmp_path / "run", monkeypatch, "training", msgspec.structs.replace(recipe, cluster=cluster)) as desk:
        watched = Watched(desk)
        desk.agent_comes(node="other")
        watched.ranks(0.4, 0.4, 0.4)
        watched.ranks(0.5, 0.52, node="other", first=3)
        watched.look(8)
        desk.phase("evaluating")
        watched.look(60)
        assert watched.slow() == []
        desk.phase("training")
        watched.look(4)
        assert watched.slow() == [3, 4]
        assert [n for n in watched.notes() if "slow" in n] == [
            "warning: ranks 3, 4 on other are slow: 520 ms of its own a step, 1.3 times the median of 5 ranks, for 10 s"
        ]
        desk.ranks_die()
        await desk.until(lambda: len(desk.starts) == 2)
        watched.look(1)
        assert watched.slow() == []


@pytest.mark.parametrize("key", ["straggler_ratio", "straggler_seconds"])
def test_settings_that_make_no_sense_are_refused(key: str) -> None:
    cluster = msgspec.structs.replace(make_recipe().cluster, **{key: 0.0})
    assert [name for name, _ in cluster.problems()] == [key]
