"""The command line at the foot of the screen: `:` for commands and views, `/` for a filter of the view, `>` for a prompt."""

from __future__ import annotations

from typing import cast

from textual.events import Key
from textual.widgets import Input

from tui.chart.styles import Ink
from tui.core.command_line import complete, parse
from tui.core.entry import PromptInput
from tui.core.operator_app import OperatorApp


class CommandPrompt(PromptInput):
    """Hidden until opened. Enter does what was typed, Esc leaves it undone."""

    DEFAULT_CSS = """
    CommandPrompt { display: none; height: 1; border: none; padding: 0 1; background: $panel; color: $foreground; }
    CommandPrompt:focus { border: none; background: $panel; }
    """

    def __init__(self) -> None:
        super().__init__(id="prompt", compact=True, select_on_focus=False)
        self._sign = ":"
        self._place = 0
        self._patterns: dict[str, str] = {}

    @property
    def midwatch(self) -> OperatorApp:
        return cast(OperatorApp, self.app)

    @property
    def is_open(self) -> bool:
        return bool(self.display)

    def open(self, sign: str, text: str = "") -> None:
        self._sign = sign
        self._place = len(self._history)
        self.value = sign + (self._patterns.get(self.midwatch.view_name, "") if sign == "/" else text)
        self.cursor_position = len(self.value)
        self.display = True
        self.screen.set_focus(self)

    def close(self) -> None:
        self.display = False
        self.screen.set_focus(None)

    async def take_key(self, event: Key) -> bool:
        if event.key == "enter":
            await self._submit()
        elif event.key == "tab" and self._sign == ":":
            self._complete()
        elif event.key in ("up", "down") and self._sign != "/":
            self._recall(-1 if event.key == "up" else 1)
        elif event.key == "escape" or (event.key == "backspace" and len(self.value) <= 1):
            self.close()
        elif await super().take_key(event):
            self._edited()
        else:
            return False
        return True

    def take_text(self, text: str) -> None:
        super().take_text(text)
        self._edited()

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()  # what it calls for is done already

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()

    def _complete(self) -> None:
        snapshot = self.midwatch.scene.snapshot
        value, choices = complete(self.value[1:], snapshot)
        self.value = self._sign + value
        self.cursor_position = len(self.value)
        if len(choices) > 1:
            self.midwatch.say("  ".join(choices[:24]), Ink.FAINT)

    @property
    def _history(self) -> list[str]:
        """What was typed before, after this sign."""
        view = self.midwatch.view
        return view.asked if self._sign == ">" and view is not None else self.midwatch.typed

    def _recall(self, by: int) -> None:
        typed = self._history
        self._place = min(max(0, self._place + by), len(typed))
        self.value = self._sign + (typed[self._place] if self._place < len(typed) else "")
        self.cursor_position = len(self.value)

    def _edited(self) -> None:
        """The line has changed."""
        if not self.value.startswith(self._sign):
            self.value = self._sign + self.value.lstrip(":/")  # its sign was deleted
        elif self._sign == "/" and self.midwatch.view is not None:
            self._filter()

    def _filter(self) -> None:
        view = self.midwatch.view
        problem = view.set_filter(self.value[1:]) if view is not None else ""
        if problem:
            self.midwatch.say(problem, Ink.WARNING)
        else:
            self._patterns[self.midwatch.view_name] = self.value[1:]

    async def _submit(self) -> None:
        """Does what stands on the line now: what is typed from here on belongs to whatever comes next."""
        text = self.value[1:]
        line = text.strip()
        self.close()
        if self._sign == ">":
            if self.midwatch.view is not None:
                self.midwatch.view.take_prompt(text)
            return
        if self._sign == "/" or not line:
            return
        if not self.midwatch.typed or self.midwatch.typed[-1] != line:
            self.midwatch.typed.append(line)
        await self.midwatch.do_typed(parse(line))
