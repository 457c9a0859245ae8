"""Preferences by hand: two answers side by side, and a key for which is better.

A key decides only what has been in sight for a moment, and one at a time: the next pair comes when the decision is on the
controller's disk. What was sent and not acknowledged is sent again, under the same id, when the controller is back.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import cast

from textual.app import ComposeResult
from textual.containers import Container, Vertical
from textual.worker import Worker

from midwatch import protocol as p
from tui.chart.styles import Ink
from tui.core.keys import MOVE, Key, register
from tui.core.scene import Scene
from tui.core.text_panel import Line, LineWindow, Panel, wrapped
from tui.views import preference_layout
from tui.views.base import View

WIDE = 100
"""Cells from which on the answers lie side by side."""
READ_SECONDS = 0.4
"""A pair has been in sight before a key decides it: a key that repeats, or was meant for the one before, decides nothing."""
AGAIN_SECONDS = 3.0
"""Between two tries to begin."""


@register(
    "o",
    "prefer",
    "preferences by hand: two answers side by side, and which is better",
    place=8,
    keys=(
        Key(("left", "1"), "←", "the left answer (or the upper one) is better; also 1", "choose:left", "left", changes=True),
        Key(("right", "2"), "→", "the right answer (or the lower one) is better; also 2", "choose:right", "right", changes=True),
        Key(("t",), "t", "a tie: neither is better", "choose:tie", "tie", changes=True),
        Key(("x",), "x", "both are bad", "choose:both-bad", "both bad", changes=True),
        Key(("s",), "s", "skip the pair", "choose:skip", "skip", changes=True),
        Key(("u",), "u", "undo: the last decision is taken back, and its pair comes again", "undo", "undo", changes=True),
        Key(("tab",), "Tab", "what is scrolled: the answers, or the prompt", "part"),
        Key(("enter", "space"), "Enter", "nothing, like Space: a slip decides nothing", "nothing"),
        Key(("p", "c", "g", "a"), "p", "disabled here, like c, g and a, to avoid steering the run by accident", "unbound"),
        *(key._replace(keys=tuple(each for each in key.keys if each != "space")) for key in MOVE),
    ),
)
class PreferView(View):
    DEFAULT_CSS = """
    PreferView #prefer-prompt { height: 1; }
    PreferView #prefer-answers { height: 1fr; layout: vertical; }
    PreferView #prefer-answers.wide { layout: horizontal; }
    PreferView .prefer-side { width: 1fr; height: 1fr; }
    PreferView .prefer-heading { height: 1; background: $panel; }
    PreferView #prefer-foot { height: 2; background: $surface; }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._prompt = LineWindow(id="prefer-prompt")
        self._headings = [Panel(classes="prefer-heading"), Panel(classes="prefer-heading")]
        self._texts = [LineWindow(), LineWindow()]
        self._answers = Container(
            *(Vertical(h, t, classes="prefer-side") for h, t in zip(self._headings, self._texts, strict=True)), id="prefer-answers"
        )
        self._foot = Panel(id="prefer-foot")
        self._state: p.PreferenceState | None = None
        self._waits_said = False
        self._refused = False
        self._words = "asking the controller for pairs"
        """What is said in place of a pair."""
        self._shown: tuple[str, float] = ("", 0.0)
        """The pair in sight, and since when."""
        self._pending: p.PreferenceMade | p.PreferenceUndo | None = None
        """Sent, or to be sent, and not acknowledged."""
        self._asked = asyncio.Event()
        self._worker: Worker[None] | None = None
        self._scrolls_prompt = False

    def compose(self) -> ComposeResult:
        yield self._prompt
        yield self._answers
        yield self._foot

    # Drawing

    def show(self, scene: Scene) -> None:
        if not self.size.width:
            return
        wide = self.size.width >= WIDE
        self._answers.set_class(wide, "wide")
        pair = self._state.pair if self._state is not None else None
        cells = self.size.width - 2
        asked = preference_layout.prompt(pair, cells) if pair is not None else [[], *wrapped(self._words, cells, Ink.TEXT)]
        self._prompt.styles.height = min(len(asked), max(2, self.size.height // (4 if pair is not None else 1)))
        self._prompt.show(asked)
        self._answers.visible = pair is not None
        if pair is not None:
            choice = self._pending.choice if isinstance(self._pending, p.PreferenceMade) else ""
            for side, text in enumerate((pair.left, pair.right)):
                rows = self._texts[side]
                rows.show(preference_layout.answer(text, (cells // 2 if wide else cells) - 1))
                chosen = choice == ("left", "right")[side]
                self._headings[side].show(
                    [preference_layout.heading(side, not wide, rows.place() if rows.size.height else "", chosen)]
                )
        lines: list[Line] = [[], []]
        if self._state is not None:
            lines = [
                preference_layout.progress(self._state) if self._state.annotator else [],
                preference_layout.agreement(self._state.agreement, self.size.width),
            ]
        self._foot.show(lines)
        if self._pending is not None and not scene.link.up:
            self.call_later(self._say_waits)

    def _redraw(self) -> None:
        if self.display and self.is_mounted and self.midwatch.screen_stack:  # a reply may come while the screen closes
            self.show(self.midwatch.scene)
            self.midwatch.draw_foot()

    def on_resize(self) -> None:
        super().on_resize()
        self.call_after_refresh(self._redraw)  # once the columns have their sizes

    def settled(self) -> bool:
        state = self._state
        return self._refused or (state is not None and (state.pair is not None or state.over or not state.annotator))

    def status(self) -> Line:
        if self._pending is not None:
            return [("being kept", Ink.ACTIVE)]
        if self.midwatch.scene.read_only:
            return [("this screen is read-only: it shows how far annotators agree", Ink.FAINT)]
        if not self._shown[0]:
            return []
        part = "the prompt" if self._scrolls_prompt else "the answers"
        return [(f"which is the better answer?  arrows up and down scroll {part}", Ink.FAINT)]

    # The way to the controller

    def opened(self) -> None:
        if self._worker is None or self._worker.is_finished:
            self._worker = self.run_worker(self._work(), exit_on_error=False)
        self._redraw()

    def on_hide(self) -> None:
        """Out of sight nobody annotates: the name is let go of, unless a decision is on its way."""
        if self._worker is not None and self._pending is None:
            self._worker.cancel()
            self._worker = None
            if self._state is not None and self._state.annotator:
                self.run_worker(self._leave(), exit_on_error=False)
            self._state, self._shown = None, ("", 0.0)

    async def _leave(self) -> None:
        await self.midwatch.feed.ask(p.PreferenceLeave(id=0), p.PreferenceState)

    async def _work(self) -> None:
        """Begins, and then asks for what is to be asked, one thing at a time; begins anew after a lost connection."""
        begun = False
        while True:
            if self.midwatch.scene.read_only:
                await self._ask(p.PreferenceQuery(id=0))
                await asyncio.sleep(AGAIN_SECONDS)
            elif not self.midwatch.scene.link.up:
                begun = False
                await asyncio.sleep(0.1)
            elif not begun:
                begun = await self._ask(self.midwatch.prefer)
                if not begun and not self.midwatch.feed.lost:
                    self._say_instead(self.midwatch.feed.refusal)
                    await asyncio.sleep(AGAIN_SECONDS)
                elif not begun:
                    await asyncio.sleep(0.1)
            elif self._pending is not None:
                begun = await self._send(self._pending)
            elif self._state is not None and self._state.pair is None and not self._state.over:
                begun = await self._ask(p.PreferenceNext(id=0)) or not self._lost()
            else:
                self._asked.clear()
                await self._asked.wait()

    async def _send(self, pending: p.PreferenceMade | p.PreferenceUndo) -> bool:
        """Whether the annotator is known still; what was refused was not done, and may be tried again."""
        done = await self._ask(pending)
        if not done and self._lost():
            return False
        self._pending, self._waits_said = None, False
        if not done:
            self.midwatch.say(self.midwatch.feed.refusal, Ink.WARNING)
        elif isinstance(pending, p.PreferenceMade):
            self.midwatch.say(f"{preference_layout.WORDS[pending.choice]}: kept; u takes it back")
        else:
            self.midwatch.say("undone: decide it again")
        self._redraw()
        return True

    def _say_waits(self) -> None:
        if not self._waits_said:
            self._waits_said = True
            self.midwatch.say("the controller is out of reach: this is saved when it is back", Ink.WARNING)

    def _lost(self) -> bool:
        """Whether the last question came to nobody who knows this annotator, so that it can be asked again."""
        return self.midwatch.feed.lost or self.midwatch.feed.refusal == p.BEGIN_FIRST

    async def _ask(self, question: p.Message) -> bool:
        """Whether it was answered; the answer is shown."""
        reply = await self.midwatch.feed.ask(question, p.PreferenceState, timeout=60.0)
        if reply is None:
            return False
        self._state, self._refused = reply, False
        if isinstance(question, p.PreferenceMade | p.PreferenceUndo):
            self._pending = None
        pair = reply.pair.pair if reply.pair is not None else ""
        if pair != self._shown[0]:
            self._shown = pair, time.monotonic()
            self._scrolls_prompt = False
            for rows in (self._prompt, *self._texts):
                rows.top = 0
        if reply.note:
            self.midwatch.say(reply.note, Ink.WARNING)
        self._words = reply.note or ("every prompt is decided (use --prompts, --source or --checkpoint for more)" if reply.over
                                     else "generating the answers; the first take a few seconds")  # fmt: skip
        if not reply.annotator:
            self._words = "how far annotators agree is below"
        self._redraw()
        self.call_after_refresh(self._redraw)
        return True

    def _say_instead(self, words: str) -> None:
        self._state, self._words, self._refused = None, words, True
        self._redraw()

    # Keys

    def do_choose(self, choice: str) -> None:
        pair, since = self._shown
        if not pair or self._pending is not None or time.monotonic() - since < READ_SECONDS:
            return
        seconds = time.monotonic() - since
        made = cast(p.Choice, choice)
        self._pending = p.PreferenceMade(id=0, decision=uuid.uuid4().hex, pair=pair, choice=made, seconds=seconds)
        self._asked.set()
        self._redraw()

    def do_undo(self) -> None:
        if self._pending is None and self._state is not None and self._state.annotator:
            self._pending = p.PreferenceUndo(id=0, undo=uuid.uuid4().hex)
            self._asked.set()
            self._redraw()

    def do_part(self) -> None:
        self._scrolls_prompt = not self._scrolls_prompt
        self._redraw()

    def _scrolled(self) -> list[LineWindow]:
        return [self._prompt] if self._scrolls_prompt else self._texts

    def do_move(self, by: str) -> None:
        for rows in self._scrolled():
            rows.move(int(by))
        self._redraw()

    def do_page(self, by: str) -> None:
        for rows in self._scrolled():
            rows.page(int(by))
        self._redraw()

    def do_end(self, which: str) -> None:
        for rows in self._scrolled():
            rows.to_end(int(which))
        self._redraw()

    def do_unbound(self) -> None:
        self.midwatch.say("p, c and g are not bound while you annotate: w, then p pauses the run")

    def do_nothing(self) -> None:
        """Enter and Space decide nothing."""
