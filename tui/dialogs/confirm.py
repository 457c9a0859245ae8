"""A command that loses something and has no dialog of its own: what it does, before it is given."""

from __future__ import annotations

from typing import Any

from midwatch.commands import BY_VERB, describe
from midwatch.protocol import Verb
from tui.chart.styles import Ink
from tui.core.scene import Scene
from tui.core.text_panel import Line, wrapped
from tui.dialogs.base import Answer, Dialog


class ConfirmDialog(Dialog):
    def __init__(self, scene: Scene, verb: Verb, arguments: dict[str, Any]) -> None:
        super().__init__(scene)
        self._verb, self._arguments = verb, arguments
        self.heading = describe(verb, arguments)
        self.deed = BY_VERB[verb].typed.capitalize()

    def words(self, cells: int) -> list[Line]:
        text = BY_VERB[self._verb].help
        return [[], *wrapped(f"{text[0].upper()}{text[1:]}.", cells, Ink.TITLE), []]

    def answer(self) -> Answer | str:
        return self._verb, self._arguments
