"""The probe's view: a prompt out, an answer in, token by token; two side by side; what else a token could have been."""

from collections.abc import Callable

import pytest
from textual.pilot import Pilot

from midwatch import protocol as p
from tests.tui.conftest import Screen, attached
from tests.tui.stage import NOW, Stage
from tui.app import MidwatchApp
from tui.chart.text import SECOND, plain, spaced
from tui.core import conversation
from tui.core.command_bar import CommandPrompt
from tui.core.conversation import Answer, Exchange
from tui.core.text_panel import text
from tui.views.probe import ProbeView

PROMPT = "What does os.path.join do?"


async def ask(screen: Screen, prompt: str = PROMPT) -> None:
    await screen.press("enter")
    screen.app.query_one(CommandPrompt).insert_text_at_cursor(prompt)
    await screen.press("enter")


def probe(screen: Screen) -> ProbeView:
    view = screen.app.view
    assert isinstance(view, ProbeView)
    return view


async def test_a_prompt_is_answered_as_it_comes_and_remembered_in_the_next(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.open("b", "probe")
        await screen.sees("type a prompt", "ask newest", "form auto", "temperature 0.8")
        await ask(screen)
        await screen.sees("> What does os.path.join do?", "Join one or more", "step-1100 dpo, chat", "52 tokens, 31.9/s, ended")
        await ask(screen, "And os.path.split?")
        await screen.sees("> And os.path.split?")
        first, second = stage.asks
        assert (first.prompt, first.checkpoints, first.turns) == (PROMPT, ("newest",), ((),))
        assert second.turns == ((p.ProbeTurn("user", PROMPT), p.ProbeTurn("assistant", stage.answers[0])),)
        await screen.press("e")
        await screen.sees("type a prompt")
        await screen.press("enter", "up", "up")
        assert screen.app.query_one(CommandPrompt).value == f">{PROMPT}", "arrows bring back what was asked"
        await screen.press("escape")
        assert not screen.app.query_one(CommandPrompt).is_open and len(stage.asks) == 2


async def test_letters_typed_at_the_prompt_are_no_keys(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.open("b", "probe")
        await screen.press("enter", *"wpS", "space", "colon", "q", "slash", "enter")
        await screen.until(lambda: stage.asks, "the ask")
        assert stage.asks[0].prompt == "wpS :q/" and stage.commands == []


async def test_beneath_the_answer_is_what_else_each_token_could_have_been(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.open("b", "probe")
        await ask(screen)
        await screen.sees("token 52 of 52 '[EOS]'", "90.0%")
        await screen.press("home")
        await screen.sees("token 1 of 52 'Join'", "42.0%", "▸ 'Join'")
        await screen.press("right", "right")
        await screen.sees("token 3 of 52 ' or'", "▸ ' or'", "11.0%")
        await screen.press("left")
        await screen.sees("token 2 of 52 ' one'")
        await screen.press("down")
        column = probe(screen)._columns[0]
        assert column.marks[probe(screen)._cursor or 0].line == column.marks[1].line + 1
        await screen.press("up")
        assert column.marks[probe(screen)._cursor or 0].line == column.marks[1].line
        line = next(n for n, line in enumerate(column.rows.lines) if "separator" in text(line))
        at = text(column.rows.lines[line]).index("separator")
        await screen.pilot.click(column.rows, offset=(at + 2, line - column.rows.top))
        await screen.sees("' separator'")
        await screen.press("end")
        await screen.sees("token 52 of 52")


async def test_two_checkpoints_answer_side_by_side_or_one_above_the_other(stage: Stage) -> None:
    async with attached(stage, (120, 40)) as screen:
        await screen.open("b", "probe")
        await ask(screen)
        await screen.sees("ended")
        await screen.press("2")
        await screen.sees("nobody: one column", "★ sft 200", "golden, end of stage", "? pretrain 450", "SUSPECT, rolled back")
        await screen.press(*["down"] * 4, "enter")
        await screen.sees("ask newest and step-800", "type a prompt")
        await screen.press("a")
        await screen.sees("step-1100 dpo, chat", "step-800 extend, text", "returns 'a/b'")
        assert (stage.asks[-1].checkpoints, stage.asks[-1].seed) == (("newest", "step-800"), 0), "others are asked the same"
        left, right = (column.region for column in probe(screen)._columns)
        assert left.y == right.y and left.right <= right.x
        await screen.press("tab", "home")
        await screen.sees("token 1 of 16 'Join'")
        await screen.press("a")
        await screen.until(lambda: stage.asks[-1].seed == 1, "another seed")
        assert stage.asks[-1].turns == ((), ()), "again is instead of the answer, not after it"
        await screen.pilot.resize_terminal(80, 24)
        await screen.until(lambda: probe(screen)._columns[1].region.x == 0 and probe(screen)._columns[1].region.y > 5, "stacked")
        await screen.press("2", "home", "enter")
        await screen.sees("ask newest  form")
        assert not probe(screen)._columns[1].display


async def test_settings_and_a_checkpoint_that_is_damaged(stage: Stage) -> None:
    async with attached(stage) as screen:
        await screen.open("b", "probe")
        await screen.press(*["minus"] * 9, "f", "f")
        await screen.sees("temperature 0.0 (the likeliest)", "form text")
        await screen.press("1", *["down"] * 5, "enter")
        await screen.sees("ask step-450")
        await ask(screen, "")
        await screen.sees("rank-00000.bin: its content is not what", "failed")
        assert (stage.asks[0].temperature, stage.asks[0].form, stage.asks[0].prompt) == (0.0, "text", "")
        await screen.press("1", "escape")
        await screen.sees("ask step-450")


async def test_an_answer_can_be_stopped_and_a_new_prompt_stops_the_one_before(stage: Stage) -> None:
    stage.answered = 5
    async with attached(stage) as screen:
        await screen.open("b", "probe")
        await ask(screen)
        await screen.sees("5 tokens", "answering; x stops it")
        await screen.press("x")
        await screen.sees("5 tokens, stopped")
        await screen.until(lambda: len(stage.stopped) == 1, "the stop")
        await ask(screen)
        await ask(screen, "Other")
        await screen.until(lambda: len(stage.stopped) == 2 and len(stage.asks) == 3, "the second stop")


async def test_without_a_link_it_says_so_and_a_read_only_screen_may_ask(stage: Stage) -> None:
    async with attached(stage, read_only=True) as screen:
        await screen.open("b", "probe")
        await ask(screen)
        await screen.sees("52 tokens")
        stage.cut()
        await screen.sees("LINK LOST")
        await ask(screen)
        await screen.sees("the controller is out of reach; nothing was asked")
        stage.listen()


@pytest.mark.parametrize("size", [(80, 24), (200, 50)], ids=lambda size: f"{size[0]}x{size[1]}")
def test_two_answers_as_a_picture(stage: Stage, snap_compare: Callable[..., bool], size: tuple[int, int]) -> None:
    async def converse(pilot: Pilot[int]) -> None:
        app = pilot.app
        assert isinstance(app, MidwatchApp)
        screen = Screen(app, pilot)
        await screen.until(lambda: app.scene.snapshot is not None and app.scene.link.up and app.view is not None)
        await screen.open("b", "probe")
        await screen.press("2", *["down"] * 4, "enter")
        await ask(screen)
        await screen.sees("52 tokens, 31.9/s, ended", "16 tokens, 33.3/s, ended")
        await screen.press("home", *["right"] * 7)
        await screen.sees("token 8 of 52")
        await pilot.pause(0.2)

    assert snap_compare(MidwatchApp(stage.directory, clock=lambda: NOW), terminal_size=size, run_before=converse)


def token(words: str) -> p.ProbeToken:
    return p.ProbeToken(ask=1, which=0, text=words, piece=words, log_prob=-1.0)


def laid_out(words: list[str], cells: int, cursor: int | None = None) -> tuple[list[str], conversation.Page]:
    page = conversation.page([Exchange("go", [Answer("a", tokens=[token(word) for word in words])])], 0, cells, cursor)
    return [text(line) for line in page.lines[1:]], page


def test_text_is_broken_after_spaces_and_every_token_knows_its_place() -> None:
    rows, page = laid_out(["the", " watch", " is", "\n", " long", "er", "thanaline"], 10)
    assert rows[:4] == ["the watch ", "is", " longertha", "naline"]
    assert page.marks[1] == (1, 4) and page.marks[2] == (2, 0) and page.marks[5] == (3, 5)
    assert conversation.beside(page.marks, 1, 1) == 2 and conversation.beside(page.marks, 5, -1) == 2
    assert conversation.beside(page.marks, 6, 1) is None


def test_a_token_that_shows_nothing_is_shown_while_the_cursor_is_on_it() -> None:
    assert laid_out(["a", "\n", "b"], 10)[0][:2] == ["a", "b"]
    assert laid_out(["a", "\n", "b"], 10, cursor=1)[0][:2] == ["a↵", "b"]


@pytest.mark.parametrize("words", ["日本語", "🙂 ok", "e\u0301te\u0301", "naïve", "a\u200db"])
def test_text_of_any_script_takes_as_many_characters_as_cells(words: str) -> None:
    from rich.cells import cell_len

    assert len(spaced(words)) == cell_len(plain(spaced(words))) and "?" not in plain(spaced(words))
    assert plain(spaced(words), unicode=False).isascii() and len(plain(spaced(words), unicode=False)) == len(spaced(words))
    assert plain(spaced("日")[:1]) == "?" and plain(SECOND) == "?"


def test_a_wide_character_is_not_cut_in_two() -> None:
    rows, _ = laid_out(["日本語"], 5)
    assert rows[:2] == [spaced("日本"), spaced("語")]
