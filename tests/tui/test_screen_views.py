"""What the views show and their keys do."""

import re

import numpy as np
import pytest

from midwatch import protocol as p
from midwatch.objectives.registry import spec_of
from tests.tui.conftest import attached
from tests.tui.stage import NOW, STEP, Stage, log_lines, replace
from tui.chart.widget import Chart
from tui.core import keys
from tui.core.text_panel import text
from tui.views.checkpoints import tree
from tui.views.headline_charts import slots
from tui.views.metrics import MetricsView, StepWindow, _order


async def test_every_key_of_the_table_has_its_handler(stage: Stage) -> None:
    async with attached(stage) as screen:
        for view in keys.views():
            await screen.press(view.key)
            await screen.until(lambda: screen.app.view_name == view.name and screen.app.view is not None)  # noqa: B023
            for key in keys.of_view(view.name):
                action = key.action.partition(":")[0]
                assert hasattr(screen.app.view, f"do_{action}") or hasattr(screen.app, f"do_{action}"), (view, key)
        for key in keys.everywhere():
            assert hasattr(screen.app, f"do_{key.action.partition(':')[0]}"), key


def test_no_key_means_two_things_in_one_view() -> None:
    for table in (keys.everywhere(), *keys.all_of_views().values()):
        pressed = [name for key in table for name in key.keys]
        assert len(pressed) == len(set(pressed))


async def test_views_open_by_letter_and_escape_goes_back(stage: Stage) -> None:
    async with attached(stage) as screen:
        for view in keys.views()[1:]:
            await screen.open(view.key, view.name)
            await screen.sees(f" {view.key} {view.name} ")
        for view in reversed(keys.views()[:-1]):
            await screen.press("escape")
            await screen.until(lambda: screen.app.view_name == view.name, view.name)  # noqa: B023


async def test_the_help_names_what_is_not_there_yet(stage: Stage) -> None:
    async with attached(stage, (120, 230)) as screen:
        await screen.press("question_mark")
        await screen.sees("Not there yet", "mixture against target")
        await screen.press("d")
        await screen.sees("data: not there yet")


async def test_without_a_gpu_cpus_and_memory_are_shown_and_said(stage: Stage) -> None:
    async with attached(stage, (120, 40)) as screen:
        await screen.sees("4 CPUs", "5.3 GB of 16.6 GB", "no GPU: NVML is not installed")


async def test_gpus_are_a_strip(stage: Stage) -> None:
    gpus = tuple(
        p.Gpu(index=n, utilisation=0.9, memory_used=60_000_000_000, memory_total=80_000_000_000, temperature=61.0 + n, power=400.0)
        for n in range(8)
    )
    node = stage.snapshot.nodes[0]
    assert node.stats is not None
    stage.snapshot = replace(stage.snapshot, nodes=(replace(node, stats=replace(node.stats, gpus=gpus)),))
    async with attached(stage, (120, 40)) as screen:
        await screen.sees("8 GPUs ████████", "90% busy", "480 GB of 640 GB", "hottest 68 °C", "3,200 W")


async def test_while_the_data_is_built_its_progress_is_shown(stage: Stage) -> None:
    stages = (
        p.StageView(
            name="data", objective="data", state="running", step=41, steps=100, seconds=9.0, seconds_left=13.0, note="tokenizer"
        ),
        *(replace(s, state="waiting", step=0) for s in stage.snapshot.stages[1:]),
    )
    stage.snapshot = replace(stage.snapshot, state="building", stages=stages, latest={}, step=0, checkpoints=(), phase="")
    async with attached(stage) as screen:
        await screen.sees("BUILDING", "data: 41%, tokenizer", "13s left", "41%", "the data is being built")


def test_kl_and_reward_are_charted_where_there_are_any() -> None:
    assert [slot.title for slot in slots({"train/loss": 1.0})] == ["loss"]
    latest = {"train/loss": 1.0, "policy/kl": 0.1, "policy/reward": 1.0, "preference/margin": 2.0}
    found = [slot.title for slot in slots(latest, spec_of("dpo").charts)]
    assert found[:3] == ["loss", "KL per token", "reward"]


def test_held_out_losses_come_right_after_the_loss_and_its_parts_among_what_else_is_trained_on() -> None:
    wanted = (
        "train/loss",
        "policy/kl",
        "eval/a/loss",
        "eval/b/loss",
        "eval/a/loss_before",
        "train/grad_norm",
        "train/loss_near_boundaries",
        "train/loss_within_documents",
        "perf/mfu",
        "data/a/fraction",
    )
    assert tuple(sorted(sorted(wanted), key=_order)) == wanted


async def test_metrics_filter_zoom_smooth_and_maximise(stage: Stage) -> None:
    async with attached(stage, (120, 40)) as screen:
        await screen.open("m", "metrics")
        view = screen.app.view
        assert isinstance(view, MetricsView)
        await screen.sees("train/loss", "perf/step_seconds", "steps 0 to 1,180", "pretrain", "dpo")
        await screen.press("slash", *"eval", "enter")
        await screen.sees("3 metrics matching /eval/")
        assert "train/grad_norm" not in screen.text()
        await screen.press("plus")
        await screen.sees("steps 591 to 1,180")
        await screen.press("left")
        await screen.sees("steps 444 to 1,033")
        await screen.press("0")
        await screen.sees("steps 0 to 1,180")
        await screen.press("s", "L", "x")
        await screen.sees("smoothed over 10", "log y", "by tokens")
        await screen.press("enter")
        await screen.until(lambda: len([c for c in screen.app.query(Chart) if c.display and c.is_on_screen]) == 1, "one chart")
        await screen.press("left_square_bracket")
        await screen.sees("crosshair at step 1,168", "step 1,168  2.495")


