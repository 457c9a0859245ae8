"""Any size, any terminal: down to one cell and back, without colour, in sixteen colours, without Unicode."""

import subprocess
import sys

import pytest
from rich.color import Color, ColorSystem
from rich.style import Style
from textual.color import Color as Shade

from tests.tui.conftest import attached
from tests.tui.stage import Stage
from tui.chart.formatting import speaks_unicode
from tui.chart.styles import STYLES, Ink
from tui.core import keys

BLACK = Shade(0, 0, 0)
SIZES = ((1, 1), (2, 1), (1, 30), (20, 5), (300, 3), (80, 24))


async def test_every_view_down_to_one_cell_and_back(stage: Stage) -> None:
    async with attached(stage) as screen:
        for view in keys.views():
            await screen.open(view.key, view.name)
            for size in SIZES:
                await screen.pilot.resize_terminal(*size)
                await screen.pilot.pause()
            await screen.until(lambda: screen.app.view is not None and screen.app.view.settled(), view.name)
            await screen.sees(f" {view.key} {view.name} ", "demo")


async def test_dialogs_down_to_one_cell_and_back(stage: Stage) -> None:
    async with attached(stage) as screen:
        for key in "RAS":
            await screen.press(key)
            for size in SIZES:
                await screen.pilot.resize_terminal(*size)
                await screen.pilot.pause()
            await screen.sees("[ Cancel ]")
            await screen.press("escape")


async def test_no_color_leaves_nothing_but_grey(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    async with attached(stage) as screen:
        assert screen.app.no_color
        await screen.sees("TRAINING")
        colours = set()
        for strip in screen.app.screen._compositor.render_strips():
            for segment in screen.app._filters[0].apply(list(strip), BLACK):
                if segment.style is not None and segment.style.color is not None:
                    colours.add(segment.style.color.triplet)
        assert colours and all(triplet is None or triplet[0] == triplet[1] == triplet[2] for triplet in colours)


def test_in_sixteen_colours_every_ink_can_be_told_from_the_background() -> None:
    background = Color.parse("#0f1318").downgrade(ColorSystem.STANDARD)
    for ink in Ink:
        style: Style = STYLES[ink]
        if style.color is not None:
            assert style.color.downgrade(ColorSystem.STANDARD).number != background.number, ink


@pytest.mark.parametrize(
    ("environment", "speaks"),
    [
        ({"LANG": "C"}, False),
        ({"LANG": "C", "LC_CTYPE": "C.UTF-8"}, False),  # what Python makes of LANG=C
        ({"LANG": "en_US.ISO-8859-1"}, False),
        ({"LANG": "de_DE.UTF-8"}, True),
        ({"LC_ALL": "C", "LANG": "de_DE.UTF-8"}, False),
        ({"LC_CTYPE": "de_DE.utf8"}, True),
        ({}, True),
        ({"TERM": "linux", "LANG": "C.UTF-8"}, False),
        ({"LANG": "C", "MIDWATCH_ASCII": "0"}, True),
        ({"LANG": "C.UTF-8", "MIDWATCH_ASCII": "1"}, False),
    ],
)
def test_the_locale_tells_whether_the_terminal_takes_unicode(environment: dict[str, str], speaks: bool) -> None:
    assert speaks_unicode(environment) is speaks


ASCII_RUN = """
import asyncio
from tests.tui.conftest import attached
from tests.tui.stage import Stage
from tui.core.keys import views
async def main():
    with Stage() as stage:
        async with attached(stage) as screen:
            seen = set()
            for key, name in ((view.key, view.name) for view in views()):
                await screen.open(key, name)
                seen |= set(screen.text())
            await screen.press("R"); await screen.sees("Undoes"); seen |= set(screen.text())
            print("".join(sorted(c for c in seen if not c.isascii() and c != "\\n")), len(seen))
asyncio.run(main())
"""


def test_without_unicode_every_view_is_ascii() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ASCII_RUN],
        env={"PATH": "/usr/bin:/bin", "LANG": "C", "TERM": "xterm", "MIDWATCH_TEST_ASCII": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    other, count = done.stdout.rsplit(maxsplit=1) if done.stdout.split()[1:] else ("", done.stdout)
    assert other == "" and int(count) > 50
