"""Rolling back: to which checkpoint, past how much data, at what rate; and what that undoes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.events import Key
from textual.widget import Widget

from midwatch.protocol import Alarm, CheckpointView, Refused, UndoQuery, UndoReply
from tui.chart.styles import Ink
from tui.core.chrome import DOT
from tui.core.command_line import number, whole
from tui.core.controller_queries import ControllerQueries
from tui.core.formatting import UNICODE, age, compact, duration, plural
from tui.core.scene import Scene, checkpoint_flags, on_line, speaks_against, stage_spans
from tui.core.text_panel import Line, LineWindow, Panel, Run, wrapped
from tui.dialogs.base import Answer, Dialog, Field

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
    """Shows what would be undone as of the newest snapshot, and sends that with the command: the outcome names any difference."""

    heading = "Roll back"
    deed = "Roll back"

    def __init__(
        self,
        scene: Scene,
        feed: ControllerQueries,
        checkpoint: str = "",
        skip: int = 0,
        lr_scale: float = 1.0,
        crosshair: int | None = None,
    ) -> None:
        """crosshair: a step that the operator points at, which the data may be skipped up to."""
        super().__init__(scene)
        self._feed = feed
        self._choices = choices(scene)
        self._list = LineWindow(choosing=True, id="choices")
        self._wanted = checkpoint
        self._skip = Field(str(skip), id="skip")
        self._scale = Field(f"{lr_scale:g}", id="lr_scale")
        self._bad_step = bad_step(scene, crosshair)
        self._skips_past_bad = False
        """The skip follows the chosen checkpoint, up to and with the bad step."""
        self._undone: dict[str, UndoReply | Refused] = {}
        self._asked_for: object = None

    def parts(self) -> Sequence[Widget]:
        self._list.styles.height = max(1, min(ROWS, len(self._choices)))
        return (self._list,)

    def entries(self) -> Sequence[Widget]:
        return (Named(("Then skip steps of data", self._skip), ("  learning rate x", self._scale)),)

    def begin(self) -> None:
        self._draw_list()
        self._list.choose(pick(self._choices, self._wanted, self.scene))
        self._chosen_changes()

    def refresh_scene(self, scene: Scene) -> None:
        """The run has gone on: the choice and the entries stay, what a rollback would undo is asked anew."""
        before, chosen = self.scene, self._chosen
        self.scene = scene
        self._choices = choices(scene)
        self._draw_list()
        places = [at for at, c in enumerate(self._choices) if chosen is not None and c.id == chosen.id]
        if places:
            self._list.choose(places[0])
        elif chosen is not None:
            self._skips_past_bad = False
            self.lose_choice(f"{chosen.id} was deleted; choose again")
        self._list.styles.height = max(1, min(ROWS, len(self._choices)))
        self.tell()
        if chosen is not None and before.snapshot is not scene.snapshot:
            self._ask()

    def _draw_list(self) -> None:
        self._list.show([line(self.scene, checkpoint) for checkpoint in self._choices])

    def on_line_window_chosen(self, event: LineWindow.Chosen) -> None:
        self._chosen_changes()

    def move(self, by: int) -> None:
        self._list.move(by)
        self._chosen_changes()

    async def take_key(self, event: Key) -> bool:
        if event.key == "b" and self.entry is None:
            self._skip_past_bad()
            return True
        self._skips_past_bad = self._skips_past_bad and self.entry is not self._skip
        return await super().take_key(event)

    @property
    def _chosen(self) -> CheckpointView | None:
        return self._choices[self._list.cursor] if self._choices else None

    def _skip_past_bad(self) -> None:
        """Has the data up to and with the bad step skipped, or none again."""
        self._skips_past_bad = not self._skips_past_bad and self._reaches_bad() > 0
        self._skip.value = str(self._reaches_bad() if self._skips_past_bad else 0)
        self.tell()

    def _reaches_bad(self) -> int:
        """Steps of data from the chosen checkpoint to the bad step, that one included; 0 where no skip reaches it."""
        chosen, bad, snapshot = self._chosen, self._bad_step, self.scene.snapshot
        if chosen is None or bad is None or snapshot is None or not chosen.on_line:
            return 0
        span = next((span for span in stage_spans(snapshot) if span.start < bad <= span.stop), None)
        return bad - chosen.step if span is not None and span.start <= chosen.step < bad else 0

    def _chosen_changes(self) -> None:
        if self._skips_past_bad:
            self._skip.value = str(self._reaches_bad())
        self.tell()
        self._ask()

    def _ask(self) -> None:
        chosen = self._chosen
        if chosen is not None:
            wanted = (chosen.id, self._scale.value, self.scene.snapshot)
            if wanted != self._asked_for:
                self._asked_for = wanted
                self.run_worker(self._learn(chosen.id), exclusive=True)

    async def _learn(self, checkpoint: str) -> None:
        try:
            scale = number(self._scale.value or "1", "learning rate x")
        except ValueError:
            scale = 1.0
        reply = await self._feed.ask(UndoQuery(id=0, checkpoint=checkpoint, lr_scale=scale), UndoReply)
        if checkpoint not in self._undone:
            self.known_since = time.monotonic()
        self._undone[checkpoint] = reply if reply is not None else Refused(reason=self._feed.refusal)
        self.tell()

    def text_changes(self) -> None:
        self.tell()
        self._ask()

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
        lines += self._skip_lines(chosen, cells)
        if against := speaks_against(chosen):
            lines += wrapped(f"Do not trust this checkpoint: {against}.", cells, Ink.ALARM)
        if not chosen.on_line:
            lines += wrapped("It is on a lineage that was itself rolled back.", cells, Ink.WARNING)
        lines.append([])
        return lines

    def _skip_lines(self, chosen: CheckpointView, cells: int) -> list[Line]:
        """Which steps' data is passed over, and how to reach the bad step."""
        lines: list[Line] = []
        try:
            skip = whole(self._skip.value or "0", "skip")
        except ValueError:
            skip = 0
        reach, bad = self._reaches_bad(), self._bad_step or 0
        if not skip and reach:
            lines += wrapped(f"The data of the bad step {bad:,} is trained on again (b: skip it).", cells, Ink.WARNING)
        elif skip > 0:
            first, last = chosen.step + 1, chosen.step + skip
            words = f"The data of step {first:,} is skipped" if skip == 1 else f"The data of steps {first:,} to {last:,} is skipped"
            if reach and last < bad:
                lines += wrapped(f"{words}, but not that of the bad step {bad:,} (b: skip it).", cells, Ink.WARNING)
            else:
                lines += wrapped(f"{words}, including the bad step {bad:,}." if reach else f"{words}.", cells)
        return lines

    def answer(self) -> Answer | str:
        chosen = self._chosen
        if chosen is None:
            return "there is no checkpoint to go back to"
        undone = self._undone.get(chosen.id)
        if undone is None:
            return "wait: what this would undo is not known yet"
        arguments: dict[str, Any] = {"checkpoint": chosen.id}
        try:
            skip = whole(self._skip.value or "0", "skip")
            scale = number(self._scale.value or "1", "learning rate x")
        except ValueError as error:
            return str(error)
        if skip < 0 or not 0 < scale <= 1000:
            return "skip must not be negative, and the learning-rate factor must be above 0 and at most 1000"
        if skip:
            arguments["skip"] = skip
        if scale != 1.0:
            arguments["lr_scale"] = scale
        if isinstance(undone, UndoReply):
            arguments["shown"] = undone.steps
        return "rollback", arguments


