"""Reward, KL and what the policy writes, live."""

from __future__ import annotations

import numpy as np
import pytest

from launcher.controller.core.rollout_samples import Samples
from midwatch import protocol as p
from midwatch.objectives.registry import spec_of
from tests.tui.conftest import Screen, attached
from tests.tui.rollouts import UPDATES, play, rollouts, write
from tests.tui.stage import NOW, Stage, replace
from tui.core.scene import Scene
from tui.core.text_panel import text
from tui.headless import _line
from tui.views.headline_charts import slots
from tui.views.metrics import _order
from tui.views.samples import SamplesView, page, row
from tui.views.watch import rollout


@pytest.fixture
def drawing(stage: Stage) -> Stage:
    play(stage)
    return stage


def listed(screen: Screen) -> SamplesView:
    view = screen.app.view
    assert isinstance(view, SamplesView)
    return view


async def settled(screen: Screen) -> None:
    await screen.until(lambda: listed(screen).settled(), "the samples")
    await screen.pilot.pause()


async def test_samples_are_sorted_by_keys(drawing: Stage) -> None:
    async with attached(drawing) as screen:
        await screen.open("y", "samples")
        await screen.sees("step▾", "70 samples, newest first, following")
        for key, name, sign in (
            ("2", "reward", "reward▾"),
            ("3", "reward", "reward▴"),
            ("4", "tokens", "tokens▾"),
            ("5", "kl", "KL▾"),
        ):
            await screen.press(key)
            await settled(screen)
            await screen.sees(sign)
            values = [getattr(sample, name) for sample in listed(screen)._samples if getattr(sample, name) is not None]
            assert values == sorted(values, reverse="▾" in sign) and len(values) > 20
        await screen.press("s")
        await screen.sees("step▾", "newest first")
        await screen.press("s")
        await screen.sees("best first")


async def test_one_is_shown_whole_and_arrows_go_to_others(drawing: Stage) -> None:
    async with attached(drawing) as screen:
        await screen.open("y", "samples")
        await screen.press("down", "down", "enter")
        await screen.sees("ppo, step 1,180, lineage 2", "3 of 70", "32 tokens", "    with open(name) as file:", "end.?[2J")
        assert "tokens  prompt" not in screen.text()
        await screen.press("down")
        await screen.sees("What does os.path.join do?", "4 of 70")
        await screen.press("escape")
        await screen.sees("tokens  prompt")
        await screen.press("escape")
        await screen.until(lambda: screen.app.view_name == "watch")


async def test_on_a_wide_screen_it_stands_beside_the_list(drawing: Stage) -> None:
    async with attached(drawing, (200, 50)) as screen:
        await screen.open("y", "samples")
        await screen.sees("tokens  prompt", "1 of 70", "    return {value: key for key, value in table.items()}")
        await screen.press("down")
        await screen.sees("Explain the difference between a list and a tuple.", "2 of 70")


async def test_new_ones_come_in_above_and_the_cursor_stays_on_its_own(drawing: Stage) -> None:
    async with attached(drawing) as screen:
        await screen.open("y", "samples")
        write(drawing, 1_192)
        drawing.send(samples=drawing.samples.taken)
        await screen.sees("1,192", "74 samples")
        view = listed(screen)
        assert view.chosen is not None and view.chosen.step == 1_192, "it follows the newest"
        await screen.press("down", "down", "down", "down", "down")
        await screen.sees("held (f follows)")
        held, on_row = view.chosen, view._list.cursor - view._list.top
        write(drawing, 1_204)
        drawing.send(samples=drawing.samples.taken)
        await screen.sees("78 samples")
        assert view.chosen is not None and held is not None and view.chosen.name == held.name
        assert view._list.cursor - view._list.top == on_row, "and what is read stays where it is"
        await screen.press("f")
        await screen.sees("1,204", "following")


async def test_a_long_list_is_fetched_as_it_is_walked(drawing: Stage) -> None:
    for step in range(2_000, 2_400, 2):
        write(drawing, step)
    drawing.send(samples=drawing.samples.taken)
    async with attached(drawing) as screen:
        await screen.open("y", "samples")
        await screen.sees("870 samples")
        view = listed(screen)
        assert len(view._samples) == 60
        for _ in range(4):
            await screen.press("end")
            await settled(screen)
        assert len(view._samples) == 460
        asked = [q for q in drawing.questions if isinstance(q, p.SampleQuery) and not q.sample]
        assert all(q.cut == 80 for q in asked), "a list asks for no more of the texts than it shows"


async def test_filter_and_stage_choose(drawing: Stage) -> None:
    async with attached(drawing) as screen:
        await screen.open("y", "samples")
        await screen.press("slash", *"great", "enter")
        await screen.sees("matching /great/", "17 samples")
        await screen.press("slash", *["backspace"] * 5, *"zzz", "enter")
        await screen.sees("nothing matches")
        await screen.press("slash", *["backspace"] * 3, "left_parenthesis", "enter")
        await screen.sees("/(: ")
        await screen.press("slash", *["backspace"] * 3, "enter")
        await screen.until(lambda: listed(screen)._total == 70 and listed(screen).settled(), "all")
        await screen.press("right")
        await screen.until(lambda: listed(screen)._stage == "pretrain" and listed(screen)._total == 1, "those of pretrain")
        assert "1 sample of pretrain" in text(listed(screen).status())
        await screen.press("left", "left")
        await screen.until(lambda: listed(screen)._stage == "ppo" and listed(screen)._total == 68, "those of ppo")


