"""The nodes view: every GPU on one map, faults that read without colour, down to one GPU; nodes taken out of use and in again."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from textual.pilot import Pilot

from midwatch import protocol as p
from tests.tui.conftest import Screen, attached
from tests.tui.machines import machines
from tests.tui.stage import NOW, Stage, replace
from tui.app import MidwatchApp
from tui.chart.heatmap import Heat
from tui.dialogs.node import NodeDialog
from tui.views.nodes.faults import SAMPLES, History, troubles
from tui.views.nodes.map import arrange
from tui.views.nodes.table import fleet_of, known_quantities, rack_of, racks, rolled
from tui.views.nodes.view import NodesView

SIZES = ((80, 24), (200, 50))


@pytest.fixture
def big() -> Iterator[Stage]:
    with Stage(machines()) as found:
        yield found


async def _nodes(screen: Screen) -> NodesView:
    await screen.open("n", "nodes")
    view = screen.app.view
    assert isinstance(view, NodesView)
    return view


# The figures behind the map


@pytest.mark.parametrize(
    ("name", "rack"),
    [
        ("r1n08", "r1"),
        ("gpu-07", "gpu"),
        ("rack3-node12.lab.example", "rack3"),
        ("10.0.4.17", "10.0.4"),
        ("head", "head"),
        ("7", "7"),
    ],
)
def test_a_rack_is_what_comes_before_a_hosts_last_number(name: str, rack: str) -> None:
    assert rack_of(name) == rack


def test_rolling_up_keeps_the_worst_and_the_gravest() -> None:
    fleet = fleet_of(machines(), "temperature")
    names, of_node = racks(fleet)
    assert names == ["r1", "r2", "r3", "r4"]
    found = rolled(fleet, of_node[fleet.node_of], 4)
    assert found.worst[1] == 91.0 and found.mean[1] == pytest.approx(np.nanmean(fleet.values[of_node[fleet.node_of] == 1]))
    assert found.marks.tolist() == ["L", "T", "N", " "]
    assert (
        rolled(fleet_of(machines(), "utilisation"), fleet.node_of, 64).worst[5]
        == fleet_of(machines(), "utilisation").values[40:48].min()
    )


def test_the_worst_are_those_away_then_faulty_then_slow_then_by_the_figure() -> None:
    found = troubles(fleet_of(machines(), "temperature"), 14)
    assert [t.mark for t in found[:9]] == list("!!LXETN~S")
    assert [f"{t.node} {t.what}" for t in found[2:9]] == [
        "r1n04 GPU 5", "r1n10 GPU 2", "r1n13 GPU 0", "r2n05 GPU 7", "r3n02 GPU 1", "r3n09 GPU 4", "r1n05 GPU 2",
    ]  # fmt: skip
    assert [t.text for t in found[9:11]] == ["drained: by anna", "quarantined: failed 3 times, the last time: XID 79"]
    hottest = [int(t.text.split()[0]) for t in found[11:]]
    assert hottest == sorted(hottest, reverse=True)
    slow = next(t for t in found if t.mark == "S")
    assert slow.rank == 34 and slow.text.startswith("1.7 times the median")


def test_nodes_that_take_no_part_do_not_count_in_the_mean() -> None:
    snapshot = machines(56, wrong=True)
    fleet = fleet_of(snapshot, "utilisation")
    assert np.isnan(fleet.values[fleet.node_of == 52]).all() and fleet.nodes[52].state == "drained"
    assert np.isfinite(fleet.values[fleet.node_of == 54]).all() and fleet.nodes[54].state == "spare"


def test_a_node_without_gpus_shows_its_cpus_and_ranks() -> None:
    from tests.tui.stage import snapshot

    plain = snapshot()
    fleet = fleet_of(plain, "utilisation")
    assert fleet.kinds == ("CPU",) and fleet.values.tolist() == [0.97, 0.93, 0.22, 0.15]
    assert known_quantities(plain) == ["utilisation", "memory"]
    assert fleet_of(plain, "memory").kinds == ("rank",)


@pytest.mark.parametrize(
    ("nodes", "size", "level", "style"),
    [
        (4, (80, 20), "GPUs", "number"),
        (64, (80, 20), "GPUs", "digit"),
        (64, (200, 46), "GPUs", "number"),
        (512, (200, 46), "nodes", "pair"),
        (512, (80, 20), "racks", "pair"),
    ],
)
def test_the_map_rolls_up_when_the_screen_is_too_small(nodes: int, size: tuple[int, int], level: str, style: str) -> None:
    made = arrange(fleet_of(machines(nodes), "utilisation"), "", size[0], size[1] - 2)
    assert (made.level, made.heat.style, made.fits) == (level, style, True)


def test_each_cell_is_found_where_it_is_drawn() -> None:
    fleet = fleet_of(machines(), "utilisation")
    for level in ("GPUs", "nodes", "racks"):
        made = arrange(fleet, level, 80, 18)
        for line, drawn in enumerate(made.heat.lines):
            for cell in range(drawn.cells):
                assert made.find(*made.node_at(line, cell), fleet) == (line, cell)


def test_the_last_minutes_are_kept_and_no_more() -> None:
    history = History()
    for number in range(SAMPLES + 20):
        snapshot = machines(2, shift=number, wrong=False)
        history.record(replace(snapshot, time=NOW + 3 * number))
        history.record(replace(snapshot, time=NOW + 3 * number + 0.5))
    busy = history.of("r1n01", 3, "utilisation")
    assert len(busy) == SAMPLES and busy[-1] == pytest.approx(
        fleet_of(machines(2, shift=SAMPLES + 19), "utilisation").values[3], abs=1e-3
    )
    assert history.of("r1n02", 0, "power").std() == 0 and len(history.of("nowhere", 0, "power")) == 0


# The screen


async def test_faults_are_letters_and_words(big: Stage) -> None:
    async with attached(big) as screen:
        await _nodes(screen)
        await screen.sees("512 GPUs on 64 nodes", "5 faulty, 1 slow, 1 silent", "r1n04  99898L89", "r1n05  99S98898", "r4n03  gone")
        await screen.sees("! r4n04  out of reach", "L lost", "X XID", "~ silent")
        await screen.press("f")
        await screen.press("f")
        assert re.search(r"GPU \d, rank \d+", screen.panel("status"))


async def test_arrows_go_over_the_map_and_into_the_next_block(big: Stage) -> None:
    async with attached(big) as screen:
        view = await _nodes(screen)
        await screen.press("slash", *"r1n", "enter")
        await screen.sees("matching /r1n/")
        view._node, view._place = "r1n01", 6
        await screen.press("right", "right")
        rows = view._made.shape.rows  # type: ignore[union-attr]
        assert (view._node, view._place) == (f"r1n{rows + 1:02}", 0) if rows < 16 else ("r1n01", 7)
        await screen.press("left", "down")
        assert view._place == 7 and view._node == "r1n02"


async def test_one_gpu_with_its_rank_process_and_last_minutes(big: Stage) -> None:
    async with attached(big, (120, 40)) as screen:
        view = await _nodes(screen)
        view._node, view._place = "r1n05", 2
        await screen.press("enter")
        await screen.sees(
            "r1n05 GPU 2  NVIDIA H100", "34, process 4002, at step 1,180", "S slow: 1.7 times the median: 689 ms", "slows at 90",
            "of 700 W", "4002: rank 34, 60.0 GB", "18 of 18",
        )  # fmt: skip
        big.send(time=NOW + 4, nodes=machines(shift=1).nodes)
        await screen.sees("strips: the last 4s")
        await screen.press("right")
        await screen.sees("r1n05 GPU 3")
        await screen.press("up")
        await screen.sees("r1n04 GPU 3")
        await screen.press("escape")
        await screen.sees("the worst")
        await screen.press("escape")
        await screen.until(lambda: screen.app.view_name == "watch")


async def test_a_node_that_is_gone_says_that_its_figures_are_old(big: Stage) -> None:
    big.snapshot = replace(big.snapshot, time=NOW + 70)
    async with attached(big) as screen:
        await _nodes(screen)
        await screen.press("enter")
        await screen.sees("r4n03 GPU 0", "gone, ranks 400 to 407, its figures are 1m 10s old", "the agent of r4n03 died")


async def test_v_goes_through_the_quantities_and_z_through_the_levels(big: Stage) -> None:
    async with attached(big) as screen:
        await _nodes(screen)
        for words in ("memory", "power", "temperature", "SM activity", "tensor activity", "own time a step", "utilisation"):
            await screen.press("v")
            await screen.sees(f" {words}  512 GPUs")
        await screen.press("z", "z")
        await screen.sees("mean, then lowest", "r1  98", "··g··r··d··q98s")
        await screen.press("z")
        await screen.sees("by rack")
        await screen.press("enter")
        await screen.sees("128 GPUs on 16 nodes of rack r4")
        await screen.press("escape")
        await screen.sees("on 64 nodes")


async def test_capitals_ask_before_a_node_is_taken_out(big: Stage) -> None:
    async with attached(big) as screen:
        view = await _nodes(screen)
        view._node = "r1n02"
        for key, words, verb in (
            ("D", "Writes a checkpoint, then restarts the ranks", "node-drain"),
            ("Q", "Ends all ranks at once and goes back to step-1100", "node-quarantine"),
            ("U", "It may be used again", "node-add"),
        ):
            await screen.press(key)
            await screen.until(lambda: isinstance(screen.app.screen, NodeDialog))
            await screen.sees("[ Cancel ]", words)
            await screen.press("enter")
            await screen.sees("nothing was sent")
            await screen.press(key, "left", "enter")
            await screen.until(lambda: big.commands and big.commands[-1].verb == verb, verb)  # noqa: B023
            assert big.commands[-1].arguments == {"node": "r1n02"}
        assert len(big.commands) == 3


async def test_a_node_is_commanded_by_its_name(big: Stage) -> None:
    async with attached(big) as screen:
        await screen.type("node drain r9n99")
        await screen.sees("there is no node 'r9n99'")
        await screen.type("node drop r1n01")
        await screen.sees("'drop' is none of drain, add, quarantine")
        await screen.type("node drain r4n07")
        await screen.until(lambda: isinstance(screen.app.screen, NodeDialog))
        await screen.sees("r4n07 is spare", "nothing is interrupted")
        await screen.press("escape")
        await screen.type("node! quarantine r4n07")
        await screen.until(lambda: big.verbs() == ["node-quarantine"])


async def test_a_read_only_screen_commands_no_node(big: Stage) -> None:
    async with attached(big, read_only=True) as screen:
        await _nodes(screen)
        await screen.press("D")
        await screen.sees("D is not bound: this screen is read-only")


async def test_of_4096_gpus_only_the_rows_that_changed_are_drawn() -> None:
    with Stage(machines(512)) as stage:
        async with attached(stage, (200, 50)) as screen:
            view = await _nodes(screen)
            await screen.press("z")  # by GPU: more than fits, so it scrolls
            assert len(view.query(Heat)) == 1 and len(list(view.walk_children())) < 12
            heat = view.query_one(Heat)
            before = heat.refreshed
            stage.send(time=NOW + 1)
            await screen.pilot.pause(0.7)
            assert heat.refreshed == before
            stage.send(time=NOW + 2, nodes=machines(512, shift=3).nodes)
            await screen.until(lambda: heat.refreshed > before, "the changed row")
            await screen.pilot.pause(0.2)
            assert heat.refreshed == before + 1


async def test_the_watch_names_the_newest_fault(big: Stage) -> None:
    nodes = big.snapshot.nodes
    big.snapshot = replace(big.snapshot, nodes=(nodes[20], nodes[3]))
    async with attached(big, (160, 40)) as screen:
        await screen.sees("1 faulty: GPU 7: slowed down by heat (12s ago)", "1 faulty: GPU 5: it is lost")


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("keys", ["", "z,z", "enter"], ids=["map", "rolled-up", "one"])
def test_pictures(big: Stage, snap_compare: Callable[..., bool], keys: str, size: tuple[int, int]) -> None:
    async def run(pilot: Pilot[int]) -> None:
        app = pilot.app
        assert isinstance(app, MidwatchApp)
        screen = Screen(app, pilot)
        await screen.until(lambda: app.scene.snapshot is not None and app.scene.link.up and app.view is not None)
        await _nodes(screen)
        view = app.view
        assert isinstance(view, NodesView)
        view._node, view._place = "r2n05", 7
        for key in keys.split(","):
            await screen.press(*([key] if key else []))
        view._again()
        await screen.until(lambda: "r2n05  GPU 7" in screen.panel("status") or "by node" in screen.panel("status"))
        await pilot.pause(0.1)

    assert snap_compare(MidwatchApp(big.directory, clock=lambda: NOW), terminal_size=size, run_before=run)


PLAIN_RUN = """
import asyncio
from tests.tui.conftest import attached
from tests.tui.machines import machines
from tests.tui.stage import Stage
async def main():
    with Stage(machines()) as stage:
        async with attached(stage) as screen:
            await screen.open("n", "nodes")
            seen = screen.text()
            await screen.press("enter")
            print(seen + screen.text())
asyncio.run(main())
"""


def test_without_unicode_and_colour_the_map_reads() -> None:
    environment = {"PATH": os.environ["PATH"], "LANG": "C", "TERM": "xterm", "MIDWATCH_TEST_ASCII": "1", "NO_COLOR": "1"}
    done = subprocess.run([sys.executable, "-c", PLAIN_RUN], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.isascii() and "99898L89" in done.stdout and "quarant~" in done.stdout


def test_what_an_agent_of_a_later_version_tells_is_shown_all_the_same() -> None:
    snapshot = machines(1)
    stats = snapshot.nodes[0].stats
    assert stats is not None
    odd = replace(stats.gpus[0], faults=(p.Fault("melted", "it has melted", NOW),))
    node = replace(snapshot.nodes[0], stats=replace(stats, gpus=(odd, *stats.gpus[1:])))
    found = troubles(fleet_of(replace(snapshot, nodes=(node,)), "power"), 1)
    assert (found[0].mark, found[0].text) == ("?", "it has melted")