def bad_step(scene: Scene, crosshair: int | None = None) -> int | None:
    """The step whose data may be to blame: what the operator points at, else the last of the newest alarm of a rule."""
    if crosshair is not None:
        return crosshair
    alarm = spike(scene)
    return alarm.last_step if alarm is not None else None


def spike(scene: Scene) -> Alarm | None:
    """The newest standing alarm of a watch rule that lies on the line in force."""
    snapshot = scene.snapshot
    if snapshot is None:
        return None
    return next((a for a in snapshot.alarms if a.rule and on_line(snapshot, a.lineage, a.step)), None)


def choices(scene: Scene) -> list[CheckpointView]:
    """Where one may go back to: the line in force, good ones before suspect ones, then the others; the newest first among each."""
    found = scene.snapshot.checkpoints if scene.snapshot is not None else ()
    return sorted(found, key=lambda c: (not c.on_line, not _good(c), -c.step, -c.time))


def _good(checkpoint: CheckpointView) -> bool:
    """Whether nothing speaks against it."""
    return not speaks_against(checkpoint)


def pick(found: Sequence[CheckpointView], name: str, scene: Scene) -> int:
    """The place of the checkpoint an operator means by an id, a step, `golden`, `undone` or `latest`.

    Without a name: the newest good one, from before the alarm where a rule's alarm stands.
    """
    ours = [c for c in found if c.on_line]
    if name == "latest":
        wanted = ours
    elif name == "golden":
        wanted = [c for c in ours if c.golden]
    elif name == "undone":
        wanted = [c for c in found if scene.snapshot is not None and c.id == scene.snapshot.undone]
    elif name:
        wanted = [c for c in found if c.id == name or (name.isdigit() and c.step == int(name) and c.on_line)]
    else:
        alarm = spike(scene)
        good = [c for c in ours if _good(c)]
        before = [c for c in good if alarm is None or alarm.step is None or c.step < alarm.step]
        wanted = before or good
    newest = max(wanted, key=lambda c: (c.step, c.time), default=None)
    return found.index(newest) if newest is not None else 0


