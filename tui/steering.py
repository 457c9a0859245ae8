"""What a screen asks of the run: commands with their outcomes, and the dialogs before those that lose something."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from midwatch import protocol
from tui.chart.styles import Ink
from tui.core import chrome
from tui.core.formatting import plural
from tui.core.scene import newest_checkpoint

if TYPE_CHECKING:
    from midwatch.transport.client import Client
    from tui.app import MidwatchApp
    from tui.dialogs.base import Dialog

READ_ONLY = "this screen is read-only"
UNREACHABLE = "the controller is out of reach; nothing was sent"


class Steering:
    """Of one screen. `pending` holds the words of commands that have no outcome yet, by the order in which they were given."""

    def __init__(self, app: MidwatchApp) -> None:
        self._app = app
        self._given = 0
        self.pending: dict[int, str] = {}

    # Commands

    def give(self, verb: protocol.Verb, arguments: dict[str, Any] | None = None) -> None:
        """Asks the run for something: shown as pending at once, and with its outcome when it comes."""
        from midwatch.commands import describe

        app, words = self._app, describe(verb, arguments or {})
        client = app.client
        if app.scene.read_only:
            app.say(f"{words}: refused: {READ_ONLY}", Ink.WARNING)
            return
        if client is None or not app.scene.link.up:
            app.say(f"{words}: refused: {UNREACHABLE}", Ink.WARNING)
            return
        self._given += 1
        self.pending[self._given] = words
        app.draw()
        app.run_worker(self._carry(self._given, client, verb, arguments or {}, words), exit_on_error=False)

    async def _carry(self, number: int, client: Client, verb: protocol.Verb, arguments: dict[str, Any], words: str) -> None:
        from midwatch.transport.client import ClientError

        said, ink = f"{words}: no outcome is known", Ink.WARNING
        try:
            said, ink = chrome.outcome(await client.command(verb, arguments), words)
        except ClientError as error:
            said = f"{words}: {error}"
        finally:
            self.pending.pop(number, None)
            self._app.say(said, ink)

    def pending_words(self) -> str:
        """What has no outcome yet, for the goodbye."""
        return f"; {plural(len(self.pending), 'command')} without an outcome yet" if self.pending else ""

    # What keys give

    def give_by_key(self, verb: protocol.Verb) -> Awaitable[None] | None:
        """The command as it is; one that needs arguments begins a line to type them on, and one that loses something asks first."""
        from midwatch.commands import BY_VERB

        spec = BY_VERB[verb]
        if any(argument.required for argument in spec.typed_arguments):
            return self._app.open_prompt(":", f"{spec.typed} ")
        if spec.confirm:
            return self.ask(verb, {})
        self.give(verb, {argument.name: argument.default for argument in spec.arguments if argument.default})
        return None

    def give_pause(self) -> None:
        state = self._app.scene.snapshot.state if self._app.scene.snapshot is not None else ""
        self.give("resume" if state in ("paused", "released", "failed") else "pause")

    def give_golden(self) -> None:
        """Marks the newest checkpoint."""
        snapshot = self._app.scene.snapshot
        newest = newest_checkpoint(snapshot) if snapshot is not None else None
        if newest is None:
            self._app.say("golden: there is no checkpoint yet (c makes one)", Ink.WARNING)
        elif newest.golden:
            self._app.say(f"golden: {newest.id} is golden already")
        else:
            self.give("golden", {"checkpoint": newest.id})

    def give_acknowledge(self) -> None:
        """The alarm that is first among the notices."""
        snapshot = self._app.scene.snapshot
        if snapshot is None or not snapshot.alarms:
            self._app.say("acknowledge: there is no alarm")
        else:
            self.give("acknowledge", {"alarm": snapshot.alarms[0].key})

    def give_rollback(self) -> Awaitable[None] | None:
        return self.ask_rollback()

    # Dialogs. Each is mounted when what is returned has been awaited, and takes the keys that follow.

    def ask(self, verb: protocol.Verb, arguments: dict[str, Any]) -> Awaitable[None] | None:
        """Shows what a command costs, and gives it if the operator agrees."""
        if verb == "rollback":
            return self.ask_rollback(arguments["checkpoint"], arguments.get("skip", 0), arguments.get("lr_scale", 1.0))
        if verb == "advance":
            return self.ask_advance(arguments.get("to", ""))
        if verb in ("stop", "stop-now"):
            return self.ask_stop(now=verb == "stop-now")
        if verb in ("node-drain", "node-add", "node-quarantine"):
            return self.ask_node(verb, arguments["node"])
        from tui.dialogs.confirm import ConfirmDialog

        return self._ask(verb, lambda: ConfirmDialog(self._app.scene, verb, arguments))

    def ask_rollback(self, checkpoint: str = "", skip: int = 0, lr_scale: float = 1.0) -> Awaitable[None] | None:
        from tui.dialogs.rollback import RollbackDialog, unknown

        problem = unknown(self._app.scene, checkpoint)
        if problem:
            self._app.say(problem, Ink.WARNING)
            return None
        app = self._app
        crosshair = getattr(app.view, "crosshair", None)  # of the metrics view
        return self._ask("rollback", lambda: RollbackDialog(app.scene, app.feed, checkpoint, skip, lr_scale, crosshair))

    def ask_advance(self, to: str = "") -> Awaitable[None] | None:
        from tui.dialogs.advance import AdvanceDialog

        return self._ask("advance", lambda: AdvanceDialog(self._app.scene, to))

    def ask_stop(self, *, now: bool = False) -> Awaitable[None] | None:
        from tui.dialogs.stop import StopDialog

        return self._ask("stop", lambda: StopDialog(self._app.scene, now=now))

    def ask_node(self, verb: protocol.Verb, node: str) -> Awaitable[None] | None:
        from tui.dialogs.node import NodeDialog, unknown

        problem = unknown(self._app.scene, node)
        if problem:
            self._app.say(problem, Ink.WARNING)
            return None
        return self._ask(verb.replace("node-", "node "), lambda: NodeDialog(self._app.scene, verb, node))

    def _ask(self, verb: str, make: Callable[[], Dialog]) -> Awaitable[None] | None:
        app = self._app
        if app.scene.read_only or not app.scene.link.up or app.scene.snapshot is None:
            app.say(f"{verb}: refused: {READ_ONLY if app.scene.read_only else UNREACHABLE}", Ink.WARNING)
            return None
        dialog = make()
        app.push_screen(dialog, self._answered)
        return dialog.opened()

    def _answered(self, answer: tuple[protocol.Verb, dict[str, Any]] | None) -> None:
        if answer is None:
            self._app.say("cancelled: nothing was sent")
        else:
            self.give(*answer)
