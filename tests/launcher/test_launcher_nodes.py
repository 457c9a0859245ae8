"""Several nodes: who is gathered, in which order they are told, who is blamed, and what is done when one is lost or comes back."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import launcher_desk
import msgspec
import pytest
from launcher_desk import Desk, desk_at, make_recipe

from launcher.backends.base import Started, StartError
from launcher.controller.supervision import generations as generations_module
from launcher.controller.supervision import node_pool as pool_module
from midwatch import protocol as p
from midwatch.journal import entries as j
from midwatch.recipe import Parallel


class Cluster:
    """A desk whose nodes come and go by name."""

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.told: dict[str, list[p.Message]] = {}
        self._sends: dict[str, Callable[[p.Message], None]] = {}

    def come(self, *nodes: str, generation: int = 0) -> None:
        for node in nodes:
            send = self._sends[node] = self.told.setdefault(node, []).append
            hello = p.AgentHello(
                version=p.VERSION, run=self.desk.context.run, node=node, pid=1, generation=generation, address=f"10.0.0.{node[-1]}"
            )
            self.desk.generations.agent_came(hello, send)

    def go(self, node: str) -> None:
        self.desk.generations.agent_went(node, self._sends[node])

    def says(self, node: str, message: p.Message) -> None:
        self.desk.generations.agent_told(node, message)

    def gathers(self, node: str) -> list[p.Gather]:
        return [m for m in self.told.get(node, []) if isinstance(m, p.Gather)]

    def ends(self, node: str) -> list[p.EndRanks]:
        return [m for m in self.told.get(node, []) if isinstance(m, p.EndRanks)]

    def dies(self, node: str, rank: int = 0, code: int = -9) -> None:
        generation = self.desk.ledger.generation
        self.says(node, p.RanksEnded(generation=generation, ok=False, exits=(p.RankExit(rank=rank, code=code),)))

    async def trains(self, *nodes: str) -> None:
        """The nodes are gathered, and their ranks have taken a step."""
        desk = self.desk
        await desk.until(lambda: desk.ledger.generation_live and desk.ledger.generation_nodes == nodes)
        await desk.until(lambda: self.gathers(nodes[0])[-1].start.generation == desk.ledger.generation)
        self.says(nodes[0], p.Gathered(generation=desk.ledger.generation, store_port=7000 + desk.ledger.generation))
        await desk.until(lambda: all(self.gathers(n)[-1].start.generation == desk.ledger.generation for n in nodes))
        desk.rank.clear()
        desk.rank_comes()
        desk.phase("training", desk.context.live.step)
        desk.row(desk.context.live.step + 1)


@pytest.fixture
async def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> AsyncIterator[Cluster]:
    """Two to three nodes of two ranks that join by themselves, or as the test's parameters say."""
    nodes, parallel = getattr(request, "param", ("2:3", Parallel()))
    monkeypatch.setattr(launcher_desk.NoProcesses, "nodes", ())
    monkeypatch.setattr(launcher_desk.NoProcesses, "patience", math.inf)
    monkeypatch.setattr(launcher_desk.NoProcesses, "alive", lambda *_: None)
    monkeypatch.setattr(generations_module, "GROW_SECONDS", 0.01)
    monkeypatch.setattr(pool_module, "PATIENCE_SECONDS", 0.3)
    recipe = make_recipe(restarts=10)
    spread = msgspec.structs.replace(recipe.cluster, backend="external", nodes=nodes, ranks_per_node=2, env={"A": "1"})
    recipe = msgspec.structs.replace(recipe, cluster=spread, parallel=parallel)
    async with desk_at(tmp_path / "run", monkeypatch, None, recipe) as desk:
        yield Cluster(desk)


async def looked(desk: Desk, holds: Callable[[], Any]) -> None:
    """As the controller looks around, until it holds."""
    end = time.monotonic() + 8
    while not holds():
        assert time.monotonic() < end, f"in vain; {desk.ledger.state}: {desk.ledger.reason}"
        desk.generations.look()
        await asyncio.sleep(0.02)


async def test_the_fewest_are_waited_for_and_node_0s_store_is_told_to_the_others(cluster: Cluster) -> None:
    cluster.come("n1")
    await asyncio.sleep(0.6)
    assert not cluster.gathers("n1")
    assert "1 of at least 2 nodes ready" in cluster.desk.ledger.reason
    cluster.come("n2")
    await cluster.desk.until(lambda: cluster.gathers("n1"))
    first = cluster.gathers("n1")[0]
    assert (first.node_rank, first.nodes, first.ranks_per_node, first.store_port) == (0, 2, 2, 0)
    assert first.environment == {"A": "1"}
    assert not cluster.gathers("n2"), "there is no store to join yet"
    cluster.says("n1", p.Gathered(generation=1, store_port=7001, environment={"A": "1"}))
    second = cluster.gathers("n2")[0]
    assert (second.node_rank, second.store_host, second.store_port) == (1, "10.0.0.1", 7001)
    assert cluster.desk.ledger.node("n1").environment == {"A": "1"}


