"""The operator's screen on a run: one frozen scene in, one drawing out; nothing of the run lives in this process.

A snapshot from the controller replaces the one before it and is drawn at most FPS times a second. Keys go through the table of
`tui.core.keys`. Views are imported and mounted when first opened; the first paint needs none.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midwatch.terminal import write_error, write_out

os.environ.setdefault("TEXTUAL_FPS", "15")  # kind to SSH; Textual reads it when imported
os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")

from textual.app import ComposeResult
from textual.containers import Container
from textual.events import Key as KeyEvent
from textual.events import Paste, Resize
from textual.message import Message
from textual.theme import Theme
from textual.timer import Timer

from midwatch import protocol
from tui.chart.formatting import UNICODE
from tui.chart.styles import Ink
from tui.core import chrome, keys
from tui.core.operator_app import OperatorApp
from tui.core.scene import ConnectionState, Scene
from tui.core.text_panel import Line, Panel, broken, joined, spread
from tui.steering import Steering

if TYPE_CHECKING:
    from midwatch.transport.client import Client
    from midwatch.transport.ssh_url import RemoteRun
    from tui.core.command_bar import CommandPrompt
    from tui.core.command_line import Typed
    from tui.core.controller_queries import ControllerQueries
    from tui.core.entry import PromptInput
    from tui.views.base import View

DRAW_SECONDS = 0.5
"""Between two drawings of a run that merely goes on."""
KEYS_SECONDS = 0.02
"""For how long keys are taken in a row before the screen has its turn."""
STATUS_ROWS = 4
"""Most rows of the status line: a refusal with its reason is long."""
INTERVAL_SECONDS = 10.0
"""Longest interval between two snapshots that counts as usual."""
SAID_SECONDS = 12.0
"""For how long the outcome of a command stays on the status line."""

NIGHT = Theme(
    name="night",
    primary="#7ab8e0",
    secondary="#8fa3d8",
    accent="#e5c76b",
    foreground="#b8c0cc",
    background="#0f1318",
    surface="#161b22",
    panel="#1c222b",
    success="#7fc7a5",
    warning="#e5c76b",
    error="#e06c6c",
    dark=True,
)


SETTLE_SECONDS = 0.5
"""After the last change of the terminal's size before all is drawn once more."""