async def test_a_bad_filter_is_answered_and_changes_nothing(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.open("j", "journal")
        before = len(screen.app.view._shown)  # type: ignore[union-attr]
        await screen.press("slash", "left_parenthesis", "enter")
        await screen.sees("/(: ")
        assert len(screen.app.view._shown) == before > 10  # type: ignore[union-attr]


async def test_rolled_back_lineages_stay_as_ghosts(stage: Stage) -> None:
    async with attached(stage, (120, 40)) as screen:
        await screen.open("m", "metrics")
        charts = [c for c in screen.app.query(Chart) if c.picture is not None and "train/loss" in c.picture.title]
        assert [int(ghost.columns.count.sum()) for ghost in charts[0].picture.ghosts] == [461]  # type: ignore[union-attr]
        asked = [q for q in stage.questions if isinstance(q, p.ChartQuery) and q.lineage == 1 and q.metric == "train/loss"]
        stage.send(step=STEP)
        await screen.press("s")
        await screen.until(lambda: screen.app.view is not None and screen.app.view.settled())
        again = [q for q in stage.questions if isinstance(q, p.ChartQuery) and q.lineage == 1 and q.metric == "train/loss"]
        assert len(again) == len(asked)  # what is over is asked for once


def test_zoom_and_pan_stay_within_the_run() -> None:
    span = StepWindow()
    for _ in range(30):
        span = span.zoomed(0.5, 1000, None)
    start, stop = span.steps(1000)
    assert stop == 1001 and stop - start == 8
    for _ in range(2000):
        span = span.panned(-1, 1000)
    assert span.steps(1000)[0] == 0
    for _ in range(2000):
        span = span.panned(1, 1000)
    assert span.stop is None  # follows the run again
    for _ in range(30):
        span = span.zoomed(2.0, 1000, 3)
    assert span == StepWindow()


def test_the_tree_puts_a_lineage_beneath_its_fork() -> None:
    from tests.tui.stage import snapshot

    rows = [(row.depth, row.lineage.id if row.lineage else row.checkpoint.id) for row in tree(snapshot())]  # type: ignore[union-attr]
    assert rows == [
        (0, 1), (0, "step-200"), (0, "step-400"),
        (1, 2), (1, "step-600"), (1, "step-800"), (1, "step-1000"), (1, "step-1100"),
        (0, "step-450"),
    ]  # fmt: skip


async def test_checkpoints_say_golden_and_suspect_without_colour(stage: Stage) -> None:
    async with attached(stage, (120, 40)) as screen:
        await screen.open("k", "checkpoints")
        assert re.search(r"★ step-400 .*golden", screen.text())
        assert re.search(r"\? step-450 .*SUSPECT, rolled back", screen.text())
        await screen.press("enter")
        await screen.sees("A rollback to it: Undoes 180 steps", "now: step 1,180")


async def test_stages_show_held_out_losses_origin_and_samples(stage: Stage) -> None:
    async with attached(stage, (120, 40)) as screen:
        await screen.open("t", "stages")
        await screen.press("up")
        await screen.sees("made from", "step-800 → step-1000", "3.040 → 2.470 (-0.570)", "Join two or more pathname components")


async def test_logs_follow_filter_and_change_file(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.open("l", "logs")
        await screen.sees("2 of 3", "step 599", "following")
        stage.logs["laptop/0.log"] = [*log_lines(600), "ERROR out of memory"]
        await screen.until(lambda: screen.app._tick() or "A ERROR out of memory" in screen.text(), "the new line")
        await screen.press("slash", *"ERROR", "enter")
        await screen.sees("1 line matching /ERROR/")
        await screen.press("slash", *["backspace"] * 5, "enter", "up")
        await screen.sees("held at")
        await screen.press("left")
        await screen.sees("1 of 3", "W WARNING a peer is rejected")


async def test_a_hundred_thousand_lines_draw_only_those_in_sight(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    from tui.views import logs

    stage.logs["laptop/0.log"] = log_lines(100_000)
    drawn: list[str] = []
    inked = logs._inked
    monkeypatch.setattr(logs, "_inked", lambda line: (drawn.append(line), inked(line))[1])
    async with attached(stage) as screen:
        await screen.open("l", "logs")
        await screen.press("home")
        await screen.until(lambda: len(screen.app.view._all) == 100_000, "the whole file")  # type: ignore[union-attr]
        await screen.sees("step 0:")
        await screen.press("end")
        await screen.sees("step 99999")
        assert len(drawn) < 100 * 24


async def test_log_text_can_be_selected(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.open("l", "logs")
        rows = screen.app.view.rows  # type: ignore[union-attr]
        assert rows is not None
        await screen.pilot.mouse_down(rows, offset=(2, 3))
        await screen.pilot.hover(rows, offset=(40, 4))
        await screen.pilot.mouse_up(rows, offset=(40, 4))
        await screen.pilot.pause()
        chosen = screen.app.screen.get_selected_text()
        assert chosen is not None and chosen.count("\n") == 1 and "rank0 INFO" in chosen
        assert text(rows.lines[rows.top + 3])[2:] in chosen


async def test_the_journal_takes_in_what_is_new(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.open("j", "journal")
        line = p.JournalLine(index=20, time=NOW, term=1, kind="state", author="", text="ranks lost: exit 9", level="warning")
        stage.journal.append(line)
        stage.send(events=(*stage.snapshot.events[1:], line))
        await screen.sees("W state", "ranks lost: exit 9")
        await screen.press("slash", *"anna", "enter")
        await screen.sees("matching /anna/", "#4 advance --to dpo")
        assert "ranks lost" not in screen.text()


def test_the_stage_is_the_same_each_time() -> None:
    from tests.tui.stage import series

    assert np.array_equal(series()["train/loss"][2], series()["train/loss"][2])
