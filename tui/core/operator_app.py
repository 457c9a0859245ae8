"""What views, dialogs and the line to type on may ask of the app, which imports them and not they it."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Protocol

from textual.app import App

from midwatch import protocol
from tui.chart.styles import Ink
from tui.core.scene import Scene

if TYPE_CHECKING:
    from midwatch.transport.client import Client
    from tui.core.command_line import Typed
    from tui.core.controller_queries import ControllerQueries


class CommandGiver(Protocol):
    """What of `tui.steering.Steering` the views use."""

    def give_golden(self) -> None: ...

    def ask_rollback(self, checkpoint: str = "", skip: int = 0, lr_scale: float = 1.0) -> Awaitable[None] | None: ...

    def ask_node(self, verb: protocol.Verb, node: str) -> Awaitable[None] | None: ...


class OperatorApp(App[int]):
    """The app as its parts see it; `tui.app.MidwatchApp` is the one there is."""

    scene: Scene
    client: Client | None
    view_name: str
    typed: list[str]
    """Lines typed before, the newest last."""

    @property
    def feed(self) -> ControllerQueries:
        raise NotImplementedError

    @property
    def prefer(self) -> protocol.PreferenceBegin:
        """Who annotates here, and what."""
        raise NotImplementedError

    @property
    def view(self) -> Any:
        """The view that is open: a `tui.views.base.View`; None before the first."""
        raise NotImplementedError

    @property
    def steering(self) -> CommandGiver:
        """What gives commands."""
        raise NotImplementedError

    def draw(self) -> None:
        """Draws the scene in all its parts."""
        raise NotImplementedError

    def draw_foot(self) -> None:
        raise NotImplementedError

    def say(self, words: str, ink: Ink = Ink.TEXT) -> None:
        """Shows words on the status line."""
        raise NotImplementedError

    def open_prompt(self, sign: str, text: str = "") -> Awaitable[None]:
        """Opens the line to type on, with this text on it."""
        raise NotImplementedError

    def do_typed(self, typed: Typed) -> Awaitable[None]:
        """Does what a typed line asks for."""
        raise NotImplementedError

    def give(self, verb: protocol.Verb, arguments: dict[str, Any] | None = None) -> None:
        """Sends a command."""
        raise NotImplementedError

    def end_soon(self, status: int) -> None:
        """Ends the screen from a signal's handler or another thread."""
        raise NotImplementedError
