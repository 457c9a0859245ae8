"""Preferences by hand on the screen: a key decides one pair, once, and only what was in sight; whatever is killed when."""

import json
import os
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from midwatch import protocol as p
from tests.tui.conftest import Screen, attached
from tests.tui.stage import NOW, Stage
from tests.tui.test_screen_terminal import Tmux, _until
from tui.app import MidwatchApp
from tui.core import keys
from tui.core.text_panel import text, width
from tui.views import preference_layout
from tui.views.prefer import PreferView

SIZES = ((80, 24), (200, 50))
PROMPTS = tuple((p.ProbeTurn("user", f"What does os.path.join do with {n} arguments?"),) for n in range(30))
BEGIN = p.PreferenceBegin(id=0, annotator="anna", session="s", prompts=PROMPTS)


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tui.views.prefer.READ_SECONDS", 0.0)


@asynccontextmanager
async def annotating(stage: Stage, size: tuple[int, int] = (80, 24), begin: p.PreferenceBegin = BEGIN) -> AsyncIterator[Screen]:
    app = MidwatchApp(stage.directory, clock=lambda: NOW, prefer=begin)
    async with app.run_test(size=size) as pilot:
        screen = Screen(app, pilot)
        await screen.until(lambda: app.view_name == "prefer" and view(screen)._shown[0], "a pair")
        await pilot.pause()
        yield screen


def view(screen: Screen) -> PreferView:
    found = screen.app.view
    assert isinstance(found, PreferView)
    return found


def lines(stage: Stage, annotator: str = "anna") -> list[dict[str, Any]]:
    file = stage.directory / "preferences" / f"{annotator}.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


async def decide(screen: Screen, stage: Stage, key: str, count: int) -> None:
    await screen.press(key)
    await screen.until(lambda: len(lines(stage)) == count and view(screen)._pending is None, f"{key} is kept")
    await screen.pilot.pause()


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
async def test_every_key_decides_what_it_says(stage: Stage, size: tuple[int, int]) -> None:
    async with annotating(stage, size) as screen:
        first = view(screen)._state
        assert first is not None and first.pair is not None
        await screen.sees(
            "Join one or more", "Join path components", "upper" if size[0] < 100 else "left", "no pair decided by two"
        )
        answers = [text(line) for rows in view(screen)._texts for line in rows.lines]
        assert "    os.path.join('a', 'b')" in answers, "code keeps its indent"
        pressed = (
            ("left", "left"),
            ("1", "left"),
            ("right", "right"),
            ("2", "right"),
            ("t", "tie"),
            ("x", "both-bad"),
            ("s", "skip"),
        )
        for count, (key, choice) in enumerate(pressed, 1):
            await decide(screen, stage, key, count)
            assert lines(stage)[-1]["choice"] == choice
        assert len({each["pair"] for each in lines(stage)}) == len(pressed)
        await screen.sees("skipped: kept; u takes it back", "7 today", "7 in all")
        await decide(screen, stage, "u", 8)
        assert lines(stage)[-1]["decision"] == lines(stage)[-2]["id"]
        await screen.sees("undone", "6 in all")
        told = lines(stage)[0]
        assert (told["left"]["text"], told["right"]["text"]) == (first.pair.left, first.pair.right)
        assert {told["left"]["score"], told["right"]["score"]} == {1.25, -0.5}
        await screen.sees("reward model agrees")


