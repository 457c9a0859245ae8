"""Keys that come faster than the screen draws: each goes, in its order, to what is open when its turn comes."""

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.tui.stage import Stage
from tests.tui.test_screen_terminal import Pty


@pytest.fixture
def terminal(stage: Stage) -> Iterator[Pty]:
    """The real screen on a pseudo-terminal, read in the background so that it never blocks."""
    found = Pty(stage.directory)
    found.read("TRAINING")
    found.read("train")
    found.drain(0.5)
    yield found
    found.close()


def given(stage: Stage, count: int, seconds: float = 8.0) -> list[tuple[str, dict[str, Any]]]:
    """The commands that came, once there are so many and no more come."""
    end = time.monotonic() + seconds
    while len(stage.commands) < count and time.monotonic() < end:
        time.sleep(0.02)
    time.sleep(0.2)
    return [(command.verb, command.arguments) for command in stage.commands]


BURSTS: list[tuple[str, str, list[tuple[str, dict[str, Any]]]]] = [
    ("a digit after Enter is no part of the line", ":set max_grad_norm 1\r0", [("set", {"key": "max_grad_norm", "value": 1.0})]),
    (
        "two lines",
        ":set max_grad_norm 0.61\r:set max_grad_norm 0.71\r",
        [("set", {"key": "max_grad_norm", "value": 0.61}), ("set", {"key": "max_grad_norm", "value": 0.71})],
    ),
    ("three lines", ":checkpoint\r:golden 800\r:set lr 1e-4\r",
     [("checkpoint", {}), ("golden", {"checkpoint": "800"}), ("set", {"key": "lr", "value": 1e-4})]),
    ("keys after a line", ":set lr 1e-4\rcp", [("set", {"key": "lr", "value": 1e-4}), ("checkpoint", {}), ("pause", {})]),
    ("three keys", "cpc", [("checkpoint", {}), ("pause", {}), ("checkpoint", {})]),
    ("a line given up", ":stop! now\x1bc", [("checkpoint", {})]),
    ("edited before Enter", ":set lr 9\x7f1e-4\r", [("set", {"key": "lr", "value": 1e-4})]),
    ("a view and its key", "kg", [("golden", {"checkpoint": "step-1100"})]),
]  # fmt: skip


@pytest.mark.parametrize(("keys", "commands"), [case[1:] for case in BURSTS], ids=[case[0] for case in BURSTS])
def test_a_burst_of_keys_is_taken_in_order(stage: Stage, terminal: Pty, keys: str, commands: Any) -> None:
    if "\x1b" in keys:  # a terminal tells Escape from the beginning of a sequence by a pause
        first, _, rest = keys.partition("\x1b")
        os.write(terminal.terminal, f"{first}\x1b".encode())
        terminal.drain(0.3)
        keys = rest
    os.write(terminal.terminal, keys.encode())
    terminal.drain(0.5)
    assert given(stage, len(commands)) == commands


def test_a_pasted_line_waits_for_its_enter(stage: Stage, terminal: Pty) -> None:
    os.write(terminal.terminal, b":\x1b[200~set max_grad_norm 0.5\nset max_grad_norm 9\x1b[201~\r")
    terminal.drain(0.5)
    assert given(stage, 1) == [("set", {"key": "max_grad_norm", "value": 0.5})]


def test_a_second_confirm_in_one_burst_is_no_second_deed_and_no_crash(stage: Stage, terminal: Pty) -> None:
    os.write(terminal.terminal, b"S")
    terminal.read("Cancel ]")
    os.write(terminal.terminal, b"\t\r\r\r")
    terminal.drain(0.5)
    assert given(stage, 1) == [("stop", {})]
    os.write(terminal.terminal, b"c")
    terminal.read("checkpoint: done")
    assert given(stage, 2) == [("stop", {}), ("checkpoint", {})]


def test_a_confirm_of_what_was_not_shown_yet_does_nothing(stage: Stage, terminal: Pty) -> None:
    """`R`, Tab and Enter in one burst: nobody can have read what the rollback costs."""
    os.write(terminal.terminal, b"R\t\r")
    terminal.read("Undoes")
    assert given(stage, 1, seconds=0.5) == []


@pytest.mark.parametrize("where", ["", ":", "R"], ids=["screen", "command line", "dialog"])
@pytest.mark.parametrize("bracketed", [True, False], ids=["paste", "keys"])
def test_a_flood_of_text_holds_up_nothing(stage: Stage, terminal: Pty, where: str, bracketed: bool) -> None:
    """As a paste it is one event. As keys, where a terminal knows no pastes, each costs little."""
    os.write(terminal.terminal, where.encode())
    terminal.drain(0.3)
    began = time.monotonic()
    terminal.write(b"\x1b[200~" + b"x" * 100_000 + b"\x1b[201~" if bracketed else b"x" * 10_000)
    terminal.write(b"\rc" if where else b"c")  # Enter: the line is no command, or the dialog's Cancel
    terminal.read("checkpoint: done", 30.0)
    assert time.monotonic() - began < 10.0
    assert [command.verb for command in stage.commands] == ["checkpoint"]


def test_what_is_pasted_on_the_screen_is_no_command(stage: Stage, terminal: Pty) -> None:
    os.write(terminal.terminal, b"\x1b[200~pcgS\x1b[201~")
    terminal.read("the paste was ignored")
    assert given(stage, 1, seconds=0.3) == []
