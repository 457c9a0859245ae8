"""Lines that are longer than the screen can be read whole; stacks of a hang are a key away."""

from midwatch import protocol as p
from tests.tui.conftest import attached
from tests.tui.stage import NOW, Stage
from tui.chart.styles import Ink
from tui.core.text_panel import broken, shifted, text

LONG = "rank 0 ended: " + "RuntimeError in a collective that was under way, " * 5 + "and the decisive word is LAST"


def _with_long_line(stage: Stage) -> None:
    line = p.JournalLine(index=500, time=NOW, term=1, kind="note", author="", text=LONG, level="warning")
    stage.journal.append(line)
    stage.send(events=(*stage.snapshot.events, line))


async def test_a_line_of_the_journal_is_shown_whole_sideways_and_wrapped(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.open("j", "journal")
        _with_long_line(stage)
        await screen.sees("▸  08:53:20 W note")
        assert "LAST" not in screen.text()
        await screen.press("enter")
        await screen.sees("rank 0 ended", "LAST")
        await screen.press("escape")
        await screen.until(lambda: "LAST" not in screen.text())
        assert screen.app.view_name == "journal"
        await screen.press("W")
        await screen.sees("wrapped", "LAST")
        await screen.press("W", *["greater_than_sign"] * 12)
        await screen.sees("LAST", "from column 241")
        await screen.press(*["less_than_sign"] * 12)
        await screen.until(lambda: "LAST" not in screen.text())


async def test_a_line_of_a_log_is_shown_whole(stage: Stage) -> None:
    stage.logs["laptop/0.log"] = [LONG, "short"]
    async with attached(stage) as screen:
        await screen.open("l", "logs")
        await screen.sees("short")
        await screen.press("up", "enter")
        await screen.sees("LAST")


async def test_h_shows_the_newest_stacks_of_a_hang(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.press("H")
        await screen.sees("no rank has hung")
        stage.logs["n1/hang-2-20260101-120000.txt"] = ["=== rank 0 ===", "older"]
        stage.logs["laptop/hang-3-20260102-120000.txt"] = ["=== rank 1, process 7 ===", "in all_reduce"]
        await screen.press("w", "H")
        await screen.sees("=== rank 1, process 7 ===", "in all_reduce")


async def test_healthy_spares_are_not_out_of_reach(stage: Stage) -> None:
    first = stage.snapshot.nodes[0]
    names = ("laptop", "n2", "n3", "n4", "n5")
    states = ("up", "up", "spare", "spare", "gone")
    nodes = tuple(p.NodeView(name=n, state=s, ranks=1, stats=first.stats) for n, s in zip(names, states, strict=True))  # type: ignore[arg-type]
    async with attached(stage, (120, 24)) as screen:
        stage.send(nodes=nodes)
        await screen.sees("and 4 more nodes, 1 out of reach")


def test_a_line_is_broken_at_spaces_and_cut_only_where_no_row_is_left() -> None:
    line = [("one two ", Ink.TEXT), ("three four five six", Ink.ALARM)]
    assert [text(row) for row in broken(line, 12, 3)] == ["one two", " three four", " five six"]
    assert [text(row) for row in broken(line, 12, 2)] == ["one two", " three four…"]
    assert [text(row) for row in broken([("x" * 30, Ink.TEXT)], 12, 3)] == ["x" * 12, " " + "x" * 11, " " + "x" * 7]
    assert broken(line, 80, 3) == [line] and broken([], 10, 2) == [[]]
    assert text(shifted(line, 6)) == "o three four five six" and shifted(line, 99) == []
