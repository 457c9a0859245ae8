"""The checkpoints: lineages as a tree, each with its checkpoints; mark, look closer, roll back."""

from collections.abc import Awaitable
from typing import NamedTuple

from textual.app import ComposeResult

from midwatch.protocol import CheckpointView, Lineage, Snapshot, UndoQuery, UndoReply
from tui.chart.formatting import UNICODE, age, compact, plural, size, when
from tui.chart.styles import Ink
from tui.core.keys import MOVE, Key, register
from tui.core.scene import Scene, checkpoint_flags, newest_checkpoint, speaks_against
from tui.core.text_panel import Line, LineWindow, Panel, Run, wrapped
from tui.dialogs.rollback import undo_lines
from tui.views.base import View

DEEPEST = 8
"""Levels that are still indented: a run that crashed a hundred times must fit the screen."""


class TreeRow(NamedTuple):
    """A row of the tree: a lineage's heading, or a checkpoint."""

    depth: int
    last: bool  # of its lineage
    lineage: Lineage | None = None
    checkpoint: CheckpointView | None = None


def tree(snapshot: Snapshot) -> list[TreeRow]:
    """Lineages beneath the checkpoint they fork from, oldest first."""
    rows: list[TreeRow] = []
    known = {line.id for line in snapshot.lineages}

    def add(line: Lineage, depth: int) -> None:
        rows.append(TreeRow(depth, False, lineage=line))
        own = [c for c in snapshot.checkpoints if c.lineage == line.id]
        own.sort(key=lambda c: (c.step, c.time))
        forks = [child for child in snapshot.lineages if child.parent == line.id]
        for checkpoint in own:
            rows.append(TreeRow(depth, checkpoint is own[-1], checkpoint=checkpoint))
            for child in forks:
                if child.fork == checkpoint.id:
                    add(child, depth + 1)
        for child in forks:
            if child.fork not in {checkpoint.id for checkpoint in own}:
                add(child, depth + 1)

    for line in snapshot.lineages:
        if line.parent is None or line.parent not in known:
            add(line, 0)
    return rows