def unknown(scene: Scene, name: str) -> str:
    """Why an operator's name means no checkpoint; empty where it does."""
    found = choices(scene)
    if not name or name == "latest" or any(c.id == name or (name.isdigit() and c.step == int(name) and c.on_line) for c in found):
        return ""
    if name == "undone":
        there = scene.snapshot is not None and scene.snapshot.undone
        return "" if there else "rollback: no checkpoint of an undone lineage is left"
    if name == "golden":
        return "" if any(c.golden and c.on_line for c in found) else "rollback: no checkpoint on this line is golden (g marks one)"
    near = ", ".join(c.id for c in sorted(found, key=lambda c: c.step)[-4:] if c.on_line)
    return f"rollback: there is no checkpoint {name!r}; the newest: {near or 'none yet'}"


def line(scene: Scene, checkpoint: CheckpointView) -> list[Run]:
    """A checkpoint in one row: mark, id, stage, loss, age."""
    star, dot = ("★", "·") if UNICODE else ("*", ".")
    mark, ink = (star, Ink.GOLD) if checkpoint.golden else ("?", Ink.ALARM) if speaks_against(checkpoint) else (dot, Ink.FAINT)
    ago = age(scene.now - scene.skew - checkpoint.time)
    faint = Ink.TEXT if checkpoint.on_line else Ink.GHOST
    what = "".join(f" {flag}" for flag in checkpoint_flags(checkpoint)[:1] if flag != "end of stage")
    return [
        (f"{mark} ", ink),
        (f"{checkpoint.id:<14.14} ", faint),
        (f"step {checkpoint.step:<7,} {checkpoint.stage:<9.9}", Ink.FAINT),
        (f"loss {compact(checkpoint.loss):<7} " if checkpoint.loss is not None else " " * 13, faint),
        (f"{ago:>7} ago", Ink.FAINT),
        (what, ink),
    ]


def undo_lines(undone: UndoReply, cells: int) -> list[Line]:
    """What a rollback would undo, put back, or why it cannot be."""
    lost = [plural(undone.steps, "step"), f"{compact(undone.tokens)} tokens", f"{duration(undone.seconds)} of training"]
    lines: list[Line] = [*wrapped(f"Undoes {DOT.join(lost)}.", cells, Ink.TITLE)]
    lines.append([(f"Goes on from step {undone.step:,}, in {undone.stage}.", Ink.TEXT)])
    if undone.settings:
        lines += wrapped(f"Settings: {'; '.join(undone.settings)}.", cells, Ink.WARNING)
    else:
        lines.append([("No live setting changes.", Ink.FAINT)])
    if undone.problem:
        lines += wrapped(undone.problem, cells, Ink.ALARM)
    return lines