async def test_a_node_whose_rank_is_killed_is_blamed_and_after_three_times_used_no_more(cluster: Cluster) -> None:
    desk = cluster.desk
    cluster.come("n1", "n2", "n3")
    for failures in (1, 2, 3):
        await cluster.trains("n1", "n2", "n3")
        cluster.dies("n1", 0, code=1)  # a victim tells first
        assert cluster.ends("n2") and cluster.ends("n3"), "the others need not wait for their timeouts"
        cluster.dies("n2", 3, code=-9)
        cluster.dies("n3", 5, code=1)
        await desk.until(lambda failures=failures: desk.ledger.node("n2").failures == failures)  # type: ignore[misc]
    assert desk.ledger.node("n2").mark == "quarantined"
    await cluster.trains("n1", "n3")
    ended = [e.cause for _, e in desk.journal.entries if isinstance(e, j.GenerationEnded)]
    assert all("rank 3 was killed by signal 9 (on n2)" in cause for cause in ended)
    command = desk.give("node-add", node="n2")
    await desk.until(lambda: desk.view(command).state == "done")
    assert (desk.ledger.node("n2").mark, desk.ledger.node("n2").failures) == ("in use", 0)
    await looked(desk, lambda: desk.orders)
    assert desk.orders[-1].op == p.Op.REGROUP, "it is there, so the ranks are gathered anew with it"


async def test_a_node_whose_agent_is_killed_is_named_and_not_the_first_of_its_victims(cluster: Cluster) -> None:
    desk = cluster.desk
    cluster.come("n1", "n2", "n3")
    await cluster.trains("n1", "n2", "n3")
    gloo = p.RankExit(
        rank=0, code=1, message="RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [10.0.0.2]:1"
    )
    cluster.says("n1", p.RanksEnded(generation=1, ok=False, exits=(gloo,)))
    cluster.says("n3", p.RanksEnded(generation=1, ok=False, reason="ended by the controller"))
    await asyncio.sleep(1.2)
    assert desk.ledger.generation_live, "n2 has not said anything, and its connection stands"
    cluster.go("n2")
    await desk.until(lambda: desk.ledger.node("n2").failures == 1)
    ended = next(e for _, e in desk.journal.entries if isinstance(e, j.GenerationEnded))
    assert "the agent of n2" in ended.cause and "gloo" not in ended.cause
    assert desk.ledger.node("n1").failures == 0


async def test_what_ends_all_nodes_at_once_counts_against_none(cluster: Cluster) -> None:
    desk = cluster.desk
    cluster.come("n1", "n2")
    await cluster.trains("n1", "n2")
    for node, rank in (("n1", 0), ("n2", 2)):
        cluster.dies(node, rank, code=-10)
    await cluster.trains("n1", "n2")
    assert [desk.ledger.node(n).failures for n in ("n1", "n2")] == [0, 0]


async def test_a_failure_that_is_certain_ends_the_run_at_once(cluster: Cluster) -> None:
    desk = cluster.desk
    cluster.come("n1", "n2")
    await cluster.trains("n1", "n2")
    wrong = p.RankExit(rank=2, code=p.CERTAIN_STATUS, message="ModuleNotFoundError: No module named 'pandas'")
    cluster.says("n2", p.RanksEnded(generation=1, ok=False, exits=(wrong,)))
    cluster.says("n1", p.RanksEnded(generation=1, ok=False, reason="ended by the controller"))
    await desk.until(lambda: desk.ledger.state == "failed")
    assert "No module named 'pandas' (on n2)" in desk.ledger.reason
    assert desk.ledger.generation == 1, "nothing was tried again"