class MidwatchApp(OperatorApp):
    """The screen. `clock` tells the operator's time of day."""

    CSS = """
    #header, #tabs, #status, #footer { height: 1; }
    #tabs, #status { background: $surface; }
    #notices { height: 0; }
    #body { height: 1fr; }
    """
    ENABLE_COMMAND_PALETTE = False
    TITLE = "midwatch"

    class Came(Message):
        """A newer snapshot is there."""

    class KeysCame(Message):
        """Keys or pastes are in the queue."""

    class LinkChanged(Message):
        def __init__(self, up: bool) -> None:
            super().__init__()
            self.up = up

    def __init__(
        self,
        directory: Path | RemoteRun,
        *,
        read_only: bool = False,
        clock: Callable[[], float] = time.time,
        prefer: protocol.PreferenceBegin | None = None,
    ) -> None:
        """prefer: the screen is an annotator's, and opens on the pairs."""
        super().__init__()
        self._settling: Timer | None = None
        self.directory = directory
        self.clock = clock
        self.scene = Scene(
            run=(directory.resolve() if isinstance(directory, Path) else directory).name, now=clock(), read_only=read_only
        )
        self.view_name = "watch"
        self.failure = ""
        """Why there is nothing to show, where there is not."""
        self._views: dict[str, View] = {}
        self._before: list[str] = []
        self._feed: ControllerQueries | None = None
        self.client: Client | None = None
        self._steering = Steering(self)
        self._keys: deque[KeyEvent | Paste] = deque()
        self._keys_announced = False
        self._said: tuple[Line, float] = ((), 0.0)
        self._hidden: frozenset[str] = frozenset()
        self._prompt: CommandPrompt | None = None
        self._newest: protocol.Snapshot | None = None
        self._prefer = prefer
        self._first = "watch" if prefer is None else "prefer"
        self.typed: list[str] = []
        """Command lines typed before."""

    # Start, and the way to the controller

    def compose(self) -> ComposeResult:
        yield Panel(id="header")
        yield Panel(id="tabs")
        yield Panel(id="notices")
        yield Container(id="body")
        yield Panel(id="status")
        yield Panel(id="footer")

    def on_mount(self) -> None:
        self.register_theme(NIGHT)
        self.theme = "night"
        self.draw()
        self.call_after_refresh(self._begin)

    def _begin(self) -> None:
        """What need not be there for the first paint."""
        self.run_worker(self._keep_link(), name="link")
        self.call_later(self.open_view, self._first)
        self.set_interval(1.0, self._tick)

    @property
    def steering(self) -> Steering:
        return self._steering

    @property
    def prefer(self) -> protocol.PreferenceBegin:
        """Who annotates here, and what: this user and the newest of everything, where the screen was not opened for it."""
        from midwatch.annotator import begin_of_user

        if self._prefer is None:
            self._prefer = begin_of_user()
        return self._prefer

    @property
    def feed(self) -> ControllerQueries:
        from tui.core.controller_queries import ControllerQueries

        if self._feed is None:
            self._feed = ControllerQueries()
        self._feed.client = self.client if self.scene.link.up else None
        return self._feed

    async def _keep_link(self) -> None:
        """Holds the client for as long as the screen lives."""
        import asyncio

        from midwatch.transport.client import Client, ClientError

        ended = asyncio.Event()
        client = Client(
            self.directory,
            subscribe=True,
            start=True,
            looks="when over",
            prompts=False,
            read_only=self.scene.read_only,
            on_snapshot=self._take,
            on_link=self._link_changes,
        )
        try:
            async with client:
                self.client = client
                await ended.wait()
        except ClientError as error:
            self.failure = str(error)
            self.exit(1)
        finally:
            self.client = None

    def _link_changes(self, up: bool) -> None:
        self.post_message(self.LinkChanged(up))

    def _take(self, snapshot: protocol.Snapshot) -> None:
        """Draws what an operator waits for at once, mere progress at most every DRAW_SECONDS."""
        waiting, self._newest = self._newest, snapshot
        shown = self.scene.snapshot
        if shown is None or _news(shown) != _news(snapshot):
            self.post_message(self.Came())
        elif waiting is None:
            self.set_timer(DRAW_SECONDS, self._came)

    def _came(self) -> None:
        self.post_message(self.Came())

    def on_midwatch_app_came(self, message: Came) -> None:
        snapshot, self._newest = self._newest, None
        if snapshot is not None:
            now, before = self.clock(), self.scene
            interval = min(now - before.received, INTERVAL_SECONDS) if before.snapshot is not None else before.interval
            smoothed = 0.8 * before.interval + 0.2 * interval
            self._set(snapshot=snapshot, received=now, run=snapshot.run, interval=smoothed)
            for view in self._views.values():
                view.learn(self.scene)

    def on_midwatch_app_link_changed(self, message: LinkChanged) -> None:
        since = None if message.up else self.clock()
        self._set(link=ConnectionState(message.up, since))

    def _set(self, **changes: Any) -> None:
        import dataclasses

        self.scene = dataclasses.replace(self.scene, now=self.clock(), **changes)
        self.draw()

    def _tick(self) -> None:
        self._set()

    # Drawing

    def draw(self) -> None:
        """Draws the scene: the frame around the view, then the view."""
        if not self._has_frame():
            return
        cells = self.size.width
        scene = self.scene
        base = self.screen_stack[0]
        watching = self.view_name == "watch" and "watch" in self._views  # that view says the state itself
        base.query_one("#header", Panel).show([chrome.header(scene, cells, state=not watching)])
        base.query_one("#tabs", Panel).show([chrome.tabs(self.view_name, cells)])
        base.query_one("#notices", Panel).show_all(chrome.notices(scene, self._hidden, cells))
        view = self._views.get(self.view_name)
        if view is not None and view.is_mounted:
            view.show(scene)
        self.draw_foot()
        self._refresh_dialog()

    def _refresh_dialog(self) -> None:
        from tui.dialogs.base import Dialog

        top = self.screen_stack[-1]
        if isinstance(top, Dialog) and top.can_take_keys:
            top.refresh_scene(self.scene)

    def _has_frame(self) -> bool:
        return bool(self.screen_stack) and bool(self.screen_stack[0].query("#footer"))

    def draw_foot(self) -> None:
        """The status of commands, and the keys."""
        if not self._has_frame():
            return
        base, cells = self.screen_stack[0], self.size.width
        base.query_one("#status", Panel).show_all(broken(self._status(), cells, STATUS_ROWS))
        snapshot = self.scene.snapshot
        paused = snapshot is not None and snapshot.state in ("paused", "released", "failed")
        line = chrome.footer(self.view_name, self.scene.read_only, cells, paused=paused)
        base.query_one("#footer", Panel).show([line])

    def _status(self) -> Line:
        """Commands of this screen that have no outcome yet, else the newest outcome, else what others have asked for."""
        if pending := self.steering.pending:
            more = f" (and {len(pending) - 1} more)" if len(pending) > 1 else ""
            words = pending[max(pending)]
            return [(" … " if UNICODE else " . ", Ink.ACTIVE), (f"{words}: asked, waiting for its outcome{more}", Ink.ACTIVE)]
        line, moment = self._said
        if line and self.scene.now - moment < SAID_SECONDS:
            return line
        snapshot = self.scene.snapshot
        waiting = chrome.open_commands(snapshot.commands) if snapshot is not None else []
        if waiting:
            from midwatch.commands import describe

            parts = [[(f"#{c.number} {describe(c.verb, c.arguments)} ({c.author}): {c.state}", Ink.TEXT)] for c in waiting[-3:]]
            return [(" ", Ink.BLANK), *joined(parts, "; ")]
        note = self._views[self.view_name].status() if self.view_name in self._views else ()
        return spread([(" ", Ink.BLANK), *note], (), self.size.width) if note else ()

    def say(self, words: str, ink: Ink = Ink.TEXT) -> None:
        """Something for the operator, on the status line for a while."""
        self._said = ([(f" {words}", ink)], self.clock())
        self._set()

    def on_resize(self, event: Resize) -> None:
        self.call_after_refresh(self.draw)
        if self._settling is not None:
            self._settling.stop()
        self._settling = self.set_timer(SETTLE_SECONDS, self._settled)

    def _settled(self) -> None:
        """The terminal keeps its size: all is laid out and drawn once more, as what was drawn between two sizes may be gone."""
        self._settling = None
        if not self.screen_stack:
            return  # it closes
        for widget in self.screen.query("*"):
            widget.refresh()
        self.screen.refresh(layout=True)
        self.call_after_refresh(self.draw)

    # Views

    async def open_view(self, name: str, *, remember: bool = True) -> None:
        """Brings a view into sight, making it first where it has not been seen."""
        if name not in self._views:
            view: View = keys.view(name).make(id=f"view-{name}")
            view.display = False
            self._views[name] = view
            await self.screen_stack[0].query_one("#body", Container).mount(view)
        if remember and name != self.view_name:
            self._before = [*self._before[-19:], self.view_name]
        self.view_name = name
        for other, view in self._views.items():
            view.display = other == name
        self.call_after_refresh(self._opened, name)

    def _opened(self, name: str) -> None:
        self.draw()
        if name == self.view_name:
            self._views[name].opened()

    @property
    def view(self) -> View | None:
        return self._views.get(self.view_name)

    # Keys

    def post_message(self, message: Message) -> bool:
        """Keys and pastes wait in a queue of their own, so that a flood of them costs one message and not one each."""
        if not isinstance(message, KeyEvent | Paste) or message.is_forwarded:
            return super().post_message(message)
        self._keys.append(message)
        if self._keys_announced:
            return True
        self._keys_announced = super().post_message(self.KeysCame())
        return self._keys_announced

    async def on_midwatch_app_keys_came(self, message: KeysCame) -> None:
        """Takes keys one after the other: each finds what the one before has opened or closed."""
        self._keys_announced = False
        end = time.monotonic() + KEYS_SECONDS
        while self._keys and time.monotonic() < end:
            event = self._keys.popleft()
            entry = self._entry()
            if isinstance(event, Paste):
                self._pasted(event, entry)
            elif entry is not None and event.is_printable:
                entry.take_text((event.character or "") + self._printable())
            elif not await self._pressed(event):
                await super().on_event(event)
        if self._keys:
            self._keys_announced = super().post_message(self.KeysCame())

    def _printable(self) -> str:
        """The characters at the head of the queue, taken out of it."""
        found = []
        while self._keys and isinstance(event := self._keys[0], KeyEvent) and event.is_printable:
            found.append(event.character or "")
            self._keys.popleft()
        return "".join(found)

    def _entry(self) -> PromptInput | None:
        """Where text that is typed now goes to; None: keys are commands."""
        from tui.dialogs.base import Dialog

        top = self.screen_stack[-1] if self.screen_stack else None
        if isinstance(top, Dialog):
            return top.entry
        return self._prompt if self._prompt is not None and self._prompt.is_open else None

    async def _pressed(self, event: KeyEvent) -> bool:
        """Whether the key has been dealt with: by the dialog that is open, the line to type on, or the table of keys."""
        from tui.dialogs.base import Dialog

        top = self.screen_stack[-1] if self.screen_stack else None
        if isinstance(top, Dialog):
            return await top.take_key(event)
        if self._prompt is not None and self._prompt.is_open:
            return await self._prompt.take_key(event)
        key = keys.find(self.view_name, event.key)
        if key is None:
            if event.key == "ctrl+c" and not self.screen.get_selected_text():
                self.say("q detaches (the run continues); S stops the run, after asking")
                return True
            return event.is_printable
        if key.changes and self.scene.read_only:
            self.say(f"{key.shown} is not bound: this screen is read-only")
            return True
        action, _, argument = key.action.partition(":")
        owner = self.view if hasattr(self.view, f"do_{action}") else self
        done = getattr(owner, f"do_{action}")(*([argument] if argument else []))
        if done is not None:
            await done
        return True

    def _pasted(self, event: Paste, entry: PromptInput | None) -> None:
        """A paste is text for a line to type on, never a row of keys."""
        if entry is not None:
            left_out = entry.take_paste(event)
            if left_out:
                self.say(left_out, Ink.WARNING)
        elif self.scene.snapshot is not None:
            self.say("the paste was ignored: press : or / first to type a line", Ink.WARNING)

    async def do_open(self, name: str) -> None:
        await self.open_view(name)

    async def do_stacks(self) -> None:
        await self.open_view("logs")
        view = self._views["logs"]
        self.run_worker(view.open_stacks())  # type: ignore[attr-defined]  # the logs view

    def do_missing(self, name: str) -> None:
        self.say(f"{name}: not there yet")

    async def do_back(self) -> None:
        """Leaves what was opened last: what the view has open, the view; then hides the notices."""
        if self.view is not None and self.view.back():
            pass
        elif self._before:
            *self._before, name = self._before
            await self.open_view(name, remember=False)
        elif self.scene.snapshot is not None:
            self._hidden |= chrome.notice_keys(self.scene.snapshot, self.scene)
            self._set()

    def do_detach(self) -> None:
        self.exit(0)

    def end_soon(self, status: int) -> None:
        """Leaves the terminal as it was and ends with this status. It may be called from a signal handler."""
        if self._loop is None:
            raise SystemExit(status)  # it has not begun: the terminal is untouched
        self._loop.call_soon_threadsafe(self.exit, None, status)

    async def do_prompt(self) -> None:
        await self.open_prompt(":")

    async def do_filter(self) -> None:
        await self.open_prompt("/")

    async def open_prompt(self, sign: str, text: str = "") -> None:
        """Opens the line to type on, with this text on it."""
        from tui.core.command_bar import CommandPrompt

        if self._prompt is None:
            self._prompt = CommandPrompt()
            await self.screen_stack[0].mount(self._prompt, before="#status")
        self._prompt.open(sign, text)

    async def do_typed(self, typed: Typed) -> None:
        """Does what a typed line asks for."""
        from midwatch.commands import BY_VERB

        if typed.problem:
            self.say(typed.problem, Ink.WARNING)
        elif typed.detach:
            self.do_detach()
        elif typed.view:
            await self.open_view(typed.view)
        elif typed.verb is not None and (typed.sure or not BY_VERB[typed.verb].confirm):
            self.give(typed.verb, typed.arguments)
        elif typed.verb is not None and (asked := self.steering.ask(typed.verb, typed.arguments)) is not None:
            await asked

    # Commands

    def give(self, verb: protocol.Verb, arguments: dict[str, Any] | None = None) -> None:
        self.steering.give(verb, arguments)

    def do_command(self, verb: protocol.Verb) -> Awaitable[None] | None:
        """What a command's key does: the view's own way of giving it, or the screen's."""
        name = f"give_{verb.replace('-', '_')}"
        for owner in (self.view, self.steering):
            if hasattr(owner, name):
                asked: Awaitable[None] | None = getattr(owner, name)()
                return asked
        return self.steering.give_by_key(verb)