@register(
    "k",
    "checkpoints",
    "lineages as a tree, goldens marked; mark, compare, roll back",
    place=4,
    keys=(
        Key(("enter",), "Enter", "details, and what a rollback to it would undo", "details", "details"),
        *MOVE,
    ),
)
class CheckpointsView(View):
    DEFAULT_CSS = """
    CheckpointsView #details { height: 0; background: $surface; }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.rows = self._list = LineWindow(choosing=True)
        self._details = Panel(id="details")
        self._tree: list[TreeRow] = []
        self._scene: Scene | None = None
        self._detailed = False
        self._undone: dict[str, UndoReply | str] = {}
        self._placed = False

    def compose(self) -> ComposeResult:
        yield self._list
        yield self._details

    @property
    def chosen(self) -> CheckpointView | None:
        at = self._list.cursor
        return self._tree[at].checkpoint if at < len(self._tree) else None

    def show(self, scene: Scene) -> None:
        snapshot = scene.snapshot
        if snapshot is None or not self.size.width:
            return
        before = self.chosen
        self._scene, self._tree = scene, tree(snapshot)
        if self._undone and (not self._detailed or scene.snapshot is None):
            self._undone = {}
        ids = [row.checkpoint.id if row.checkpoint is not None else "" for row in self._tree]
        newest = newest_checkpoint(snapshot)
        wanted = before.id if before is not None else newest.id if newest is not None and not self._placed else ""
        self._list.show([self._line(row, scene, snapshot) for row in self._tree])
        if wanted in ids:
            self._placed = True
            self._list.choose(ids.index(wanted))
        if not snapshot.checkpoints:
            self._list.show([[("no checkpoint yet (c makes one)", Ink.FAINT)]])
        self._tell()

    def settled(self) -> bool:
        return self._placed and self._list.size.height > 0

    def status(self) -> Line:
        if self._scene is None or self._scene.snapshot is None:
            return ()
        found = self._scene.snapshot.checkpoints
        golden = sum(checkpoint.golden for checkpoint in found)
        words = f"{plural(len(found), 'checkpoint')}, {golden} golden, {size(sum(c.bytes for c in found))}"
        return [(words, Ink.FAINT)]

    # Keys

    def do_move(self, by: str) -> None:
        self._list.move(int(by))
        self._skip_headings(int(by))

    def do_page(self, by: str) -> None:
        self._list.page(int(by))
        self._skip_headings(int(by))

    def do_end(self, which: str) -> None:
        self._list.to_end(int(which))
        self._skip_headings(-int(which))

    def _skip_headings(self, by: int) -> None:
        """The cursor stands on checkpoints alone, where there are any."""
        for direction in (by, -by):
            while self.chosen is None and 0 <= self._list.cursor + direction < len(self._tree):
                self._list.move(direction)
        self.moved()

    def moved(self) -> None:
        self._tell()

    def on_line_window_chosen(self, event: LineWindow.Chosen) -> None:
        self._tell()

    def do_details(self) -> None:
        self._detailed = not self._detailed
        self._undone = {}
        self._tell()

    def back(self) -> bool:
        was, self._detailed = self._detailed, False
        self._tell()
        return was

    def give_golden(self) -> None:
        chosen = self.chosen
        if not self._tree:  # not drawn yet: the cursor will stand on the newest
            self.midwatch.steering.give_golden()
        elif chosen is None:
            self.midwatch.say("golden: choose a checkpoint first", Ink.WARNING)
        else:
            self.midwatch.give("ungolden" if chosen.golden else "golden", {"checkpoint": chosen.id})

    def give_rollback(self) -> Awaitable[None] | None:
        chosen = self.chosen
        return self.midwatch.steering.ask_rollback(chosen.id if chosen is not None else "")

    # Drawing

    def _line(self, row: TreeRow, scene: Scene, snapshot: Snapshot) -> list[Run]:
        indent = "  " * min(row.depth, DEEPEST)
        if row.lineage is not None:
            return _heading(row.lineage, indent, scene, snapshot)
        checkpoint = row.checkpoint
        assert checkpoint is not None
        twig = ("└╴" if row.last else "├╴") if UNICODE else ("`-" if row.last else "|-")
        star = "★" if UNICODE else "*"
        against = bool(speaks_against(checkpoint))
        mark, ink = (star, Ink.GOLD) if checkpoint.golden else ("?", Ink.ALARM) if against else (" ", Ink.FAINT)
        main = Ink.TEXT if checkpoint.on_line else Ink.GHOST
        loss = f"loss {compact(checkpoint.loss):<7} " if checkpoint.loss is not None else " " * 13
        ago = age(scene.now - scene.skew - checkpoint.time)
        wide = 16 if self.size.width >= 100 else 12
        return [
            (f"{indent}{twig}", Ink.AXIS),
            (f"{mark} ", ink),
            (f"{checkpoint.id:<{wide}.{wide}} ", main),
            (f"{checkpoint.stage:.9} {checkpoint.stage_step:,}".ljust(15), Ink.FAINT if checkpoint.on_line else Ink.GHOST),
            (loss, main),
            (f"{size(checkpoint.bytes):>7}", Ink.FAINT),
            (f"{ago:>8} ago  ", Ink.FAINT),
            (", ".join(checkpoint_flags(checkpoint)), ink if checkpoint.golden or against else Ink.FAINT),
        ]

    def _tell(self) -> None:
        """The details of the chosen one, where they are asked for."""
        chosen, scene = self.chosen, self._scene
        if not self._detailed or chosen is None or scene is None or scene.snapshot is None:
            self._details.show_all([])
            return
        if chosen.id not in self._undone:
            self._undone[chosen.id] = "asking what a rollback would undo"
            self.run_worker(self._learn(chosen.id), exclusive=True)
        self._details.show_all(_details(chosen, scene, scene.snapshot, self._undone[chosen.id], self.size.width - 2))

    async def _learn(self, checkpoint: str) -> None:
        feed = self.midwatch.feed
        reply = await feed.ask(UndoQuery(id=0, checkpoint=checkpoint), UndoReply)
        self._undone[checkpoint] = reply if reply is not None else feed.refusal
        self._tell()


def _heading(line: Lineage, indent: str, scene: Scene, snapshot: Snapshot) -> list[Run]:
    here = line.id == snapshot.lineage
    what: list[str] = [] if line.cause == "start" else [line.cause]
    what += [f"by {line.author}"] if line.author else []
    what += [f"at step {line.fork_step:,}"] if line.fork else []
    what += [f"skips {plural(line.skip, 'step')} of data"] if line.skip else []
    what += [f"rate x{line.lr_scale:g}"] if line.lr_scale != 1 else []
    what += [when(line.time + scene.skew, scene.now)] if line.time else []
    return [
        (f"{indent}lineage {line.id}", Ink.TITLE if here else Ink.FAINT),
        (" in force" if here else "", Ink.DONE),
        (f"  {', '.join(what)}", Ink.FAINT),
    ]


def _details(chosen: CheckpointView, scene: Scene, snapshot: Snapshot, undone: UndoReply | str, cells: int) -> list[Line]:
    """Facts, the comparison with where the run is, and what a rollback would undo."""
    pad: Run = (" ", Ink.BLANK)
    at = when(chosen.time + scene.skew, scene.now)
    place = f"{chosen.stage} {chosen.stage_step:,}, lineage {chosen.lineage}"
    facts = f"{chosen.id}: step {chosen.step:,}, {place}, {size(chosen.bytes)}, {at}"
    lines: list[Line] = [[pad, (facts, Ink.TITLE)]]
    if against := speaks_against(chosen):
        lines += [[pad, *line] for line in wrapped(f"Do not trust it: {against}", cells, Ink.ALARM)]
    loss = snapshot.latest.get("train/loss")
    newest = newest_checkpoint(snapshot)
    compared = [f"now: step {snapshot.step:,}"]
    if loss is not None and chosen.loss is not None:
        compared.append(f"loss {compact(loss)}, here {compact(chosen.loss)} ({compact(chosen.loss - loss)})")
    if newest is not None and newest.id != chosen.id and newest.loss is not None and chosen.loss is not None:
        compared.append(f"{newest.id} {compact(newest.loss)}")
    lines.append([pad, ("; ".join(compared), Ink.TEXT)])
    if isinstance(undone, str):
        lines += [[pad, *line] for line in wrapped(undone, cells, Ink.FAINT)]
    else:
        lines += [[pad, ("A rollback to it: ", Ink.FAINT), *line] if n == 0 else [pad, *line]
                  for n, line in enumerate(undo_lines(undone, cells - 18))]  # fmt: skip
    return lines