async def test_what_was_rolled_back_is_dimmed_and_marked(drawing: Stage) -> None:
    async with attached(drawing) as screen:
        await screen.open("y", "samples")
        for _ in range(2):
            await screen.press("end")
            await settled(screen)
        await screen.sees("× rolled back")
        assert "×     430" in screen.text()
    undone = p.SampleView(name="a", stage="ppo", step=430, lineage=1, on_line=False, prompt="why?", text="because")
    fine = replace(undone, on_line=True)
    assert text(row(undone, 78))[0] == "×" and text(row(fine, 78))[0] == " "
    assert {ink for _, ink in row(undone, 78)} != {ink for _, ink in row(fine, 78)}
    assert "rolled back" in text(page(undone, "1 of 1", 78, whole=True)[0])


async def test_where_nothing_was_written_the_view_says_what_will_be(drawing: Stage) -> None:
    drawing.samples = Samples(drawing.directory / "none", 1)
    async with attached(drawing) as screen:
        await screen.open("y", "samples")
        await screen.press("slash", *"neverthere", "enter")
        await screen.sees("0 samples matching", "nothing matches")


async def test_only_changed_rows_are_drawn_again(drawing: Stage) -> None:
    async with attached(drawing) as screen:
        await screen.open("y", "samples")
        drawn: list[int] = []
        rows = listed(screen)._list
        render = rows.render_line
        rows.render_line = lambda y: (drawn.append(y), render(y))[1]  # type: ignore[method-assign]
        drawing.send(step=drawing.snapshot.step)
        await screen.pilot.pause(0.3)
        assert drawn == []
        await screen.press("down")
        assert set(drawn) == {0, 1}


# The watch


async def test_the_watch_shows_reward_and_kl_before_the_loss(drawing: Stage) -> None:
    async with attached(drawing) as screen:
        await screen.sees(
            "reward 1.", "held-out 1.6", "entropy 2.", "length 9", "KL per response, kl 0.12", "A training", "B questions"
        )
        await screen.sees("generating 4.2 s", "scoring 0.8 s", "▸updating 2/4 1.5/3.1 s", "KL 6.59 (target 6)")


async def test_where_there_is_room_entropy_and_lengths_stand_beside_them(drawing: Stage) -> None:
    async with attached(drawing, (200, 50)) as screen:
        await screen.sees("entropy", "response length", "variance explained", "cut off 1.6", "kl 0.12")


def test_phases_are_told_live_with_their_seconds() -> None:
    def told(phase: str, **changes: object) -> str:
        snapshot = rollouts(phase, **changes)
        return text(rollout(Scene(run="r", now=NOW, snapshot=snapshot, received=NOW), snapshot, snapshot.stages[-1]))

    assert "▸generating 1.5/4.2 s" in told("generating") and "▸scoring 1.5/0.8 s" in told("scoring")
    assert "▸" not in told("evaluating") and "▸" not in told("training", state="paused")
    first = told("generating", latest={"train/loss": 1.0})
    assert "▸generating 1.5/- s" in first and "updating - s" in first and "KL" not in first
    assert UPDATES == 4


@pytest.mark.parametrize(("phase", "words"), [("generating", "writing responses"), ("scoring", "scoring responses")])
async def test_phases_have_words_on_the_screen_and_without_one(drawing: Stage, phase: str, words: str) -> None:
    drawing.snapshot = replace(drawing.snapshot, phase=phase)
    async with attached(drawing) as screen:
        await screen.sees(f"ppo: step 181 of 300 · 19s left · {words}", f"▸{phase}")
    line = _line(drawing.snapshot)
    assert line.startswith(f"training ppo step 1180/1300  {words}  loss") and "reward 1.895" in line and "KL 6.59" in line


def test_charts_of_a_stage_that_draws_none_do_not_change() -> None:
    latest = rollouts().latest
    charts = spec_of("ppo").charts
    assert [slot.title for slot in slots(latest, charts, {"kl_coef": 0.1})][:2] == [
        "reward",
        "KL per response, kl 0.1",
    ]
    assert slots(latest)[0].title == "loss" and slots({"train/loss": 1.0}, charts)[0].title == "loss"


def test_metrics_of_a_policy_stand_in_the_order_in_which_they_are_read() -> None:
    names = sorted(
        ["perf/mfu", "perf/generate_seconds", "value/loss", "policy/kl", "policy/weights_step", "policy/ratio", "policy/entropy",
         "eval/q/loss", "eval/q/reward", "policy/kl_sequence", "policy/reward",
         "policy/truncated_fraction", "train/loss", "train/lr",
         "policy/response_length", "other/thing"],
        key=_order,
    )  # fmt: skip
    assert names == [
        "train/loss", "policy/reward", "eval/q/reward", "policy/kl_sequence", "policy/entropy", "policy/response_length",
        "policy/truncated_fraction", "policy/kl", "policy/ratio", "policy/weights_step", "value/loss", "eval/q/loss", "train/lr",
        "perf/generate_seconds", "perf/mfu", "other/thing",
    ]  # fmt: skip


def test_the_rollouts_are_the_same_each_time() -> None:
    assert rollouts() == rollouts() and np.isfinite(list(rollouts().latest.values())).all()
