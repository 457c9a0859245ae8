"""The journal: who did what, when, and what came of it."""

import re

from midwatch.protocol import JournalLine, JournalQuery, JournalReply
from tui.chart.formatting import plural
from tui.chart.styles import Ink
from tui.core import chrome
from tui.core.keys import FILTER, MOVE, READ, Key, register
from tui.core.scene import Scene
from tui.core.text_panel import Lazy, Line
from tui.views.reader import ReaderView

BATCH = 2000


@register(
    "j",
    "journal",
    "who did what, when, and what came of it",
    place=10,
    keys=(FILTER, Key(("f",), "f", "follow the end, or hold", "follow", "follow"), *READ, *MOVE),
)
class JournalView(ReaderView):
    """Asks for what is new when the snapshot tells of it; follows the end until the operator scrolls up."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._scene: Scene | None = None
        self._all: list[JournalLine] = []
        self._shown: list[JournalLine] = []
        self._pattern: re.Pattern[str] | None = None
        self._asking = False

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
        return [(f"{plural(len(self._shown), 'entry', 'entries')}{pattern}, {self.place_words()}", Ink.FAINT)]

    def set_filter(self, pattern: str) -> str:
        try:
            self._pattern = re.compile(pattern, re.IGNORECASE) if pattern else None
        except re.error as error:
            return f"/{pattern}: {error}"
        self._shown = [line for line in self._all if self._matches(line)]
        self._redraw()
        return ""

    def _matches(self, line: JournalLine) -> bool:
        return self._pattern is None or bool(self._pattern.search(f"{line.kind} {line.author} {line.level} {line.text}"))

    def _redraw(self) -> None:
        scene = self._scene
        if scene is not None:
            self.show_lines(Lazy(self._shown, lambda line: [(" ", Ink.BLANK), *chrome.told(line, scene)]))

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
