"""The logs: every rank's, node's and the controller's; one file at a time, followed, filtered. Only lines in sight are drawn."""

import re

from textual.app import ComposeResult

from midwatch.protocol import LogQuery, LogReply
from tui.chart.formatting import plural
from tui.chart.styles import Ink
from tui.core.keys import FILTER, MOVE, READ, Key, register
from tui.core.scene import Scene
from tui.core.text_panel import Lazy, Line, Panel, joined
from tui.views.chart_data import Fetcher
from tui.views.reader import ReaderView

FIRST = 10_000
"""Lines asked for at a time; the newest so many first."""
RELIST = 10
"""Rounds of questions between two looks for new files."""
MOST = 500_000
"""Lines kept; older ones are let go."""
_ALARM = re.compile(r"\b(ERROR|CRITICAL|FATAL|Traceback|Error:|Exception)\b|^\w*Error\b")
_WARNING = re.compile(r"\b(WARN|WARNING)\b")
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


@register(
    "l",
    "logs",
    "every rank, node and the controller, searchable",
    place=9,
    keys=(
        FILTER,
        Key(("left",), "←", "the file before", "file:-1", "file"),
        Key(("right",), "→", "the next file", "file:1"),
        Key(("f",), "f", "follow the end, or hold", "follow", "follow"),
        *READ,
        *MOVE,
    ),
)
class LogsView(ReaderView):
    """Home goes back to the file's beginning, which is fetched then."""

    DEFAULT_CSS = "LogsView #files { height: 1; background: $panel; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._heading = Panel(id="files")
        self._files: tuple[str, ...] = ()
        self._file = ""
        self._offset = -1
        self._whole = False
        self._rounds = 0
        self._all: list[str] = []
        self._shown: list[str] = []
        self._pattern: re.Pattern[str] | None = None
        self._fetcher = Fetcher(self, self._learn)

    def compose(self) -> ComposeResult:
        yield self._heading
        yield from super().compose()

    def show(self, scene: Scene) -> None:
        self._draw_heading()
        if scene.link.up:
            self._fetcher.want()

    def settled(self) -> bool:
        return self._offset >= 0 and bool(self._list.lines)

    def status(self) -> Line:
        pattern = f" matching /{self._pattern.pattern}/" if self._pattern is not None else ""
        older = "" if self._whole or len(self._all) < FIRST else "; Home reads it from its beginning"
        return [(f"{plural(len(self._shown), 'line')}{pattern}, {self.place_words()}{older}", Ink.FAINT)]

    def set_filter(self, pattern: str) -> str:
        try:
            self._pattern = re.compile(pattern, re.IGNORECASE) if pattern else None
        except re.error as error:
            return f"/{pattern}: {error}"
        self._refilter()
        return ""

    def do_file(self, by: str) -> None:
        if self._files:
            at = self._files.index(self._file) if self._file in self._files else 0
            self._choose(self._files[(at + int(by)) % len(self._files)])

    def do_end(self, which: str) -> None:
        super().do_end(which)
        if which == "-1" and self.rows is self._list and not self._whole and len(self._all) >= FIRST:
            self._offset, self._whole = 0, True
            self._all = self._shown = []
            self._list.following = False
            self._fetcher.hurry()

    async def open_stacks(self) -> None:
        """The newest file of hung ranks' stacks."""
        listed = await self.midwatch.feed.ask(LogQuery(id=0), LogReply)
        if listed is None:
            self.midwatch.say("stacks: the controller is out of reach")
            return
        self._files = listed.files
        stacks = [file for file in self._files if is_stacks(file)]
        if stacks:
            self._choose(max(stacks, key=lambda file: file.rpartition("/")[2].partition("-")[2].partition("-")[2]))
            self._list.following = False
        else:
            self.midwatch.say("no rank has hung: there are no stacks")

    def _choose(self, file: str) -> None:
        self._file, self._offset, self._whole = file, -1, False
        self._all = self._shown = []
        self._list.following = True
        self._redraw()
        self._fetcher.hurry()

    def _refilter(self) -> None:
        found = self._pattern
        self._shown = self._all if found is None else [line for line in self._all if found.search(line)]
        self._redraw()

    def _redraw(self) -> None:
        nothing = "nothing in it matches" if self._all else "nothing in it so far"
        empty: list[Line] = [[(f" {self._file}: {nothing}", Ink.FAINT)]] if self._file and self._offset >= 0 else []
        self.show_lines(Lazy(self._shown, _inked) if self._shown else empty)
        self._draw_heading()
        self.midwatch.draw_foot()

    def _draw_heading(self) -> None:
        at = self._files.index(self._file) if self._file in self._files else 0
        first = max(0, min(at - 1, len(self._files) - 4))
        parts = [[(f" {name} ", Ink.HERE if name == self._file else Ink.FAINT)] for name in self._files[first : first + 8]]
        place = f" {at + 1} of {len(self._files)} " if self._files else " no logs yet "
        self._heading.show([[(place, Ink.FAINT), *joined(parts, "")]])

    async def _learn(self) -> None:
        feed = self.midwatch.feed
        if not self._files or self._rounds % RELIST == 0:
            listed = await feed.ask(LogQuery(id=0), LogReply)
            self._files = listed.files if listed is not None else self._files
        self._rounds += 1
        if not self._file and self._files:
            self._file = next((name for name in self._files if name.endswith("/0.log")), self._files[0])
        while self._file:
            file, offset = self._file, self._offset
            reply = await feed.ask(LogQuery(id=0, file=file, offset=offset, lines=FIRST), LogReply)
            if reply is None or file != self._file:
                break
            if offset >= 0 and reply.offset < offset:  # the file was begun anew
                self._offset = -1
                self._all = self._shown = []
                continue
            self._take([_ESCAPES.sub("", line).expandtabs(4) for line in reply.lines])
            self._offset = reply.offset
            if len(reply.lines) < FIRST or offset < 0:
                break
        self._redraw()

    def _take(self, lines: list[str]) -> None:
        if not lines:
            return
        if len(self._all) + len(lines) > MOST:
            self._all = self._all[len(lines) - MOST :]
        self._all.extend(lines)
        if self._pattern is None:
            self._shown = self._all
        else:
            found = self._pattern
            self._shown.extend(line for line in lines if found.search(line))


def is_stacks(file: str) -> bool:
    """Whether a log is what was written down of ranks that hung: `NODE/hang-GENERATION-TIME.txt`."""
    return file.rpartition("/")[2].startswith("hang-")


def _inked(line: str) -> Line:
    """A line in the ink of its level, whose letter stands before it."""
    if _ALARM.search(line):
        return [("A ", Ink.ALARM), (line, Ink.ALARM)]
    if _WARNING.search(line):
        return [("W ", Ink.WARNING), (line, Ink.WARNING)]
    return [("  ", Ink.BLANK), (line, Ink.TEXT)]
