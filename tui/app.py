"""The operator's screen on a run: one frozen scene in, one drawing out; nothing of the run lives in this process.

A snapshot from the controller replaces the one before it and is drawn at most FPS times a second. Keys go through the table of
`tui.keys`. Views are imported and mounted when first opened; the first paint needs none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.terminal import write_error, write_out

os.environ.setdefault("TEXTUAL_FPS", "15")  # kind to SSH; Textual reads it when imported
os.environ.setdefault("TEXTUAL_ANIMATIONS", "none")

from textual.app import App, ComposeResult
from textual.containers import Container
from textual.events import Event, Resize
from textual.events import Key as KeyEvent
from textual.message import Message
from textual.theme import Theme
from textual.timer import Timer

from launcher import protocol
from tui import frame, keys
from tui.chart.ink import Ink
from tui.panel import Line, Panel, fit, joined, spread
from tui.scene import Link, Scene, newest_checkpoint
from tui.words import UNICODE, plural

if TYPE_CHECKING:
    from launcher.client import Client
    from launcher.remote import RemoteRun
    from tui.commandline import Typed
    from tui.feed import Feed
    from tui.prompt import Prompt
    from tui.views.base import View

DRAW_SECONDS = 0.5
"""Between two drawings of a run that merely goes on."""
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


class MidwatchApp(App[int]):
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
        self._feed: Feed | None = None
        self._client: Client | None = None
        self._pending: dict[int, str] = {}
        self._given = 0
        self._said: tuple[Line, float] = ((), 0.0)
        self._hidden: frozenset[str] = frozenset()
        self._prompt: Prompt | None = None
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
    def prefer(self) -> protocol.PreferenceBegin:
        """Who annotates here, and what: this user and the newest of everything, where the screen was not opened for it."""
        from launcher.cli.prefer import begin_of_user

        if self._prefer is None:
            self._prefer = begin_of_user()
        return self._prefer

    @property
    def feed(self) -> Feed:
        from tui.feed import Feed

        if self._feed is None:
            self._feed = Feed()
        self._feed.client = self._client if self.scene.link.up else None
        return self._feed

    async def _keep_link(self) -> None:
        """Holds the client for as long as the screen lives."""
        import asyncio

        from launcher.client import Client, ClientError

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
                self._client = client
                await ended.wait()
        except ClientError as error:
            self.failure = str(error)
            self.exit(1)
        finally:
            self._client = None

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
            self._set(snapshot=snapshot, received=self.clock(), run=snapshot.run)
            for view in self._views.values():
                view.learn(self.scene)

    def on_midwatch_app_link_changed(self, message: LinkChanged) -> None:
        since = None if message.up else self.clock()
        self._set(link=Link(message.up, since))

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
        base.query_one("#header", Panel).show([frame.header(scene, cells, state=not watching)])
        base.query_one("#tabs", Panel).show([frame.tabs(self.view_name, cells)])
        base.query_one("#notices", Panel).show_all(frame.notices(scene, self._hidden, cells))
        view = self._views.get(self.view_name)
        if view is not None and view.is_mounted:
            view.show(scene)
        self.draw_foot()

    def _has_frame(self) -> bool:
        return bool(self.screen_stack) and bool(self.screen_stack[0].query("#footer"))

    def draw_foot(self) -> None:
        """The status of commands, and the keys."""
        if not self._has_frame():
            return
        base, cells = self.screen_stack[0], self.size.width
        base.query_one("#status", Panel).show([fit(self._status(), cells)])
        snapshot = self.scene.snapshot
        paused = snapshot is not None and snapshot.state in ("paused", "released", "failed")
        line = frame.footer(self.view_name, self.scene.read_only, cells, paused=paused)
        base.query_one("#footer", Panel).show([line])

    def _status(self) -> Line:
        """Commands of this screen that have no outcome yet, else the newest outcome, else what others have asked for."""
        if self._pending:
            more = f" (and {len(self._pending) - 1} more)" if len(self._pending) > 1 else ""
            words = self._pending[max(self._pending)]
            return [(" … " if UNICODE else " . ", Ink.ACTIVE), (f"{words}: asked, waiting for its outcome{more}", Ink.ACTIVE)]
        line, moment = self._said
        if line and self.scene.now - moment < SAID_SECONDS:
            return line
        snapshot = self.scene.snapshot
        waiting = frame.open_commands(snapshot.commands) if snapshot is not None else []
        if waiting:
            from launcher.commands import describe

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
            view = _make(name)
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

    async def on_event(self, event: Event) -> None:
        """Keys are taken here, before they are sent on: one typed right after `:` must find the line to type on open already."""
        if not (isinstance(event, KeyEvent) and not event.is_forwarded and await self._pressed(event)):
            await super().on_event(event)

    async def _pressed(self, event: KeyEvent) -> bool:
        """Whether the key is one of the table's, and so done with."""
        typing = self._prompt is not None and self._prompt.is_open
        if len(self.screen_stack) != 1 or (typing and event.key != "escape"):
            return False
        key = keys.find(self.view_name, event.key)
        if key is None:
            if event.key == "ctrl+c" and not self.screen.get_selected_text():
                self.say("q detaches (the run goes on); S stops the run, after asking")
                return True
            return False
        if key.changes and self.scene.read_only:
            self.say(f"{key.shown} is not bound: this screen is read-only")
            return True
        action, _, argument = key.action.partition(":")
        owner = self.view if hasattr(self.view, f"do_{action}") else self
        done = getattr(owner, f"do_{action}")(*([argument] if argument else []))
        if done is not None:
            await done
        return True

    async def do_open(self, name: str) -> None:
        await self.open_view(name)

    def do_missing(self, name: str) -> None:
        self.say(f"{name}: not there yet")

    async def do_back(self) -> None:
        """Leaves what was opened last: the command line, what the view has open, the view; then hides the notices."""
        if self._prompt is not None and self._prompt.is_open:
            self._prompt.close()
        elif self.view is not None and self.view.back():
            pass
        elif self._before:
            *self._before, name = self._before
            await self.open_view(name, remember=False)
        elif self.scene.snapshot is not None:
            self._hidden |= frame.notice_keys(self.scene.snapshot, self.scene)
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

    async def open_prompt(self, sign: str) -> None:
        from tui.prompt import Prompt

        if self._prompt is None:
            self._prompt = Prompt()
            await self.screen_stack[0].mount(self._prompt, before="#status")
        self._prompt.open(sign)

    async def do_typed(self, typed: Typed) -> None:
        """Does what a command line asks."""
        from tui.commandline import ASK

        if typed.problem:
            self.say(typed.problem, Ink.WARNING)
        elif typed.detach:
            self.do_detach()
        elif typed.view:
            await self.open_view(typed.view)
        elif typed.verb is not None and (typed.sure or typed.verb not in ASK):
            self.give(typed.verb, typed.arguments)
        elif typed.verb == "rollback":
            found = typed.arguments
            self.ask_rollback(found["checkpoint"], found.get("skip", 0), found.get("lr_scale", 1.0))
        elif typed.verb == "advance":
            self.ask_advance(typed.arguments.get("to", ""))
        elif typed.verb is not None and "node" in typed.arguments:
            self.ask_node(typed.verb, typed.arguments["node"])
        else:
            self.ask_stop(now=typed.verb == "stop-now")

    # Commands

    def give(self, verb: protocol.Verb, arguments: dict[str, Any] | None = None) -> None:
        """Asks the run for something: shown as pending at once, and with its outcome when it comes."""
        from launcher.commands import describe

        words = describe(verb, arguments or {})
        if self.scene.read_only:
            self.say(f"{words}: refused: this screen is read-only", Ink.WARNING)
            return
        if self._client is None or not self.scene.link.up:
            self.say(f"{words}: refused: the controller is out of reach; nothing was sent", Ink.WARNING)
            return
        self._given += 1
        self._pending[self._given] = words
        self._set()
        self.run_worker(self._carry(self._given, self._client, verb, arguments or {}, words), exit_on_error=False)

    async def _carry(self, number: int, client: Client, verb: protocol.Verb, arguments: dict[str, Any], words: str) -> None:
        from launcher.client import ClientError

        said, ink = f"{words}: no outcome is known", Ink.WARNING
        try:
            said, ink = frame.outcome(await client.command(verb, arguments), words)
        except ClientError as error:
            said = f"{words}: {error}"
        finally:
            self._pending.pop(number, None)
            self.say(said, ink)

    def do_pause(self) -> None:
        state = self.scene.snapshot.state if self.scene.snapshot is not None else ""
        self.give("resume" if state in ("paused", "released", "failed") else "pause")

    def do_checkpoint(self) -> None:
        self.give("checkpoint")

    def do_golden(self) -> None:
        newest = newest_checkpoint(self.scene.snapshot) if self.scene.snapshot is not None else None
        if newest is None:
            self.say("golden: there is no checkpoint yet (c makes one)", Ink.WARNING)
        elif newest.golden:
            self.say(f"golden: {newest.id} is golden already")
        else:
            self.give("golden", {"checkpoint": newest.id})

    def do_rollback(self) -> None:
        self.ask_rollback()

    def ask_rollback(self, checkpoint: str = "", skip: int = 0, lr_scale: float = 1.0) -> None:
        from tui.dialogs.rollback import RollbackDialog, unknown

        problem = unknown(self.scene, checkpoint)
        if problem:
            self.say(problem, Ink.WARNING)
        elif self._may_ask("rollback"):
            self.push_screen(RollbackDialog(self.scene, self.feed, checkpoint, skip, lr_scale), self._answered)

    def do_advance(self) -> None:
        self.ask_advance()

    def ask_advance(self, to: str = "") -> None:
        from tui.dialogs.advance import AdvanceDialog

        if self._may_ask("advance"):
            self.push_screen(AdvanceDialog(self.scene, to), self._answered)

    def do_stop(self) -> None:
        self.ask_stop()

    def ask_stop(self, *, now: bool = False) -> None:
        from tui.dialogs.stop import StopDialog

        if self._may_ask("stop"):
            self.push_screen(StopDialog(self.scene, now=now), self._answered)

    def ask_node(self, verb: protocol.Verb, node: str) -> None:
        from tui.dialogs.node import NodeDialog, unknown

        problem = unknown(self.scene, node)
        if problem:
            self.say(problem, Ink.WARNING)
        elif self._may_ask(verb.replace("node-", "node ")):
            self.push_screen(NodeDialog(self.scene, verb, node), self._answered)

    def _may_ask(self, verb: str) -> bool:
        if self.scene.read_only or not self.scene.link.up or self.scene.snapshot is None:
            why = "this screen is read-only" if self.scene.read_only else "the controller is out of reach; nothing was sent"
            self.say(f"{verb}: refused: {why}", Ink.WARNING)
            return False
        return True

    def _answered(self, answer: tuple[protocol.Verb, dict[str, Any]] | None) -> None:
        if answer is None:
            self.say("cancelled: nothing was sent")
        else:
            self.give(*answer)

    def pending_words(self) -> str:
        """What has no outcome yet, for the goodbye."""
        return f"; {plural(len(self._pending), 'command')} without an outcome yet" if self._pending else ""


def _news(snapshot: protocol.Snapshot) -> tuple[object, ...]:
    """What is more than progress."""
    event = snapshot.events[-1].index if snapshot.events else -1
    return snapshot.state, snapshot.reason, snapshot.stage, snapshot.lineage, snapshot.commands, event


def _make(name: str) -> View:
    """A view by its name; its module is imported here."""
    import importlib

    module = importlib.import_module(f"tui.views.{name}")
    view: View = getattr(module, f"{name.capitalize()}View")(id=f"view-{name}")
    return view


def run(directory: Path | RemoteRun, *, read_only: bool = False, prefer: protocol.PreferenceBegin | None = None) -> int:
    """Attaches the screen to a run. Returns 0 when the operator detaches, 1 where the controller is not to be had, 2 for no run.

    A signal ends the screen with 128 and its number, as it would a program that does not handle it; the run goes on.
    """
    from launcher.paths import RunPaths
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
    goes_on = f"the run is {state}" if over else "detached: the run goes on"
    because = f"{ended.number.name}: " if ended.number is not None else ""
    write_out(f"{because}{goes_on}{app.pending_words()} (midwatch attach {directory} comes back)")
    return app.return_code or 0
