"""Every view as a picture, at the sizes of a bad link, a laptop and a large screen."""

from collections.abc import Callable

import pytest
from textual.pilot import Pilot

from tests.tui.conftest import Screen
from tests.tui.rollouts import play
from tests.tui.stage import NOW, Stage
from tui.app import MidwatchApp
from tui.core import keys

SIZES = ((80, 24), (120, 40), (200, 50))


def _app(stage: Stage) -> MidwatchApp:
    return MidwatchApp(stage.directory, clock=lambda: NOW)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("view", keys.views(), ids=lambda view: view.name)
def test_view(stage: Stage, snap_compare: Callable[..., bool], view: keys.ViewSpec, size: tuple[int, int]) -> None:
    async def open_view(pilot: Pilot[int]) -> None:
        app = pilot.app
        assert isinstance(app, MidwatchApp)
        screen = Screen(app, pilot)
        await screen.until(lambda: app.scene.snapshot is not None and app.scene.link.up and app.view is not None)
        await screen.open(view.key, view.name)
        await screen.until(lambda: app.view is not None and app.view.settled())
        await pilot.pause(0.1)

    assert snap_compare(_app(stage), terminal_size=size, run_before=open_view)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("view", ["watch", "metrics", "samples", "whole"])
def test_rollouts(stage: Stage, snap_compare: Callable[..., bool], view: str, size: tuple[int, int]) -> None:
    play(stage)

    async def open_view(pilot: Pilot[int]) -> None:
        app = pilot.app
        assert isinstance(app, MidwatchApp)
        screen = Screen(app, pilot)
        await screen.until(lambda: app.scene.snapshot is not None and app.scene.link.up and app.view is not None)
        name = "samples" if view == "whole" else view
        await screen.open({"watch": "w", "metrics": "m", "samples": "y"}[name], name)
        if view == "whole":
            await screen.press("2", "down", "enter")
        await screen.until(lambda: app.view is not None and app.view.settled())
        await pilot.pause(0.1)

    assert snap_compare(_app(stage), terminal_size=size, run_before=open_view)


@pytest.mark.parametrize("key", ["R", "A", "S", "question_mark"])
def test_dialog(stage: Stage, snap_compare: Callable[..., bool], key: str) -> None:
    async def ask(pilot: Pilot[int]) -> None:
        app = pilot.app
        assert isinstance(app, MidwatchApp)
        screen = Screen(app, pilot)
        await screen.until(lambda: app.scene.snapshot is not None and app.view is not None and app.view.settled())
        await screen.press(key)
        await screen.until(lambda: key != "question_mark" or (app.view_name == "help" and app.view.settled()))  # type: ignore[union-attr]
        await screen.sees({"R": "Undoes 180", "A": "no later stage", "S": "Writes", "question_mark": "Commands"}[key])
        await pilot.pause(0.1)

    assert snap_compare(_app(stage), terminal_size=(80, 24), run_before=ask)
