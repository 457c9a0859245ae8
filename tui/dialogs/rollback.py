"""Rolling back: to which checkpoint, past how much data, at what rate; and what that undoes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.widget import Widget

from launcher.protocol import CheckpointView, Refused, UndoQuery, UndoReply
from tui.chart.ink import Ink
from tui.commandline import number, whole
from tui.dialogs.base import Answer, Dialog, Field
from tui.feed import Feed
from tui.frame import DOT
from tui.panel import Line, Panel, Rows, Run, wrapped
from tui.scene import Scene
from tui.words import UNICODE, age, compact, duration, plural

ROWS = 6
"""Checkpoints in sight."""


class Named(Horizontal):
    """Entries in one row, each behind its name."""

    def __init__(self, *fields: tuple[str, Field]) -> None:
        super().__init__(classes="fields")
        self._fields = fields

    def compose(self) -> ComposeResult:
        for name, field in self._fields:
            label = Panel(classes="name")
            label.styles.width = len(name) + 1
            label.show([[(name, Ink.FAINT)]])
            yield label
            yield field


class RollbackDialog(Dialog):
    heading = "Roll back"
    deed = "Roll back"

    def __init__(self, scene: Scene, feed: Feed, checkpoint: str = "", skip: int = 0, lr_scale: float = 1.0) -> None:
        super().__init__(scene)
        self._feed = feed
        self._choices = choices(scene)
        self._list = Rows(choosing=True, id="choices")
        self._wanted = checkpoint
        self._skip = Field(str(skip), id="skip")
        self._scale = Field(f"{lr_scale:g}", id="lr_scale")
        self._undone: dict[str, UndoReply | Refused] = {}

    def parts(self) -> Sequence[Widget]:
        self._list.styles.height = max(1, min(ROWS, len(self._choices)))
        return (self._list,)

    def entries(self) -> Sequence[Widget]:
        return (Named(("Then skip steps of data", self._skip), ("  learning rate x", self._scale)),)

    def begin(self) -> None:
        self._list.show([line(self.scene, checkpoint) for checkpoint in self._choices])
        self._list.choose(pick(self._choices, self._wanted))
        self._ask()

    def on_rows_chosen(self, event: Rows.Chosen) -> None:
        self._ask()

    def move(self, by: int) -> None:
        self._list.move(by)
        self._ask()

    @property
    def _chosen(self) -> CheckpointView | None:
        return self._choices[self._list.cursor] if self._choices else None

    def _ask(self) -> None:
        self.tell()
        chosen = self._chosen
        if chosen is not None and chosen.id not in self._undone:
            self.run_worker(self._learn(chosen.id), exclusive=True)

    async def _learn(self, checkpoint: str) -> None:
        reply = await self._feed.ask(UndoQuery(id=0, checkpoint=checkpoint), UndoReply)
        self._undone[checkpoint] = reply if reply is not None else Refused(reason=self._feed.refusal)
        self.tell()

    def words(self, cells: int) -> list[Line]:
        chosen = self._chosen
        if chosen is None:
            return [[("There is no checkpoint to go back to.", Ink.WARNING)]]
        undone = self._undone.get(chosen.id)
        lines: list[Line] = [[]]
        if undone is None:
            lines.append([("asking what this would undo", Ink.FAINT)])
        elif isinstance(undone, Refused):
            lines += wrapped(undone.reason, cells, Ink.ALARM)
        else:
            lines += undo_lines(undone, cells)
        if chosen.suspect:
            lines += wrapped("This checkpoint is suspect: its step's metrics were not finite.", cells, Ink.ALARM)
        if not chosen.on_line:
            lines += wrapped("It lies on a lineage that was itself rolled back.", cells, Ink.WARNING)
        lines.append([])
        return lines

    def answer(self) -> Answer | str:
        chosen = self._chosen
        if chosen is None:
            return "there is no checkpoint to go back to"
        arguments: dict[str, Any] = {"checkpoint": chosen.id}
        try:
            skip = whole(self._skip.value or "0", "skip")
            scale = number(self._scale.value or "1", "learning rate x")
        except ValueError as error:
            return str(error)
        if skip < 0 or not 0 < scale <= 1000:
            return "skip must not be negative, and the rate's factor lies above 0 and up to 1000"
        if skip:
            arguments["skip"] = skip
        if scale != 1.0:
            arguments["lr_scale"] = scale
        return "rollback", arguments


def choices(scene: Scene) -> list[CheckpointView]:
    """Where one may go back to: goldens first, then the line in force, then the others; the newest first among each."""
    found = scene.snapshot.checkpoints if scene.snapshot is not None else ()
    return sorted(found, key=lambda c: (not (c.golden and c.on_line), c.suspect, not c.on_line, -c.step, -c.time))


def pick(found: Sequence[CheckpointView], name: str) -> int:
    """The place of the checkpoint an operator means by an id, a step, `golden` or `latest`; the first where it is none."""
    if name == "latest":
        on_line = [c for c in found if c.on_line]
        newest = max(on_line, key=lambda c: (c.step, c.time), default=None)
        return found.index(newest) if newest is not None else 0
    places = [at for at, c in enumerate(found) if c.id == name or (name.isdigit() and c.step == int(name) and c.on_line)]
    return places[0] if places else 0


def unknown(scene: Scene, name: str) -> str:
    """Why an operator's name means no checkpoint; empty where it does."""
    found = choices(scene)
    if not name or name == "latest" or any(c.id == name or (name.isdigit() and c.step == int(name) and c.on_line) for c in found):
        return ""
    if name == "golden":
        return "" if any(c.golden and c.on_line for c in found) else "rollback: no checkpoint on this line is golden (g marks one)"
    near = ", ".join(c.id for c in sorted(found, key=lambda c: c.step)[-4:] if c.on_line)
    return f"rollback: there is no checkpoint {name!r}; the newest: {near or 'none yet'}"