async def test_an_agent_that_is_turned_away_is_the_reason_of_the_shortage(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = cluster.desk

    async def start(node: str) -> Started:
        raise StartError("it ended at once; see its log")

    monkeypatch.setattr(desk.backend, "start", start)
    cluster.come("n1")
    desk.generations.agent_refused("n2", "an agent of another version of Midwatch")
    await looked(desk, lambda: "n2: an agent of another version" in desk.ledger.reason)


async def test_the_last_nodes_needed_are_not_quarantined(cluster: Cluster) -> None:
    cluster.come("n1", "n2")
    for failures in (1, 2, 3, 4):
        await cluster.trains("n1", "n2")
        cluster.dies("n2", 3)
        cluster.dies("n1", 0, code=1)
        await cluster.desk.until(lambda failures=failures: cluster.desk.ledger.node("n2").failures == failures)  # type: ignore[misc]
    assert cluster.desk.ledger.node("n2").mark == "in use"
    await cluster.trains("n1", "n2")


async def test_a_node_out_of_reach_is_only_shown_as_such_while_steps_are_taken(cluster: Cluster) -> None:
    desk = cluster.desk
    cluster.come("n1", "n2", "n3")
    await cluster.trains("n1", "n2", "n3")
    member = desk.generations._pool._member("n2")
    member.probed_since = time.monotonic() - 60
    desk.row(desk.context.live.step + 1)
    desk.generations.look()
    assert desk.ledger.generation_live
    desk.generations._moves._last = time.monotonic() - 60  # now none is taken any more
    desk.generations.look()
    assert not desk.ledger.generation_live
    assert cluster.ends("n1") and cluster.ends("n3")
    await cluster.trains("n1", "n3")
    assert desk.starts == [] and desk.ledger.lineages[desk.ledger.lineage].cause == "crash"


async def test_ranks_that_hold_are_not_lost_with_a_link(cluster: Cluster) -> None:
    desk = cluster.desk
    cluster.come("n1", "n2")
    await cluster.trains("n1", "n2")
    desk.give("pause")
    await desk.until(lambda: desk.orders)
    desk.answers(desk.orders[-1], step=1)
    desk.phase("paused", 1)
    desk.generations._pool._member("n2").probed_since = time.monotonic() - 60
    desk.generations._moves._last = time.monotonic() - 60
    desk.generations.look()
    assert desk.ledger.generation_live


async def test_an_agent_that_comes_back_without_its_ranks_has_lost_them(cluster: Cluster) -> None:
    cluster.come("n1", "n2")
    await cluster.trains("n1", "n2")
    cluster.go("n2")
    cluster.come("n2", generation=0)
    assert cluster.ends("n1")
    cluster.says("n1", p.RanksEnded(generation=1, ok=False, reason="ended by the controller"))
    await cluster.trains("n1", "n2")
    ended = next(e for _, e in cluster.desk.journal.entries if isinstance(e, j.GenerationEnded))
    assert "the agent of n2 was restarted" in ended.cause


async def test_what_a_fenced_generation_still_says_changes_nothing(cluster: Cluster) -> None:
    desk = cluster.desk
    cluster.come("n1", "n2", "n3")
    await cluster.trains("n1", "n2", "n3")
    cluster.dies("n3", 4)
    for node in ("n1", "n2"):
        cluster.says(node, p.RanksEnded(generation=1, ok=False, reason="ended by the controller"))
    await cluster.trains("n1", "n2", "n3")
    cluster.says("n3", p.RanksEnded(generation=1, ok=False, reason="late"))
    cluster.says("n3", p.Hung(generation=1, phase="training", seconds=99.0, limit=60.0, file="x"))
    cluster.come("n3", generation=1)
    assert desk.ledger.generation_live and desk.ledger.generation == 2
    assert isinstance(cluster.told["n3"][-1], p.EndRanks) and cluster.ends("n3")[-1].generation == 1


async def test_on_a_hang_every_node_takes_its_stacks_before_the_ranks_end(cluster: Cluster) -> None:
    desk = cluster.desk
    cluster.come("n1", "n2")
    await cluster.trains("n1", "n2")
    cluster.says("n1", p.Hung(generation=1, phase="training", seconds=70.0, limit=60.0, file="logs/n1/hang.txt"))
    assert [m for m in cluster.told["n2"] if isinstance(m, p.TakeStacks)]
    assert not cluster.ends("n1"), "not before the other has written"
    cluster.says("n2", p.StacksTaken(generation=1, file="logs/n2/hang.txt", stuck=(3,)))
    assert cluster.ends("n1") and cluster.ends("n2")
    cluster.says("n1", p.RanksEnded(generation=1, ok=False, reason="ended by the controller"))
    await desk.until(lambda: desk.ledger.node("n2").failures == 1)
    ended = next(e for _, e in desk.journal.entries if isinstance(e, j.GenerationEnded))
    assert "hung in training for 70 s; rank 3 does not answer" in ended.cause
    await cluster.trains("n1", "n2")


async def test_a_controller_that_was_late_itself_does_not_take_its_nodes_for_silent(cluster: Cluster) -> None:
    desk = cluster.desk
    cluster.come("n1", "n2")
    await cluster.trains("n1", "n2")
    pool = desk.generations._pool
    pool.look()
    for member in pool._members.values():  # as if nothing had been read, and nobody looked after, for ten seconds
        member.heard -= 10.0
    pool._looked -= 10.0
    pool.look()
    assert all(node.reachable for node in desk.context.live.nodes.values())
    pool._awake -= 2.0
    pool.look()
    assert not any(node.reachable for node in desk.context.live.nodes.values())


def notes(cluster: Cluster) -> list[str]:
    return [e.text for _, e in cluster.desk.journal.entries if isinstance(e, j.Noted)]


@pytest.mark.parametrize("cluster", [("2:4", Parallel(tensor=2, hsdp_shard_size=2))], indirect=True)
async def test_ranks_are_a_multiple_of_the_models_and_a_node_beyond_is_a_spare(cluster: Cluster) -> None:
    desk = cluster.desk
    cluster.come("n1", "n2", "n3")
    await cluster.trains("n1", "n2")
    assert cluster.gathers("n1")[0].nodes == 2 and not cluster.gathers("n3")
    await looked(desk, lambda: "n3 stands by as a spare: the ranks must be a multiple of 4" in notes(cluster))
    for _ in range(5):
        desk.generations.look()
    assert sum("stands by" in text for text in notes(cluster)) == 1
    assert not desk.orders, "there is no use in gathering anew for it"
    cluster.come("n4")
    await looked(desk, lambda: desk.orders)
    assert desk.orders[-1].op == p.Op.REGROUP
    desk.answers(desk.orders[-1], step=1)
    desk.says(p.Ended(cause="regrouped", step=1))
    await cluster.trains("n1", "n2", "n3", "n4")
    assert desk.ledger.generation == 2


@pytest.mark.parametrize("cluster", [("2:4", Parallel(tensor=4))], indirect=True)
async def test_a_group_that_is_lost_with_its_node_makes_a_smaller_world(cluster: Cluster) -> None:
    cluster.come("n1", "n2", "n3", "n4")
    await cluster.trains("n1", "n2", "n3", "n4")
    member = cluster.desk.generations._pool._member("n2")
    member.probed_since = cluster.desk.generations._moves._last = time.monotonic() - 60
    cluster.desk.generations.look()
    await cluster.trains("n1", "n3")
    assert cluster.gathers("n1")[-1].nodes == 2


@pytest.mark.parametrize("cluster", [("1:4", Parallel(pipeline=2, tensor=3))], indirect=True)
async def test_fewer_nodes_than_the_model_needs_are_waited_for(cluster: Cluster) -> None:
    cluster.come("n1", "n2")
    await asyncio.sleep(0.6)
    assert not cluster.gathers("n1")
    assert "2 of at least 3 nodes ready" in cluster.desk.ledger.reason
    cluster.come("n3", "n4")
    await cluster.trains("n1", "n2", "n3")
    assert not cluster.gathers("n4")


@pytest.mark.parametrize("cluster", [("2:4", Parallel(tensor=4))], indirect=True)
async def test_a_spare_does_not_take_the_place_of_a_node_out_of_reach_while_steps_are_taken(cluster: Cluster) -> None:
    desk = cluster.desk
    cluster.come("n1", "n2", "n3")
    await cluster.trains("n1", "n2")
    desk.generations._pool._member("n2").probed_since = time.monotonic() - 60
    desk.row(desk.context.live.step + 1)
    for _ in range(5):
        desk.generations.look()
        await asyncio.sleep(0.02)
    assert desk.ledger.generation_live and not desk.orders


async def test_nodes_that_are_not_up_yet_are_waited_for_past_all_patience(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is there; of the others one does not answer, and comes later than the patience that a first start has."""
    monkeypatch.setattr(launcher_desk.NoProcesses, "nodes", ("n1", "n2"))
    monkeypatch.setattr(launcher_desk.NoProcesses, "patience", 0.5)
    monkeypatch.setattr(launcher_desk.NoProcesses, "alive", lambda *_: None)
    monkeypatch.setattr(pool_module, "PATIENCE_SECONDS", 0.2)
    reachable = False

    async def start(self: Any, node: str) -> Started:
        if node == "n2" and not reachable:
            raise StartError("n2: it does not answer", out_of_reach=True)
        raise StartError("n2: there is no Python there")

    monkeypatch.setattr(launcher_desk.NoProcesses, "start", start)
    recipe = make_recipe()
    spread = msgspec.structs.replace(recipe.cluster, backend="ssh", hosts=("n1", "n2"), nodes=2)
    async with desk_at(tmp_path / "run", monkeypatch, None, msgspec.structs.replace(recipe, cluster=spread)) as desk:
        Cluster(desk).come("n1")
        await asyncio.sleep(2.0)
        assert desk.ledger.state == "starting" and "n2: it does not answer" in desk.ledger.reason
        reachable = True  # and what is wrong there now will not pass by itself
        await looked(desk, lambda: desk.ledger.state == "failed")
        assert "there is no Python there" in desk.ledger.reason
