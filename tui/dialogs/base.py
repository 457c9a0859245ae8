"""A dialog: what is about to happen and what it costs, then Cancel, on which the focus begins, and the deed."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

from rich.segment import Segment
from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical
from textual.content import Content
from textual.events import Click, Key
from textual.message import Message
from textual.screen import ModalScreen
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Input

from midwatch.protocol import Verb
from midwatch.terminal import safe
from tui.chart.formatting import UNICODE
from tui.chart.styles import STYLES, Ink
from tui.core.entry import PromptInput
from tui.core.scene import Scene
from tui.core.text_panel import Line, Panel, wrapped

Answer = tuple[Verb, dict[str, Any]]
MOUNT_SECONDS = 5.0


class Press(Widget):
    """A button of one row; the focused one stands out by brackets and reversal."""

    DEFAULT_CSS = "Press { width: auto; height: 1; margin: 0 1; }"
    can_focus = True

    class Pressed(Message):
        def __init__(self, press: Press) -> None:
            super().__init__()
            self.press = press

    def __init__(self, label: str, *, deed: bool = False, id: str | None = None) -> None:
        super().__init__(id=id)
        self.label, self.deed = label, deed

    def get_content_width(self, container: object, viewport: object) -> int:
        return len(self.label) + 4

    def render_line(self, y: int) -> Strip:
        here = self.has_focus
        words = f"[ {self.label} ]" if here else f"  {self.label}  "
        ink = Ink.BADGE_HOLD if here and self.deed else Ink.HERE if here else Ink.TEXT
        return Strip([Segment(words, self.rich_style + STYLES[ink])], len(words))

    def on_focus(self) -> None:
        self.refresh()

    def on_blur(self) -> None:
        self.refresh()

    def on_click(self, event: Click) -> None:
        event.stop()
        self.post_message(self.Pressed(self))


class Field(PromptInput):
    """A one-row entry."""

    DEFAULT_CSS = """
    Field { width: 12; height: 1; border: none; padding: 0 1; background: $surface; color: $foreground; }
    Field:focus { border: none; background: $panel; text-style: bold; }
    """

    def __init__(self, value: str, *, id: str) -> None:
        super().__init__(value, id=id, compact=True)

    def take_text(self, text: str) -> None:
        super().take_text(text)
        if isinstance(self.screen, Dialog):
            self.screen.text_changes()


class Dialog(ModalScreen[Answer | None]):
    """Arrows left and right and Tab go from one to the next, Enter presses, Esc cancels. `answer` is what the deed would send."""

    DEFAULT_CSS = """
    Dialog { align: center middle; background: $background 60%; }
    Dialog #box { width: 76; max-width: 100%; height: auto; max-height: 100%; background: $panel;
        padding: 0 1; border: BORDER $accent; }
    Dialog #box Panel { height: auto; }
    Dialog .fields, Dialog .presses { height: 1; width: 1fr; }
    Dialog .presses { align-horizontal: right; }
    Dialog .fields { width: 1fr; }
    Dialog .name { width: auto; height: 1; padding: 0 1 0 0; }
    """.replace("BORDER", "round" if UNICODE else "ascii")
    AUTO_FOCUS = "#cancel"

    heading = ""
    deed = ""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.scene = scene
        self.told = Panel(id="told")
        self._can_take_keys = asyncio.Event()
        self._is_answered = False
        self._problem = ""
        """Why the deed cannot be done, until the next key."""
        self._chosen_lost = False
        self.known_since = 0.0
        """When what the deed costs came up, by the clock of events: a key from before does not do it."""

    def compose(self) -> ComposeResult:
        with Vertical(id="box") as box:
            box.border_title = Content(safe(self.heading))
            yield from self.parts()
            yield self.told
            yield from self.entries()
            with Horizontal(classes="presses"):
                yield Press("Cancel", id="cancel")
                yield Press(self.deed, deed=True, id="deed")

    def parts(self) -> Sequence[Widget]:
        """What stands above the words."""
        return ()

    def entries(self) -> Sequence[Widget]:
        """What stands beneath them."""
        return ()

    def on_mount(self) -> None:
        self.begin()
        self.set_focus(self.query_one("#cancel"))
        self._can_take_keys.set()

    def begin(self) -> None:
        """Fills what was mounted."""
        self.tell()

    @property
    def can_take_keys(self) -> bool:
        return self._can_take_keys.is_set()

    async def opened(self) -> None:
        """Returns when it can take keys, or after a while: keys that come too early are lost, and the screen goes on."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._can_take_keys.wait(), MOUNT_SECONDS)

    def lose_choice(self, what: str) -> None:
        """What was chosen is no longer there: the deed waits until the operator has chosen again."""
        self._problem, self._chosen_lost = what, True
        self.known_since = time.monotonic()

    def tell(self) -> None:
        """Shows the words for what is chosen now."""
        cells = max(20, min(76, self.app.size.width) - 4)
        self.told.show_all([*self.words(cells), *(wrapped(self._problem, cells, Ink.ALARM) if self._problem else [])])

    def words(self, cells: int) -> list[Line]:
        raise NotImplementedError

    def answer(self) -> Answer | str:
        """What to send, or why that cannot be."""
        raise NotImplementedError

    def move(self, by: int) -> None:
        """Up or down."""

    def text_changes(self) -> None:
        """An entry has changed."""
        self.tell()

    def refresh_scene(self, scene: Scene) -> None:
        """There is a newer scene: what it costs may be more by now."""
        self.scene = scene
        self.tell()

    def on_resize(self) -> None:
        self.tell()

    async def take_key(self, event: Key) -> bool:
        """What a key does here; the app calls this for each key while the dialog is on top."""
        await self.opened()
        self._problem = ""
        focused = self.focused
        if event.key in ("up", "down"):
            self._chosen_lost = False
        field = self.entry
        if event.key == "escape":
            self._close(None)
        elif event.key in ("up", "down"):
            self.move(-1 if event.key == "up" else 1)
        elif event.key in ("tab", "shift+tab"):
            (self.focus_next if event.key == "tab" else self.focus_previous)()
        elif event.key in ("left", "right") and field is None:
            (self.focus_previous if event.key == "left" else self.focus_next)(Press)
        elif field is not None and event.key == "enter":
            self.focus_next()  # it never does the deed
        elif field is not None:
            if await field.take_key(event):
                self.text_changes()
        elif event.key in ("enter", "space") and isinstance(focused, Press):
            if focused.deed and self._chosen_lost:
                self._problem = "what was chosen is no longer there; choose again with the arrow keys"
                self.tell()
            elif focused.deed and event.time < self.known_since:
                self._problem = "the cost was shown only after you pressed that key; press it again"
                self.tell()
            else:
                self._press(focused)
        else:
            return event.is_printable
        return True

    @property
    def entry(self) -> Field | None:
        """What text that is typed now goes to."""
        return self.focused if isinstance(self.focused, Field) else None

    def on_press_pressed(self, event: Press.Pressed) -> None:
        self._press(event.press)

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()

    def _press(self, press: Press) -> None:
        if not press.deed:
            self._close(None)
            return
        answer = self.answer()
        if isinstance(answer, str):
            self._problem = answer
            self.tell()
        else:
            self._close(answer)

    def _close(self, answer: Answer | None) -> None:
        """Ends the dialog, once: a second press may have been on its way."""
        if not self._is_answered:
            self._is_answered = True
            self.dismiss(answer)
