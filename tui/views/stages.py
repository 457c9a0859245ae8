"""The stages: what each is, costs, learned and was made from; what the model wrote at its end."""

from textual.app import ComposeResult

from midwatch.objectives.build_stage import is_build
from midwatch.protocol import Sampled, Snapshot, StageView, TextQuery, TextReply
from tui.chart.formatting import UNICODE, compact, duration, percent, plural, setting
from tui.chart.sparkline import bar
from tui.chart.styles import Ink
from tui.core.keys import MOVE, register
from tui.core.scene import Scene, silence
from tui.core.text_panel import Line, LineWindow, Run, wrapped
from tui.views.base import View
from tui.views.watch import SIGNS

SAMPLES = 3
"""Of each stage, the newest."""
ARROW = "→" if UNICODE else "->"


@register(
    "t",
    "stages",
    "objective, mixture, cost, held-out losses, samples; advance",
    place=5,
    keys=MOVE,
)
class StagesView(View):
    """A list of the stages above, the chosen one in full below; on a wide screen side by side."""

    DEFAULT_CSS = """
    StagesView #stage-list { height: auto; max-height: 50%; }
    StagesView #stage { height: 1fr; background: $surface; }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.rows = self._list = LineWindow(choosing=True, id="stage-list")
        self._detail = LineWindow(id="stage")
        self._scene: Scene | None = None
        self._samples: tuple[Sampled, ...] = ()
        self._sampled_for: object = None
        self._placed = False

    def compose(self) -> ComposeResult:
        yield self._list
        yield self._detail

    def show(self, scene: Scene) -> None:
        self._scene = scene
        snapshot = scene.snapshot
        if snapshot is None or not self.size.width:
            return
        self._list.styles.height = max(1, min(len(snapshot.stages), self.size.height // 2))
        self._list.show([_row(stage, self.size.width - 2, silence(scene) is None) for stage in snapshot.stages])
        if not self._placed:
            self._placed = True
            running = [number for number, stage in enumerate(snapshot.stages) if stage.state != "waiting"]
            self._list.choose(running[-1] if running else 0)
        self._tell()
        needs = tuple(stage.state for stage in snapshot.stages)
        if needs != self._sampled_for and scene.link.up:
            self._sampled_for = needs
            self.run_worker(self._learn(), exclusive=True)

    def opened(self) -> None:
        self._sampled_for = None

    def moved(self) -> None:
        self._tell()

    def on_line_window_chosen(self, event: LineWindow.Chosen) -> None:
        self._tell()

    def do_page(self, by: str) -> None:
        self._detail.page(int(by))

    def settled(self) -> bool:
        return bool(self._samples)

    def status(self) -> Line:
        return [(f"the chosen stage: {self._detail.place()} (PgUp, PgDn)", Ink.FAINT)]

    async def _learn(self) -> None:
        reply = await self.midwatch.feed.ask(TextQuery(id=0, what="samples"), TextReply)
        if reply is not None:
            self._samples = reply.samples
            self._tell()

    def _tell(self) -> None:
        snapshot = self._scene.snapshot if self._scene is not None else None
        if snapshot is None or self._list.cursor >= len(snapshot.stages):
            return
        stage = snapshot.stages[self._list.cursor]
        written = [sample for sample in self._samples if sample.stage == stage.name]
        self._detail.show(details(stage, snapshot, written, max(20, self.size.width - 2)))


def _row(stage: StageView, cells: int, current: bool) -> list[Run]:
    unicode, ascii, ink = SIGNS[stage.state]
    part = stage.step / stage.steps if stage.steps else 0.0
    unit = "%" if is_build(stage.objective) else ""
    steps = f"{stage.step:,}{unit}/{stage.steps:,}{unit}"
    spent = duration(stage.seconds) if stage.seconds else "-"
    left = f"{duration(stage.seconds_left)} left" if current and stage.seconds_left is not None else stage.state
    room = max(4, cells - 66)
    return [
        (f"{unicode if UNICODE else ascii} {stage.name:<12.12} ", ink),
        (f"{stage.objective:<9.9}", Ink.FAINT),
        *bar(part, room, UNICODE, ink),
        (f"{percent(stage.step, stage.steps):>5}", Ink.TEXT),
        (f"{steps:>15}", Ink.FAINT),
        (f"{spent:>8}", Ink.FAINT),
        (f"  {left}", Ink.TEXT if stage.state == "running" else Ink.FAINT),
    ]


def details(stage: StageView, snapshot: Snapshot, samples: list[Sampled], cells: int) -> list[Line]:
    """One stage in full."""
    lines: list[Line] = [[(f" {stage.name}", Ink.TITLE), (f"  {stage.objective}, {stage.state}", Ink.TEXT)]]

    def fact(name: str, words: str) -> None:
        for number, line in enumerate(wrapped(words, cells - 14)):
            lines.append([(f" {name if number == 0 else '':<12} ", Ink.FAINT), *line])

    if is_build(stage.objective):
        fact("doing", stage.note or "-")
        fact("took", duration(stage.seconds) if stage.seconds else "-")
        return lines
    fact("shape", f"context {stage.context:,}, {plural(stage.global_batch, 'sample')} a step, lr {setting(stage.lr)}")
    total = sum(stage.mixture.values()) or 1.0
    fact("mixture", ", ".join(f"{name} {weight / total:.0%}" for name, weight in stage.mixture.items()) or "-")
    fact("cost", f"{stage.step:,} of {plural(stage.steps, 'step')}, {compact(stage.tokens)} tokens, {duration(stage.seconds)}")
    product = stage.product or ("under way" if stage.state == "running" else "-")
    fact("made from", f"{stage.origin or 'the beginning'} {ARROW} {product}")
    for number, (name, (first, latest)) in enumerate(stage.losses.items()):
        change = f"{first:.3f} {ARROW} {latest:.3f} ({latest - first:+.3f})"
        lines.append([(f" {'held-out' if number == 0 else '':<12} ", Ink.FAINT), (f"{name:<14} ", Ink.TEXT), (change, Ink.TEXT)])
    if stage.state == "running" and snapshot.settings:
        fact("in force", ", ".join(f"{key} {setting(value)}" for key, value in snapshot.settings.items()))
    if snapshot.settings_asked and stage.state == "running":
        fact("asked for", ", ".join(f"{key} {setting(value)}" for key, value in snapshot.settings_asked.items()))
    for sample in samples[-SAMPLES:]:
        lines += [[], [(f" written at step {sample.step:,}", Ink.FAINT)]]
        lines += [[(" ", Ink.BLANK), *line] for line in wrapped(sample.prompt, cells - 2, Ink.ACTIVE)]
        lines += [[(" ", Ink.BLANK), *line] for line in wrapped(sample.text.strip("\n"), cells - 2)]
    return lines