async def test_a_slip_decides_nothing(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async with annotating(stage) as screen:
        shown = view(screen)._shown[0]
        await screen.press("enter", "space", "up", "down", "pageup", "pagedown", "home", "end", "tab", "down", "G", "h")
        assert lines(stage) == [] and view(screen)._shown[0] == shown and screen.app.view_name == "prefer"
        monkeypatch.setattr("tui.views.prefer.READ_SECONDS", 60.0)
        await screen.press("left", "1", "t", "x", "s")
        assert lines(stage) == [] and view(screen)._pending is None, "what has just come in sight is not decided yet"
        monkeypatch.setattr("tui.views.prefer.READ_SECONDS", 0.0)
        await screen.pilot.press("left", "left", "left")
        await screen.until(lambda: lines(stage))
        await screen.pilot.pause(0.1)
        pairs = [each["pair"] for each in lines(stage)]
        assert len(pairs) == len(set(pairs)), "a key that repeats decides no pair twice"
        await screen.press("p", "c", "g")
        await screen.sees("not bound while you annotate")
        assert stage.commands == [] and "pause" not in screen.panel("footer")
        await screen.type("h")
        assert len(lines(stage)) == len(pairs)


async def test_a_read_only_screen_shows_the_agreement_and_binds_no_choice(stage: Stage) -> None:
    async with attached(stage, read_only=True) as screen:
        await screen.open("o", "prefer")
        await screen.sees("read-only", "no pair decided by two")
        await screen.press("left", "t", "u")
        await screen.sees("u is not bound")
        assert lines(stage) == [] and "tie" not in screen.panel("footer")


async def test_out_of_sight_the_name_is_free_and_in_sight_again_it_goes_on(stage: Stage) -> None:
    async with annotating(stage) as screen:
        await decide(screen, stage, "left", 1)
        shown = view(screen)._shown[0]
        await screen.open("k", "checkpoints")
        assert stage.preferring is not None
        await screen.until(lambda: stage.preferring and not stage.preferring._sessions, "the name is free")
        await screen.press("o")
        await screen.until(lambda: screen.app.view_name == "prefer" and view(screen)._shown[0] == shown, "the same pair")
        async with annotating(stage, begin=p.PreferenceBegin(id=0, annotator="bob", session="t", prompts=PROMPTS)) as other:
            await decide_as(other, stage, "bob")
        second = MidwatchApp(stage.directory, clock=lambda: NOW, prefer=p.PreferenceBegin(id=0, annotator="anna", session="u"))
        async with second.run_test(size=(100, 24)) as pilot:
            await Screen(second, pilot).sees("anna annotates already: on the screen of anna", "--as", "NAME")


async def decide_as(screen: Screen, stage: Stage, annotator: str) -> None:
    await screen.press("right")
    await screen.until(lambda: len(lines(stage, annotator)) == 1, "another's decision")


async def test_a_lost_link_loses_no_decision_and_makes_none_twice(stage: Stage) -> None:
    async with annotating(stage) as screen:
        await decide(screen, stage, "left", 1)
        pair = view(screen)._shown[0]
        stage.cut()
        await screen.press("right")
        await screen.pilot.pause(0.3)
        assert len(lines(stage)) == 1
        await screen.sees("this is saved when it is back")
        stage.listen()
        await screen.until(lambda: len(lines(stage)) == 2 and view(screen)._pending is None, "it is sent again")
        assert [each["choice"] for each in lines(stage)] == ["left", "right"] and lines(stage)[1]["pair"] == pair
        await decide(screen, stage, "t", 3)


async def test_when_all_is_decided_it_says_so(stage: Stage) -> None:
    async with annotating(stage, begin=p.PreferenceBegin(id=0, annotator="anna", session="s", prompts=PROMPTS[:2])) as screen:
        await decide(screen, stage, "left", 1)
        await decide(screen, stage, "left", 2)
        await screen.sees("every prompt is decided")
        await decide(screen, stage, "u", 3)
        await screen.sees("Join one or more")


def test_lines_fit_where_they_are_shown() -> None:
    share = p.Share(70, 90, 0.68, 0.85)
    found = p.Agreement(measure="Krippendorff's alpha", value=None, pairs=30, annotators=3, alike=share, reward=share, left=share,
                        decisions={})  # fmt: skip
    for cells in (80, 120):
        assert width(preference_layout.agreement(found, cells)) <= cells
    assert "left side 78% (68-85) of 90" in text(preference_layout.agreement(found, 120))
    assert text(preference_layout.answer(" \n", 20)[0]) == "(an empty answer)"
    assert keys.find("prefer", "space") == keys.find("prefer", "enter")


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_a_screen_that_is_killed_at_any_key_lost_nothing_and_doubled_nothing(
    stage: Stage, tmp_path: Path, size: tuple[int, int]
) -> None:
    """A real process at a real terminal, killed right after each key; the next one goes on where the file says."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(f"What does os.path.join do with {n} arguments?" for n in range(30)))
    command = [sys.executable, "-P", "-m", "midwatch", "prefer", str(stage.directory), "--as", "anna", "--prompts", str(prompts)]
    kept: list[dict[str, Any]] = []
    for key in ("Left", "t", "u", "x"):
        terminal = Tmux("sh", "-c", f"exec {shlex.join(command)}")
        try:
            terminal("resize-window", "-x", str(size[0]), "-y", str(size[1]))
            terminal.sees("os.path.join", "Join path components", f"{_standing(kept)} in all", "which is the better")
            before = lines(stage)
            assert before[: len(kept)] == kept, "nothing that was there is rewritten"
            _until(lambda terminal=terminal: terminal.text().count("Join"), lambda: "the pair")  # type: ignore[misc]
            terminal.keys(key)
            os.kill(int(terminal("display-message", "-p", "#{pane_pid}")), signal.SIGKILL)
        finally:
            terminal.close()
        assert stage.preferring is not None
        _until(lambda: stage.preferring and not stage.preferring._sessions, lambda: "the name is free")
        now = lines(stage)
        assert now[: len(before)] == before and len(now) - len(before) in (0, 1), "a key is one line, or none"
        assert len({each["id"] for each in now}) == len(now)
        kept = now
    standing = [each["pair"] for each in kept if each["type"] == "decision"]
    assert _standing(kept) <= len(standing)


def _standing(told: list[dict[str, Any]]) -> int:
    return sum(1 if each["type"] == "decision" else -1 for each in told)


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_the_view(stage: Stage, snap_compare: Any, size: tuple[int, int]) -> None:
    async def open_view(pilot: Pilot[int]) -> None:
        assert isinstance(pilot.app, MidwatchApp)
        screen = Screen(pilot.app, pilot)
        await screen.until(lambda: pilot.app.view_name == "prefer" and view(screen)._shown[0])  # type: ignore[attr-defined]
        await screen.sees("Join one or more", "30 prompts left")
        await pilot.pause(0.1)

    app = MidwatchApp(stage.directory, clock=lambda: NOW, prefer=BEGIN)
    assert snap_compare(app, terminal_size=size, run_before=open_view)
