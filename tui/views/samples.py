"""The samples: what the model writes, as it is written, with reward and KL; newest, best, worst, longest or furthest first."""

import re
from collections import OrderedDict

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical

from midwatch.protocol import SampleQuery, SampleReply, SampleView
from tui.chart.formatting import UNICODE, compact, plural
from tui.chart.styles import Ink
from tui.core.keys import FILTER, MOVE, Key, register
from tui.core.scene import Scene
from tui.core.text_panel import Lazy, Line, LineWindow, Panel, Run, cut, fit, spread, wrapped
from tui.views.base import View
from tui.views.chart_data import Fetcher

ORDERS = ("step", "reward", "worst", "longest", "kl")
WORDS = {
    "step": "newest first",
    "reward": "best first",
    "worst": "worst first",
    "longest": "longest first",
    "kl": "furthest from the reference first",
}
WIDE = 140
"""Cells of a screen that shows the chosen one beside the list."""
FEWEST, MORE, MOST = 60, 100, 1000
"""Samples asked for at first, and each time the cursor comes near their end."""
KEPT = 64
"""Whole samples that are not asked for again."""
UNDONE = "×" if UNICODE else "x"
FALLING, RISING = ("▾", "▴") if UNICODE else ("v", "^")


@register(
    "y",
    "samples",
    "what the model writes, with reward and KL: newest, best, worst, longest, furthest",
    place=7,
    keys=(
        FILTER,
        Key(("s",), "s", "sort: newest, best, worst, longest, furthest from the reference first", "sort:next", "sort"),
        Key(("1",), "1", "newest first", "sort:step"),
        Key(("2",), "2", "best first", "sort:reward"),
        Key(("3",), "3", "worst first", "sort:worst"),
        Key(("4",), "4", "longest first", "sort:longest"),
        Key(("5",), "5", "furthest from the reference first", "sort:kl"),
        Key(("enter",), "Enter", "one whole: prompt, response, reward, KL; up and down go to others", "enter", "whole"),
        Key(("f",), "f", "follow the newest", "follow", "follow"),
        Key(("left",), "←", "the stage before, or all", "stage:-1", "stage"),
        Key(("right",), "→", "the next stage, or all", "stage:1"),
        *MOVE,
    ),
)
class SamplesView(View):
    """While the cursor stands on the newest, newer ones come in above; else it stays on its sample."""

    DEFAULT_CSS = """
    SamplesView #samples-both { height: 1fr; }
    SamplesView #samples-side { width: 1fr; }
    SamplesView #samples-head { height: 1; background: $panel; }
    SamplesView #samples-page { width: 1fr; background: $surface; }
    """
    filterable = True

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._head = Panel(id="samples-head")
        self.rows = self._list = LineWindow(choosing=True, id="samples-list")
        self._page = LineWindow(id="samples-page")
        self._scene: Scene | None = None
        self._samples: tuple[SampleView, ...] = ()
        self._total = 0
        self._stages: tuple[str, ...] = ()
        self._order = "step"
        self._stage = ""
        self._pattern = ""
        self._limit = FEWEST
        self._alone = False
        """The chosen one has the whole view."""
        self._paged = ("", False)
        """The sample on the page, and whether it is there whole."""
        self._asking = ""
        """The one that is being asked for whole."""
        self._whole: OrderedDict[str, SampleView] = OrderedDict()
        self._shown_for: object = None
        self._fetcher = Fetcher(self, self._learn)

    def compose(self) -> ComposeResult:
        with Horizontal(id="samples-both"):
            with Vertical(id="samples-side"):
                yield self._head
                yield self._list
            yield self._page

    @property
    def chosen(self) -> SampleView | None:
        at = self._list.cursor
        return self._samples[at] if at < len(self._samples) else None

    @property
    def wide(self) -> bool:
        return self.size.width >= WIDE

    def show(self, scene: Scene) -> None:
        self._scene = scene
        if not self.size.width:
            return
        self.query_one("#samples-side").display = not self._alone
        self._page.display = self._alone or self.wide
        self._draw()
        if scene.link.up and self._needs() != self._shown_for:
            self._fetcher.want()

    def opened(self) -> None:
        self._fetcher.want()

    def settled(self) -> bool:
        chosen = self.chosen
        whole = chosen is None or not self._page.display or chosen.name in self._whole
        return self._shown_for is not None and self._shown_for == self._needs() and not self._fetcher.busy and whole

    def status(self) -> Line:
        of = f" of {self._stage}" if self._stage else ""
        matching = f" matching /{self._pattern}/" if self._pattern else ""
        part = f"; the first {len(self._samples):,} are listed" if len(self._samples) >= MOST else ""
        follow = ""
        if self._order == "step" and self._samples:
            follow = ", following" if self._following else ", held (f follows)"
        undone = f"; {UNDONE} rolled back" if any(not sample.on_line for sample in self._samples) else ""
        return [(f"{plural(self._total, 'sample')}{of}{matching}, {WORDS[self._order]}{follow}{undone}{part}", Ink.FAINT)]

    def set_filter(self, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            return f"/{pattern}: {error}"
        self._pattern = pattern
        self._anew()
        return ""

    def back(self) -> bool:
        if self._alone:
            self._alone = False
            self._arranged()
            return True
        return False

    # Keys

    def do_sort(self, order: str) -> None:
        self._order = ORDERS[(ORDERS.index(self._order) + 1) % len(ORDERS)] if order == "next" else order
        self._anew()

    def do_stage(self, by: str) -> None:
        every = ("", *self._stages)
        at = every.index(self._stage) if self._stage in every else 0
        self._stage = every[(at + int(by)) % len(every)]
        self._anew()

    def do_follow(self) -> None:
        self._order = "step"
        self._alone = False
        self._arranged()
        self._anew()

    def do_enter(self) -> None:
        if self.chosen is not None:
            self._alone = not self._alone
            self._arranged()

    def do_page(self, by: str) -> None:
        (self._page if self._alone else self._list).page(int(by))
        self.moved()

    def do_end(self, which: str) -> None:
        (self._page if self._alone else self._list).to_end(int(which))
        self.moved()

    def moved(self) -> None:
        if self._list.cursor + self._list.size.height >= len(self._samples) and self._samples:
            more = min(MOST, self._total, len(self._samples) + MORE)
            if more > self._limit:
                self._limit = more
                self._fetcher.hurry()
        self._draw()
        self.midwatch.draw_foot()

    def on_line_window_chosen(self, event: LineWindow.Chosen) -> None:
        self.moved()

    # Drawing

    @property
    def _following(self) -> bool:
        return self._order == "step" and self._list.cursor == 0 and not self._alone

    def _arranged(self) -> None:
        """Another part of the view has come into sight: it is drawn when it has its size."""
        if self._scene is not None:
            self.show(self._scene)
            self.call_after_refresh(self.show, self._scene)
            self.midwatch.draw_foot()

    def _anew(self) -> None:
        """Another list: from its beginning."""
        self._limit = FEWEST
        self._list.cursor = self._list.top = 0
        self._samples = ()
        self._fetcher.hurry()
        self._draw()
        self.midwatch.draw_foot()

    def _draw(self) -> None:
        cells = (self.size.width // 2 if self.wide else self.size.width) - 2
        self._head.show([[("  ", Ink.BLANK), *heading(self._order, cells)]])
        if self._samples:
            self._list.show(Lazy(self._samples, lambda sample: row(sample, cells)))
        else:
            self._list.show([[(self._empty(), Ink.FAINT)]])
        if self._page.display:
            self._draw_page()

    def _draw_page(self) -> None:
        chosen = self.chosen
        if chosen is None:
            self._page.show([])
            return
        if chosen.name != self._paged[0]:
            self._page.top = 0
        if chosen.name not in self._whole and chosen.name != self._asking:
            self._asking = chosen.name
            self.run_worker(self._learn_whole(chosen.name), exclusive=True, group="whole")
        whole = self._whole.get(chosen.name, chosen)
        place = f"{self._list.cursor + 1:,} of {self._total:,}, {WORDS[self._order]}"
        cells = self.size.width if self._alone else self.size.width - self.size.width // 2
        paged, self._paged = self._paged, (chosen.name, chosen.name in self._whole)
        self._page.show(page(whole, place, cells, whole=self._paged[1]))
        if paged != self._paged:
            self._page.refresh()  # another text: nothing of the one before stays

    def _empty(self) -> str:
        if self._shown_for is None or self._shown_for != self._needs():
            return "…" if UNICODE else "..."
        if self._pattern or self._stage:
            return "nothing matches"
        return "nothing written yet: rollouts of PPO and GRPO appear here, and the answers to a stage's prompts at its end"

    # Asking

    def _needs(self) -> object:
        snapshot = self._scene.snapshot if self._scene is not None else None
        if snapshot is None:
            return None
        return (snapshot.samples, snapshot.lineage, self._order, self._stage, self._pattern, self._limit, self._cut)

    @property
    def _cut(self) -> int:
        return max(40, self.size.width)

    async def _learn(self) -> None:
        needs = self._needs()
        if needs is None or not self.display:
            return
        question = SampleQuery(
            id=0, order=self._order, limit=self._limit, cut=self._cut, stage=self._stage, pattern=self._pattern  # type: ignore[arg-type]  # one of ORDERS
        )  # fmt: skip
        reply = await self.midwatch.feed.ask(question, SampleReply)
        if reply is None:
            return
        self._shown_for = needs
        self._take(reply)
        self.midwatch.draw_foot()

    async def _learn_whole(self, name: str) -> None:
        reply = await self.midwatch.feed.ask(SampleQuery(id=0, sample=name, limit=1), SampleReply)
        if self._asking == name:
            self._asking = ""
        if reply is not None and reply.samples:
            self._whole[name] = reply.samples[0]
            if len(self._whole) > KEPT:
                self._whole.popitem(last=False)
            self._draw()

    def _take(self, reply: SampleReply) -> None:
        """Shows what has come; the cursor stays on its sample, where on the screen it was, or follows the newest."""
        chosen, row_before = self.chosen, self._list.cursor - self._list.top
        following = self._following
        self._samples, self._total, self._stages = reply.samples, reply.total, reply.stages
        for sample in reply.samples:
            if sample.name in self._whole and self._whole[sample.name].on_line != sample.on_line:
                del self._whole[sample.name]
        if chosen is not None and not following:
            at = next((number for number, sample in enumerate(self._samples) if sample.name == chosen.name), self._list.cursor)
            self._list.top, self._list.cursor = max(0, self._list.top + at - self._list.cursor), at
        self._draw()
        if self._list.cursor - self._list.top != row_before:
            self._list.refresh()


def _figure(value: float | None) -> str:
    """Two decimals, so that a column reads downwards."""
    if value is None:
        return "-"
    return f"{value:.2f}" if abs(value) < 1000 else compact(value)


def heading(order: str, cells: int) -> Line:
    """The names of the columns; the one that sorts has an arrow."""
    names = {"step": "step", "reward": "reward", "kl": "KL", "tokens": "tokens"}
    by = {"worst": "reward", "longest": "tokens"}.get(order, order)
    runs: list[Run] = [(" ", Ink.BLANK)]
    for name, width in (("step", 8), ("reward", 8), ("kl", 8), ("tokens", 8)):
        sign = (RISING if order == "worst" else FALLING) if name == by else ""
        runs.append((f"{names[name] + sign:>{width}}", Ink.TITLE if sign else Ink.FAINT))
    prompt, _ = _shares(cells)
    runs += [("  ", Ink.BLANK), (f"{'prompt':<{prompt}.{prompt}}", Ink.FAINT), ("  response", Ink.FAINT)]
    return cut(runs, cells)


def _shares(cells: int) -> tuple[int, int]:
    """Cells of the prompt and of the response in a row."""
    room = max(0, cells - 37)
    prompt = room * 2 // 5
    return prompt, room - prompt


def row(sample: SampleView, cells: int) -> Line:
    """A sample on a line: figures, then the first words of prompt and response."""
    ink, faint = (Ink.TEXT, Ink.FAINT) if sample.on_line else (Ink.GHOST, Ink.GHOST)
    prompt, response = _shares(cells)
    figures = f"{sample.step:>8,}{_figure(sample.reward):>8}{_figure(sample.kl):>8}"
    tokens = f"{sample.tokens:,}" if sample.tokens is not None else "-"
    return [
        (" " if sample.on_line else UNDONE, ink),
        (figures, ink),
        (f"{tokens:>8}  ", faint),
        *fit([(" ".join(sample.prompt.split()), faint)], prompt),
        ("  ", Ink.BLANK),
        *cut([(" ".join(sample.text.split()), ink)], response),
    ]


def page(sample: SampleView, place: str, cells: int, *, whole: bool) -> list[Line]:
    """A sample whole."""
    figures = [f"reward {compact(sample.reward)}"] if sample.reward is not None else []
    figures += [f"KL {compact(sample.kl)}"] if sample.kl is not None else []
    figures += [plural(sample.tokens, "token")] if sample.tokens is not None else []
    origin = f"{sample.stage}, step {sample.step:,}, lineage {sample.lineage}"
    undone: list[Run] = [("  rolled back", Ink.WARNING)] if not sample.on_line else []
    ink = Ink.TEXT if sample.on_line else Ink.GHOST
    lines: list[Line] = [
        spread([(f" {origin}", Ink.TITLE), *undone], [(f"{place} ", Ink.FAINT)], cells),
        [(f" {'  '.join(figures) or 'no reward'}", Ink.TEXT)],
    ]
    more = "" if whole else (" …" if UNICODE else " ...")
    for name, words, colour in (("prompt", sample.prompt, Ink.ACTIVE), ("response", sample.text + more, ink)):
        lines += [[], [(f" {name}", Ink.FAINT)]]
        for line in words.replace("\r\n", "\n").strip("\n").expandtabs(4).split("\n"):
            indent = min(len(line) - len(line.lstrip(" ")), cells // 2) + 1
            lines += [[(" " * indent, Ink.BLANK), *part] for part in wrapped(line.strip(" "), max(1, cells - indent - 1), colour)]
    return lines
