"""The controller goes and comes back; the screen says so, and sends nothing meanwhile."""

from pathlib import Path

import pytest

from tests.tui.conftest import Screen, attached
from tests.tui.stage import NOW, Stage, replace
from tui.app import MidwatchApp, run


async def test_a_lost_link_shows_the_age_of_what_is_shown_and_refuses_commands(stage: Stage) -> None:
    now = [NOW]
    app = MidwatchApp(stage.directory, clock=lambda: now[0])
    async with app.run_test(size=(80, 24)) as pilot:
        while app.scene.snapshot is None:
            await pilot.pause(0.02)
        stage.cut()
        while app.scene.link.up:
            await pilot.pause(0.02)
        now[0] = NOW + 42
        app._tick()
        await pilot.pause()
        screen = Screen(app, pilot)
        await screen.sees("LINK LOST", "this is 42s old", "the run goes on; trying again", "NO NEWS FOR 42s", "was training")
        assert "left" not in screen.text()
        await screen.press("p")
        await screen.sees("pause: refused: the controller is out of reach")
        await screen.press("R")
        await screen.sees("rollback: refused")
        assert stage.commands == []


async def test_it_comes_back_by_itself(stage: Stage) -> None:
    async with attached(stage) as screen:
        stage.cut()
        await screen.sees("LINK LOST")
        stage.listen()
        await screen.until(lambda: screen.app.scene.link.up, "the link")
        stage.send(step=1_200)
        await screen.sees("1,200/1,300")
        assert "LINK LOST" not in screen.text()
        await screen.press("c")
        await screen.until(lambda: stage.verbs() == ["checkpoint"])


async def test_q_detaches_with_status_0(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.press("q")
        await screen.until(lambda: screen.app.return_value is not None)
        assert screen.app.return_value == 0 and screen.app.return_code == 0
        assert stage.commands == []


def test_no_run_is_said_before_a_screen_opens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "nothing") == 2
    assert "not a run directory" in capsys.readouterr().err


async def _at(stage: Stage, seconds: float) -> str:
    """The screen so long after the last snapshot."""
    now = [NOW]
    app = MidwatchApp(stage.directory, clock=lambda: now[0])
    async with app.run_test(size=(120, 40)) as pilot:
        while app.scene.snapshot is None or app.view is None:
            await pilot.pause(0.02)
        now[0] = NOW + seconds
        app._tick()
        await pilot.pause()
        return Screen(app, pilot).text()


async def test_a_controller_that_says_nothing_is_told_after_three_seconds(stage: Stage) -> None:
    assert "TRAINING" in (fresh := await _at(stage, 2.5)) and "19s left" in fresh
    silent = await _at(stage, 12.0)
    assert "NO NEWS FOR 12s" in silent and "was training: controller does not answer" in silent
    assert " left" not in silent and "TRAINING" not in silent


async def test_ranks_that_report_nothing_are_told_apart_from_a_controller_that_does_not_answer(stage: Stage) -> None:
    stage.snapshot = replace(stage.snapshot, heard=NOW - 3.5, step_seconds=1.0)
    assert "was training: ranks report nothing (the controller answers)" in await _at(stage, 0.0)
    stage.snapshot = replace(stage.snapshot, step_seconds=4.0)
    assert "TRAINING" in await _at(stage, 0.0), "within three steps nothing is wrong"
    stage.snapshot = replace(stage.snapshot, phase="evaluating", phase_since=NOW - 40, step_seconds=0.1)
    assert "evaluating for 40s" in await _at(stage, 0.0)
