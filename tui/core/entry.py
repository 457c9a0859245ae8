"""A line to type on that takes each key at once, in the turn of the app.

Textual sends a key on to the queue of the focused widget, and the end of the line back from there. Keys that follow Enter would
then be added to a line that was submitted already. So the app calls `take_key` itself, one key after the other.
"""

from __future__ import annotations

from textual.events import Key, Paste
from textual.widgets import Input

MOST = 4096
"""Characters of a line; what is typed or pasted beyond them is dropped."""


class PromptInput(Input):
    """An Input whose keys come from the app."""

    async def take_key(self, event: Key) -> bool:
        """Edits the line by one key; whether the key means anything here. Enter does not: what it does is the owner's to say."""
        if event.key == "enter":
            return False
        if event.is_printable and event.character is not None:
            self.take_text(event.character)
            return True
        for binding in self._bindings.key_to_bindings.get(event.key, ()):
            await self.run_action(binding.action)
            return True
        return False

    def take_paste(self, event: Paste) -> str:
        """Adds the first line of what was pasted; what was left out, in words, where anything was."""
        first, _, rest = event.text.lstrip("\n\r").replace("\r", "\n").partition("\n")
        cut = len(first) - (MOST - len(self.value))
        self.take_text(first)
        if cut > 0:
            return f"{cut:,} characters were left out: a line holds {MOST:,}"
        return "only the first line was pasted" if rest.strip() else ""

    def take_text(self, text: str) -> None:
        """Adds what was typed, as far as there is room."""
        text = text[: max(0, MOST - len(self.value))]
        selection = self.selection
        if not text:
            return
        if selection.is_empty:
            self.insert_text_at_cursor(text)
        else:
            self.replace(text, *selection)
