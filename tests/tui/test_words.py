"""Formatting, the command line's reading and completion, and the manual page: pure functions."""

from pathlib import Path

import pytest

from tests.tui.stage import snapshot
from tui.chart import formatting
from tui.chart.styles import Ink
from tui.core.command_line import FIRST_WORDS, complete, parse
from tui.core.keys_doc import page
from tui.core.text_panel import cut, fit, text, wrapped


def test_the_manual_page_is_the_table_of_keys() -> None:
    assert (Path(__file__).parents[2] / "docs" / "keys.md").read_text() == page(), "python -m tui.core.keys_doc > docs/keys.md"


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (41_300_000, "41.3 MB"), (480e9, "480 GB"), (5e15, "5000 TB")]
)
def test_sizes(count: float, said: str) -> None:
    assert formatting.size(count) == said


def test_a_hundred_per_cent_is_said_of_what_is_complete_alone() -> None:
    assert formatting.percent(999, 1000) == "99%" and formatting.percent(1000, 1000) == "100%" and formatting.percent(1, 0) == "-"


@pytest.mark.parametrize("cells", range(9))
def test_lines_are_cut_to_the_cell(cells: int) -> None:
    line = [("abc", Ink.TEXT), ("defg", Ink.FAINT)]
    assert len(text(cut(line, cells))) == min(cells, 7) and len(text(fit(line, cells))) == cells


def test_words_are_broken_at_spaces_and_lose_no_letter() -> None:
    lines = [text(line) for line in wrapped("one two threeandahalf four", 8)]
    assert lines == ["one two", "threeand", "ahalf", "four"]


@pytest.mark.parametrize(
    "line",
    ["", "x", "rollback", "rollback 1 2", "rollback 1 --skip", "rollback 1 --skip -3", "rollback 1 --lr-scale 0", "set lr",
     'golden "a', "stop --later", "checkpoint 3"],
)  # fmt: skip
def test_what_cannot_be_understood_says_why(line: str) -> None:
    found = parse(line)
    assert found.problem and found.verb is None


def test_every_verb_is_completed_from_its_first_letters() -> None:
    for verb in FIRST_WORDS:
        completed, choices = complete(verb[:3], snapshot())
        assert (verb in choices and verb.startswith(completed.strip())) or completed.strip() == verb


def test_arguments_are_completed_from_the_run() -> None:
    assert complete("rollback step-11", snapshot()) == ("rollback step-1100 ", ["step-1100"])
    assert complete("set che", snapshot())[0] == "set checkpoint_every "
    assert complete("ungolden ", snapshot())[1] == ["step-1000", "step-400"]
    assert complete("stop --", snapshot())[0] == "stop --now "
    assert complete("nothing x", snapshot()) == ("nothing x", [])
