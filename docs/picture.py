"""Draws docs/screen.svg: the screen on a run, or without one on the stage that the tests use.

    python -m docs.picture [RUN]

A RUN that lives is best. Of one that is over a controller is started to answer; nothing is trained.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path

os.environ["MIDWATCH_ASCII"] = "0"

SIZE = (120, 36)
TARGET = Path(__file__).with_name("screen.svg")


async def draw(directory: Path, now: float | None) -> str:
    """The watch view as SVG. `now` fixes the clock."""
    from tui.app import MidwatchApp

    app = MidwatchApp(directory, clock=(lambda: now) if now is not None else time.time)
    async with app.run_test(size=SIZE) as pilot:
        end = time.monotonic() + 30
        while app.scene.snapshot is None or app.view is None or not app.view.settled():
            if app.failure or time.monotonic() > end:
                raise SystemExit(f"docs.picture: {app.failure or 'the screen is not complete after 30 s'}")
            await pilot.pause(0.05)
        await pilot.pause(0.3)
        return app.export_screenshot(title="midwatch", simplify=True)


def main() -> None:
    with ExitStack() as stack:
        if len(sys.argv) > 1:
            directory, now = Path(sys.argv[1]), None
        else:
            from tests.tui.stage import NOW, Stage

            os.environ["TZ"] = "UTC"
            time.tzset()
            directory, now = stack.enter_context(Stage()).directory, NOW
        TARGET.write_text(asyncio.run(draw(directory, now)), encoding="utf-8")
    print(TARGET)


if __name__ == "__main__":
    main()