def _news(snapshot: protocol.Snapshot) -> tuple[object, ...]:
    """What is more than progress."""
    event = snapshot.events[-1].index if snapshot.events else -1
    return snapshot.state, snapshot.reason, snapshot.stage, snapshot.lineage, snapshot.commands, event


def run(directory: Path | RemoteRun, *, read_only: bool = False, prefer: protocol.PreferenceBegin | None = None) -> int:
    """Attaches the screen to a run. Returns 0 when the operator detaches, 1 where the controller is not to be had, 2 for no run.

    A signal ends the screen with 128 and its number, as it would a program that does not handle it; the run goes on.
    """
    from midwatch.run_directory import RunPaths
    from tui.driver import ScreenDriver, ScreenExit

    if isinstance(directory, Path) and not RunPaths(directory).is_run():
        write_error(f"midwatch: {directory}: not a run directory (midwatch ps lists the runs)")
        return 2
    for name in ("COLUMNS", "LINES"):
        os.environ.pop(name, None)  # they would hold the size for good; the terminal tells it, and each change
    app = MidwatchApp(directory, read_only=read_only, prefer=prefer)
    app.driver_class = ScreenDriver
    with ScreenExit(app) as ended:
        app.run()
    if app.failure:
        write_error(f"midwatch: {app.failure}")
        return 1
    if app.return_code and ended.number is None:
        return app.return_code
    state = app.scene.snapshot.state if app.scene.snapshot is not None else ""
    over = state in ("finished", "failed", "released")
    goes_on = f"the run is {state}" if over else "detached: the run continues"
    because = f"{ended.number.name}: " if ended.number is not None else ""
    write_out(f"{because}{goes_on}{app.steering.pending_words()} (midwatch attach {directory} comes back)")
    return app.return_code or 0
