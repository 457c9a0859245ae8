"""The screen under test: on a stage that speaks the protocol, at a fixed time, in UTC."""

import os

if "MIDWATCH_TEST_ASCII" not in os.environ:
    os.environ["MIDWATCH_ASCII"] = "0"
os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")

import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import pytest
from textual.pilot import Pilot

from tests.tui.stage import NOW, Stage
from tui.app import MidwatchApp
from tui.core.command_bar import CommandPrompt
from tui.core.text_panel import Panel, text


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setenv("LOGNAME", "anna")
    monkeypatch.delenv("NO_COLOR", raising=False)
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def stage() -> Iterator[Stage]:
    with Stage() as found:
        yield found


class Screen:
    """The app and its pilot, read as an operator reads it."""

    def __init__(self, app: MidwatchApp, pilot: Pilot[int]) -> None:
        self.app, self.pilot = app, pilot

    async def until(self, condition: Callable[[], object], what: str = "", seconds: float = 8.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"never came: {what or condition}\n" + self.text()
            await self.pilot.pause(0.02)

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    async def type(self, line: str) -> None:
        """A command line: its colon and its end by keys, the rest as a paste."""
        await self.pilot.press("colon")
        self.app.query_one(CommandPrompt).insert_text_at_cursor(line)
        await self.press("enter")

    def panel(self, name: str) -> str:
        return "\n".join(text(line) for line in self.app.screen_stack[0].query_one(f"#{name}", Panel).lines)

    def text(self) -> str:
        """The characters that are on the terminal."""
        screen = self.app.screen
        return "\n".join("".join(segment.text for segment in strip) for strip in screen._compositor.render_strips())

    async def sees(self, *words: str) -> None:
        await self.until(lambda: all(word in self.text() for word in words), f"{words} on the screen")

    async def open(self, key: str, name: str) -> None:
        await self.press(key)
        await self.until(lambda: self.app.view_name == name and self.app.view is not None and self.app.view.settled(), name)


@asynccontextmanager
async def attached(stage: Stage, size: tuple[int, int] = (80, 24), *, read_only: bool = False) -> AsyncIterator[Screen]:
    app = MidwatchApp(stage.directory, read_only=read_only, clock=lambda: NOW)
    async with app.run_test(size=size) as pilot:
        screen = Screen(app, pilot)
        await screen.until(
            lambda: app.scene.snapshot is not None and app.view is not None and app.scene.link.up, "the first snapshot"
        )
        await pilot.pause()
        yield screen
