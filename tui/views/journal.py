"""The journal: who did what, when, and what came of it."""

import re

from textual.app import ComposeResult

from launcher.protocol import JournalLine, JournalQuery, JournalReply
from tui import frame
from tui.chart.ink import Ink
from tui.panel import Lazy, Line, Rows
from tui.scene import Scene
from tui.views.base import View

BATCH = 2000


class JournalView(View):
    """Asks for what is new when the snapshot tells of it; follows the end until the operator scrolls up."""

    filterable = True

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.rows = self._list = Rows(following=True)
        self._scene: Scene | None = None
        self._all: list[JournalLine] = []
        self._shown: list[JournalLine] = []
        self._pattern: re.Pattern[str] | None = None
        self._asking = False

    def compose(self) -> ComposeResult:
        yield self._list

    def show(self, scene: Scene) -> None:
        self._scene = scene
        newest = scene.snapshot.events[-1].index if scene.snapshot is not None and scene.snapshot.events else -1
        known = self._all[-1].index if self._all else -1
        if newest > known and not self._asking and scene.link.up:
            self._asking = True
            self.run_worker(self._learn())
        self._redraw()

    def settled(self) -> bool:
        return bool(self._all) and not self._asking

    def status(self) -> Line:
        pattern = f" matching /{self._pattern.pattern}/" if self._pattern is not None else ""
        follow = "following" if self._list.following else f"held at {self._list.place()} (f follows)"
        return [(f"{len(self._shown):,} entries{pattern}, {follow}", Ink.FAINT)]

    def set_filter(self, pattern: str) -> str:
        try:
            self._pattern = re.compile(pattern, re.IGNORECASE) if pattern else None
        except re.error as error:
            return f"/{pattern}: {error}"
        self._shown = [line for line in self._all if self._matches(line)]
        self._redraw()
        return ""

    def do_follow(self) -> None:
        self._list.following = not self._list.following
        self._redraw()
        self.midwatch.draw_foot()

    def moved(self) -> None:
        self.midwatch.draw_foot()

    def _matches(self, line: JournalLine) -> bool:
        return self._pattern is None or bool(self._pattern.search(f"{line.kind} {line.author} {line.level} {line.text}"))

    def _redraw(self) -> None:
        scene = self._scene
        if scene is not None:
            self._list.show(Lazy(self._shown, lambda line: [(" ", Ink.BLANK), *frame.told(line, scene)]))

    async def _learn(self) -> None:
        """All entries after the last known one."""
        try:
            while True:
                after = self._all[-1].index if self._all else -1
                question = JournalQuery(id=0, after=after, limit=BATCH)
                reply = await self.midwatch.feed.ask(question, JournalReply)
                if reply is None or not reply.lines:
                    break
                self._all += reply.lines
                self._shown += [line for line in reply.lines if self._matches(line)]
                if after < 0 or len(reply.lines) < BATCH:
                    break
        finally:
            self._asking = False
        self._redraw()
        self.midwatch.draw_foot()
