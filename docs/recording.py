"""Records docs/rescue.svg, a night's rescue on the real screen: `python -m docs.recording`.

The screen is the real app, driven by keys. The run behind it, on 16 GPUs, is scripted (`docs/rescue.py`): its loss spikes at step
430.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["MIDWATCH_ASCII"] = "0"
os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")

from docs.animation import Frame, animate
from docs.rescue import ALARM, BAD, FORK, SPIKE, Night

SIZE = (104, 28)
TARGET = Path(__file__).with_name("rescue.svg")
TITLE = "A night's rescue: the loss spikes, and a rollback recovers it"
POSTER = 10
"""The frame that is shown where nothing animates: the alarm."""
SECONDS = 30.0
"""To wait for the screen to show what was asked for."""


class Recorder:
    """Presses keys, waits until the screen shows what they ask for, and keeps the pictures."""

    def __init__(self, night: Night, app: Any, pilot: Any) -> None:
        self.night, self.app, self.pilot = night, app, pilot
        self.frames: list[Frame] = []

    async def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            if self.app.failure or time.monotonic() > end:
                raise SystemExit(f"docs.recording: {self.app.failure or 'the screen does not show what it should in time'}")
            await self.pilot.pause(0.02)

    async def picture(self, seconds: float, caption: str, key: str = "") -> None:
        def is_current() -> bool:
            found = self.app.scene.snapshot
            return found is not None and (found.step, found.lineage) == (self.night.step, self.night.lineage)

        await self.until(is_current)
        await self.until(lambda: self.app.view is not None and self.app.view.settled())
        await self.pilot.pause(0.25)
        self.frames.append(Frame(self.app.export_screenshot(simplify=True), seconds, key, caption))

    async def steps(self, steps: range, seconds: float, caption: str) -> None:
        for step in steps:
            self.night.at(step, self.night.lineage)
            await self.picture(seconds, caption)

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()


async def story(recorder: Recorder) -> None:
    night = recorder.night
    await recorder.steps(range(408, SPIKE + 1, 7), 0.7, "02:36  Llama 8B on 16 GPUs, overnight.")
    await recorder.steps(range(SPIKE + 2, ALARM, 2), 0.7, "02:39  A bad stretch of data: the loss leaves its course.")
    night.raise_alarm()
    await recorder.steps(range(ALARM + 2, BAD + 1, 4), 0.7, "02:39  A watch rule raises an alarm.")
    await recorder.press("m", "enter")
    await recorder.picture(2.4, "The loss on the whole screen: it spikes at step 430.", "m")
    await recorder.press("R")
    await recorder.until(lambda: len(recorder.app.screen_stack) > 1)
    await recorder.picture(3.2, "Roll back: the newest good checkpoint before the alarm is chosen already.", "R")
    await recorder.press("b")
    await recorder.picture(2.8, "Skip the data up to the bad step, too.", "b")
    await recorder.press("tab")
    await recorder.picture(1.2, "The dialog says what it costs. Nothing has happened yet.", "Tab")
    night.note("command", f"#1 rollback {FORK}-1 --skip {BAD - FORK}", "anna")
    await recorder.press("enter")
    await recorder.until(lambda: night.commands)
    night.note(
        "lineage", f"2 (rollback) from {FORK}-1, {BAD - FORK} steps undone, {BAD - FORK} steps of data skipped", "anna", "warning"
    )
    night.note("outcome", f"#1 rollback {FORK}-1 --skip {BAD - FORK}: done at step {FORK} (lineage 2)", "anna")
    night.alarmed = False
    await recorder.until(lambda: len(recorder.app.screen_stack) == 1)
    await recorder.press("enter", "w")
    night.at(FORK, 2)
    await recorder.picture(1.6, "All ranks have loaded the checkpoint in place, without a restart.", "Enter")
    await recorder.steps(range(FORK + 8, FORK + 101, 12), 0.6, "A new lineage, without the data that hurt.")
    await recorder.press("m", "enter")
    await recorder.picture(3.0, "The loss is back on its course. The old lineage stays on the chart, dimmed.", "m")
    await recorder.press("j")
    await recorder.picture(3.6, "Who did what, when, and what came of it.", "j")


def main() -> None:
    from tui.app import MidwatchApp

    os.environ["TZ"] = "UTC"
    time.tzset()

    async def record(night: Night) -> list[Frame]:
        app = MidwatchApp(night.directory, clock=lambda: night.now)
        async with app.run_test(size=SIZE) as pilot:
            recorder = Recorder(night, app, pilot)
            await story(recorder)
            return recorder.frames

    night = Night()
    with night:
        night.at(401)
        frames = asyncio.run(record(night))
    TARGET.write_text(animate(frames, TITLE, POSTER), encoding="utf-8")
    print(f"{TARGET}: {len(frames)} frames, {TARGET.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