def line(scene: Scene, checkpoint: CheckpointView) -> list[Run]:
    """A checkpoint in one row: mark, id, stage, loss, age."""
    star, dot = ("★", "·") if UNICODE else ("*", ".")
    mark, ink = (star, Ink.GOLD) if checkpoint.golden else ("?", Ink.ALARM) if checkpoint.suspect else (dot, Ink.FAINT)
    ago = age(scene.now - scene.skew - checkpoint.time)
    faint = Ink.TEXT if checkpoint.on_line else Ink.GHOST
    what = " golden" if checkpoint.golden else " SUSPECT" if checkpoint.suspect else "" if checkpoint.on_line else " rolled back"
    return [
        (f"{mark} ", ink),
        (f"{checkpoint.id:<14.14} ", faint),
        (f"step {checkpoint.step:<7,} {checkpoint.stage:<9.9}", Ink.FAINT),
        (f"loss {compact(checkpoint.loss):<7}" if checkpoint.loss is not None else " " * 12, faint),
        (f"{ago:>7} ago", Ink.FAINT),
        (what, ink),
    ]


def undo_lines(undone: UndoReply, cells: int) -> list[Line]:
    """What a rollback would undo, put back, or why it cannot be."""
    lost = [plural(undone.steps, "step"), f"{compact(undone.tokens)} tokens", f"{duration(undone.seconds)} of training"]
    lines: list[Line] = [*wrapped(f"Undoes {DOT.join(lost)}.", cells, Ink.TITLE)]
    lines.append([(f"Goes on from step {undone.step:,}, in {undone.stage}.", Ink.TEXT)])
    if undone.settings:
        lines += wrapped(f"Puts back {'; '.join(undone.settings)}.", cells, Ink.WARNING)
    else:
        lines.append([("No live setting changes.", Ink.FAINT)])
    if undone.problem:
        lines += wrapped(undone.problem, cells, Ink.ALARM)
    return lines
