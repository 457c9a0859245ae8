"""The probe: talk to one checkpoint or two side by side, and look at what else each token could have been."""

from __future__ import annotations

import msgspec
from textual.app import ComposeResult
from textual.containers import Container
from textual.timer import Timer
from textual.worker import Worker

from midwatch.protocol import ProbeAnswer, ProbeAsk
from tui.chart.styles import Ink
from tui.core import conversation
from tui.core.conversation import Answer, Exchange
from tui.core.keys import MOVE, Key, register
from tui.core.scene import Scene
from tui.core.text_panel import Line, Panel, joined
from tui.views.answer_pane import Column
from tui.views.base import View
from tui.views.checkpoint_picker import Choice

WIDE = 100
"""Cells from which on two columns lie side by side."""
DRAW_SECONDS = 0.08
"""Between two drawings of an answer that comes in."""
FORMS = ("auto", "chat", "text")


@register(
    "b",
    "probe",
    "talk to a checkpoint, next-token probabilities, two side by side",
    place=6,
    keys=(
        Key(("enter",), "Enter", "type a prompt; in the list: ask this checkpoint", "enter", "prompt"),
        Key(("1",), "1", "choose the checkpoint that answers", "choose:0", "whom"),
        Key(("2",), "2", "choose a second one beside it, or none", "choose:1", "beside"),
        Key(("a",), "a", "the prompt again, with another seed", "again", "again"),
        Key(("x",), "x", "stop the answer", "halt", "stop it"),
        Key(("e",), "e", "erase the conversation", "clear", "erase"),
        Key(("f",), "f", "form of the prompt: by the checkpoint's stage, chat, or text to be continued", "form", "form"),
        Key(("plus", "equals_sign"), "+", "higher temperature", "warm:0.1"),
        Key(("minus",), "-", "lower temperature; at 0 always the likeliest token", "warm:-0.1"),
        Key(("left",), "←", "the token before", "token:-1", "token"),
        Key(("right",), "→", "the next token", "token:1"),
        Key(("tab",), "Tab", "the other checkpoint's answer", "column"),
        *MOVE,
    ),
)
class ProbeView(View):
    DEFAULT_CSS = """
    ProbeView #probe-settings { height: 1; }
    ProbeView #probe-columns { height: 1fr; layout: vertical; }
    ProbeView #probe-columns.wide { layout: horizontal; }
    ProbeView #probe-bars { height: 0; background: $surface; }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._settings = Panel(id="probe-settings")
        self._both = Container(id="probe-columns")
        self._columns = [Column(), Column()]
        self._bars = Panel(id="probe-bars")
        self._choice = Choice()
        self._ask = ProbeAsk(ask=0, checkpoints=("newest",), prompt="", alternatives=10)
        self._exchanges: list[Exchange] = []
        self._active = 0
        self._cursor: int | None = None
        """A token of the newest answer; None: its last."""
        self._choosing: int | None = None
        """Whose checkpoint is being chosen: 0 or 1."""
        self._worker: Worker[None] | None = None
        self._due: Timer | None = None
        self.asked: list[str] = []

    def compose(self) -> ComposeResult:
        yield self._settings
        with self._both:
            yield from self._columns
        yield self._choice
        yield self._bars

    # Drawing

    def show(self, scene: Scene) -> None:
        if not self.size.width:
            return
        names = self._ask.checkpoints
        choosing = self._choosing is not None
        self._both.display, self._choice.display = not choosing, choosing
        self._both.set_class(self.size.width >= WIDE, "wide")
        self._columns[1].display = len(names) == 2
        self._settings.show([self._line()])
        if choosing:
            self._choice.refill(scene)
            self._bars.show_all([])
            return
        for which, name in enumerate(names):
            active = which == self._active
            self._columns[which].show(self._exchanges, which, name, self._cursor if active else None, active)
        rows = 0 if self.size.height < 10 else 6 if self.size.height < 30 else 11
        self._bars.show_all(conversation.bars(self._answer, self._cursor, self.size.width, rows))

    def _line(self) -> Line:
        """How the next prompt is asked."""
        ask = self._ask
        greedy = " (the likeliest)" if not ask.temperature else ""
        said: list[Line] = [
            [(" ask ", Ink.FAINT), (" and ".join(ask.checkpoints), Ink.TITLE)],
            [("form ", Ink.FAINT), (ask.form, Ink.TEXT)],
            [("temperature ", Ink.FAINT), (f"{ask.temperature:.1f}{greedy}", Ink.TEXT)],
            [("seed ", Ink.FAINT), (f"{ask.seed}", Ink.TEXT)],
        ]
        return joined(said, "  ")

    def _redraw(self) -> None:
        self._due = None
        if self.display and self.is_mounted and self.midwatch.screen_stack:  # an answer may come while the screen closes
            self.show(self.midwatch.scene)
            self.midwatch.draw_foot()

    def _soon(self) -> None:
        if self._due is None:
            self._due = self.set_timer(DRAW_SECONDS, self._redraw)

    def on_resize(self) -> None:
        super().on_resize()
        self.call_after_refresh(self._redraw)  # once the columns have their sizes

    def opened(self) -> None:
        self._redraw()

    def settled(self) -> bool:
        return self._columns[0].rows.size.height > 0 and bool(self._columns[0].rows.lines)

    def status(self) -> Line:
        if self._choosing is not None:
            return [("Enter chooses, Esc leaves it as it is", Ink.FAINT)]
        busy = any(answer.end is None for exchange in self._exchanges[-1:] for answer in exchange.answers)
        return [
            ("answering; x stops it" if busy else "Enter: a prompt for the checkpoint; nothing here changes the run", Ink.FAINT)
        ]

    @property
    def _answer(self) -> Answer | None:
        return self._exchanges[-1].answers[self._active] if self._exchanges else None

    # Asking

    async def do_enter(self) -> None:
        if self._choosing is None:
            await self.midwatch.open_prompt(">")
            return
        name, which = self._choice.chosen, self._choosing
        self._choosing = None
        first = self._ask.checkpoints[0]
        self._choose((name, *self._ask.checkpoints[1:]) if which == 0 else (first, name) if name else (first,))

    def take_prompt(self, text: str) -> None:
        """What was typed at the prompt."""
        if text and self.asked[-1:] != [text]:
            self.asked.append(text)
        self._send(text)

    def do_again(self) -> None:
        """The newest prompt, with another seed if it was answered with this one."""
        if self._exchanges:
            self._end_answers()
            self._ask = msgspec.structs.replace(self._ask, seed=self._ask.seed + 1)
            self._send(self._exchanges.pop().prompt)
        elif self.asked:
            self._send(self.asked[-1])

    def _send(self, prompt: str) -> None:
        self._end_answers()
        names = self._ask.checkpoints
        ask = msgspec.structs.replace(self._ask, prompt=prompt, turns=conversation.turns(self._exchanges, len(names)))
        answers = [Answer(name) for name in names]
        self._exchanges.append(Exchange(prompt, answers))
        self._cursor = None
        for column in self._columns:
            column.rows.following = True
        self._worker = self.run_worker(self._follow(ask, answers), exit_on_error=False)
        self._redraw()

    async def _follow(self, ask: ProbeAsk, answers: list[Answer]) -> None:
        problem = await self.midwatch.feed.probe(ask, lambda message: self._take(answers, message))
        if problem:
            self.midwatch.say(problem, Ink.WARNING)
            for answer in answers:
                answer.stop()
        self._redraw()

    def _take(self, answers: list[Answer], message: ProbeAnswer) -> None:
        if answers[message.which].end is None:
            answers[message.which].take(message)
            self._soon()

    def _end_answers(self) -> None:
        if self._worker is not None:
            self._worker.cancel()
            self._worker = None
        for exchange in self._exchanges[-1:]:
            for answer in exchange.answers:
                answer.stop()

    def do_halt(self) -> None:
        self._end_answers()
        self._redraw()

    def do_clear(self) -> None:
        self._end_answers()
        self._exchanges, self._cursor = [], None
        self._redraw()

    def do_form(self) -> None:
        following = FORMS[(FORMS.index(self._ask.form) + 1) % len(FORMS)]
        self._ask = msgspec.structs.replace(self._ask, form=following)
        self._redraw()

    def do_warm(self, by: str) -> None:
        temperature = min(2.0, max(0.0, round(self._ask.temperature + float(by), 1)))
        self._ask = msgspec.structs.replace(self._ask, temperature=temperature)
        self._redraw()

    # Whom to ask

    def do_choose(self, which: str) -> None:
        self._choosing = int(which)
        names = self._ask.checkpoints
        chosen = names[self._choosing] if self._choosing < len(names) else ""
        self._choice.open(self.midwatch.scene, chosen, optional=self._choosing == 1)
        self._redraw()

    def _choose(self, names: tuple[str, ...]) -> None:
        """What was said to others is not their conversation: it begins anew, and `a` asks the last prompt again."""
        if names != self._ask.checkpoints:
            self._ask = msgspec.structs.replace(self._ask, checkpoints=names)
            self._active = min(self._active, len(names) - 1)
            self.do_clear()
        self._redraw()
        self.call_after_refresh(self._redraw)

    def back(self) -> bool:
        if self._choosing is None:
            return False
        self._choosing = None
        self._redraw()
        return True

    # Looking

    def do_token(self, by: str) -> None:
        answer = self._answer
        if answer is None or not answer.tokens or self._choosing is not None:
            return
        last = len(answer.tokens) - 1
        at = last if self._cursor is None else self._cursor
        self._cursor = min(max(0, at + int(by)), last)
        self._redraw()

    def on_column_pointed(self, event: Column.Pointed) -> None:
        self._active = self._columns.index(event.column)
        self._cursor = min(event.token, len(self._answer.tokens) - 1) if self._answer is not None else None
        self._redraw()

    def do_column(self) -> None:
        self._active = (self._active + 1) % len(self._ask.checkpoints)
        self._redraw()

    def do_move(self, by: str) -> None:
        """To the token above or below; where there is none, the window."""
        if self._choosing is not None:
            self._choice.move(int(by))
            return
        column, answer = self._columns[self._active], self._answer
        if answer is not None and answer.tokens:
            at = len(answer.tokens) - 1 if self._cursor is None else self._cursor
            found = conversation.beside(column.marks, at, int(by))
            if found is not None and found < len(answer.tokens):
                self._cursor = found
                self._redraw()
                return
        column.rows.move(int(by))

    def do_page(self, by: str) -> None:
        (self._choice if self._choosing is not None else self._columns[self._active].rows).page(int(by))

    def do_end(self, which: str) -> None:
        if self._choosing is not None:
            self._choice.to_end(int(which))
            return
        self._cursor = None if which == "1" else 0
        if which == "1":
            self._columns[self._active].rows.following = True
        self._redraw()
