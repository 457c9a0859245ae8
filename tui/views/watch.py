"""The watch: state and reason, the pipeline, the charts that matter, the machines, the newest events."""

from collections.abc import Sequence
from typing import NamedTuple

from textual.app import ComposeResult
from textual.containers import Grid as Grating

from midwatch.metrics.m4_columns import grid
from midwatch.objectives.build_stage import is_build
from midwatch.protocol import NodeView, Snapshot, StageView
from tui.chart.formatting import UNICODE, age, compact, duration, percent, plural, setting, size
from tui.chart.render import Picture, Series
from tui.chart.sparkline import bar, spark
from tui.chart.styles import Ink
from tui.chart.widget import Chart
from tui.core import chrome
from tui.core.keys import Key, register
from tui.core.scene import Scene, newest_checkpoint, running_span, silence
from tui.core.text_panel import Line, Panel, Run, cut, fit, joined
from tui.views.base import View
from tui.views.chart_data import Fetcher, borders, ghosts, marks, newest_step, short_name, window
from tui.views.headline_charts import Slot, charts_of, slots
from tui.views.nodes.faults import newest_fault


class Layout(NamedTuple):
    """Rows of each part of the view, and the charts' lattice."""

    state: int
    pipeline: int
    nodes: int
    events: int
    across: int
    down: int
    rollout: int = 0


def layout(width: int, height: int, nodes: int, draws: bool = False) -> Layout:
    """What fits; the charts take what the others leave, and go where that is too little."""
    state = 3 if height >= 26 else 1
    pipeline = 0 if height < 6 else 3 if height >= 26 else 2
    machines = 0 if height < 10 else min(nodes, max(1, height // 12))
    events = 0 if height < 12 else min(12, max(3, height // 5))
    rollout = 1 if draws and height >= 6 else 0
    left = height - state - 1 - rollout - pipeline - machines - events
    across = max(1, min(3, width // 38))
    down = max(0, min(2 if across > 1 else 3, left // 8)) if left >= 5 else 0
    return Layout(state, pipeline, machines, events, across, down or (1 if left >= 5 else 0), rollout)


@register(
    "w",
    "watch",
    "pipeline, state, loss, KL and reward, GPUs, newest events",
    place=1,
    keys=(Key(("z",), "z", "charts: this stage, or the whole run", "span", "span"),),
)
class WatchView(View):
    """Charts show the stage that trains, or with `z` the whole run."""

    DEFAULT_CSS = """
    WatchView { layout: vertical; }
    WatchView Panel { height: 1; }
    WatchView #charts { height: 1fr; grid-gutter: 0 1; }
    """

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._scene: Scene | None = None
        self._whole = False
        self._drawn_for: object = None
        self._arranged: tuple[Layout, int] | None = None
        self._fetcher = Fetcher(self, self._fetch)
        self._charts = [Chart(unicode=UNICODE) for _ in range(6)]
        self._state_panel, self._facts_panel, self._pipeline_panel = Panel(), Panel(), Panel()
        self._rollout_panel = Panel()
        self._machines_panel, self._events_panel = Panel(), Panel()

    def compose(self) -> ComposeResult:
        yield self._state_panel
        yield self._facts_panel
        yield self._rollout_panel
        yield self._pipeline_panel
        with Grating(id="charts"):
            yield from self._charts
        yield self._machines_panel
        yield self._events_panel

    def on_chart_resized(self, event: Chart.Resized) -> None:
        self._drawn_for = None
        if self._scene is not None and self.display:
            self._fetcher.hurry()

    def settled(self) -> bool:
        return self._drawn_for is not None and self._drawn_for == self._needs() and not self._fetcher.busy

    def opened(self) -> None:
        self._fetcher.want()

    def do_span(self) -> None:
        self._whole = not self._whole
        self._drawn_for = None
        self._fetcher.hurry()
        self.midwatch.say("charts: the whole run" if self._whole else "charts: the stage that trains")

    # Drawing

    def show(self, scene: Scene) -> None:
        self._scene = scene
        snapshot = scene.snapshot
        width, height = self.size
        if not width or not height:
            return
        drawing = _drawing(snapshot)
        plan = layout(width, height, len(snapshot.nodes) if snapshot is not None else 0, drawing is not None)
        self._arrange(plan, len(self._slots()))
        self._state_panel.show(_state_band(scene, width, plan.state))
        if snapshot is None:
            return
        self._facts_panel.show([_facts(scene, snapshot)])
        self._rollout_panel.show([rollout(scene, snapshot, drawing)] if drawing is not None else [])
        self._pipeline_panel.show(pipeline(snapshot.stages, width, silence(scene) is None)[: plan.pipeline])
        self._machines_panel.show(_machines(snapshot.nodes, width, plan.nodes))
        events = list(reversed(snapshot.events))[: plan.events]
        self._events_panel.show([cut([(" ", Ink.BLANK), *chrome.told(event, scene)], width) for event in events])
        if self._needs() != self._drawn_for:
            self._fetcher.want()

    def _slots(self) -> list[Slot]:
        snapshot = self._scene.snapshot if self._scene is not None else None
        if snapshot is None:
            return []
        return slots(snapshot.latest, charts_of(snapshot), snapshot.settings)

    def _arrange(self, plan: Layout, wanted: int) -> None:
        shown = min(max(1, wanted), plan.across * plan.down, len(self._charts))
        across = min(plan.across, max(1, shown))
        key = (plan, shown)
        if key == self._arranged:
            return
        self._arranged = key
        panels = (
            (self._state_panel, plan.state),
            (self._rollout_panel, plan.rollout),
            (self._pipeline_panel, plan.pipeline),
            (self._machines_panel, plan.nodes),
            (self._events_panel, plan.events),
        )
        for panel, rows in panels:
            panel.styles.height = rows
        lattice = self.query_one("#charts")
        lattice.display = shown > 0
        lattice.styles.grid_size_columns = across
        lattice.styles.grid_size_rows = max(1, -(-shown // across))
        for number, chart in enumerate(self._charts):
            chart.display = number < shown
        self._drawn_for = None

    def _needs(self) -> object:
        """What the charts depend on: they are asked for again when it changes."""
        snapshot = self._scene.snapshot if self._scene is not None else None
        if snapshot is None or self._scene is None:
            return None
        golden = tuple(c.id for c in snapshot.checkpoints if c.golden)
        return (snapshot.step, snapshot.lineage, snapshot.stage, snapshot.state, len(snapshot.checkpoints), golden,
                snapshot.settings.get("kl_coef"), self._scene.link.up)  # fmt: skip

    async def _fetch(self) -> None:
        scene = self._scene
        if scene is None or scene.snapshot is None or not self.display:
            return
        snapshot, needs = scene.snapshot, self._needs()
        running = running_span(snapshot)
        start, stop = 0, max(1, newest_step(snapshot) + 1)
        if running is not None and not self._whole and snapshot.step > running.start:
            start = running.start
        charts = [chart for chart in self._charts if chart.display]
        for chart, slot in zip(charts, self._slots(), strict=False):
            await self._fetch_one(chart, slot, snapshot, start, stop)
        if not self._slots() or not snapshot.latest:
            for chart in charts:
                chart.show(Picture("loss", grid(0, 1, max(1, chart.dots)), empty=_nothing_yet(snapshot)))
        if scene.link.up:
            self._drawn_for = needs

    async def _fetch_one(self, chart: Chart, slot: Slot, snapshot: Snapshot, start: int, stop: int) -> None:
        dots = chart.dots
        if dots <= 0 or not snapshot.latest:
            return
        feed = self.midwatch.feed
        if start and slot.metrics[0].startswith(("train/", "perf/")):
            start += 1  # the step on the border was the last one of the stage before
        found = [c for c in await feed.all_columns(list(slot.metrics), start, stop, dots) if c is not None]
        if not found:
            return
        past = []
        for lineage in ghosts(snapshot):
            past += [c for c in await feed.all_columns(list(slot.metrics[:1]), start, stop, dots, lineage) if c is not None]
        smooth = window(start, stop) if len(slot.metrics) == 1 else 0
        chart.show(
            Picture(
                slot.title,
                found[0].grid,
                tuple(Series(c, short_name(c.series) if len(found) > 1 else "", smooth) for c in found),
                ghosts=tuple(Series(c) for c in past),
                borders=borders(snapshot),
                marks=marks(snapshot),
                empty="none in this stage yet",
            )
        )


def _nothing_yet(snapshot: Snapshot) -> str:
    return "no steps yet" if snapshot.state != "building" else "no steps yet: the data is being built"


def _state_band(scene: Scene, width: int, rows: int) -> list[Line]:
    """The state in a word, its reason beside it; with air around it where there is room."""
    words = chrome.state_words(scene)
    snapshot = scene.snapshot
    line: list[Run] = (
        [(" ", Ink.BLANK), chrome.state_badge(scene, snapshot), ("  ", Ink.BLANK), *words] if snapshot is not None else words
    )
    return [[], cut(line, width), []] if rows >= 3 else [cut(line, width)]


def _drawing(snapshot: Snapshot | None) -> StageView | None:
    """The stage that trains, where it learns from responses that it draws."""
    running = running_span(snapshot) if snapshot is not None else None
    return running.stage if running is not None and running.stage.updates else None


def rollout(scene: Scene, snapshot: Snapshot, stage: StageView) -> Line:
    """The phases of a rollout with the seconds of the last one; of the one under way those so far before them; the KL after it."""
    latest = snapshot.latest
    update = latest.get("perf/update_seconds")
    seconds = {
        "generating": latest.get("perf/generate_seconds"),
        "scoring": latest.get("perf/score_seconds"),
        "training": update * stage.updates if update is not None else None,
    }
    parts: list[Line] = []
    for phase, last in seconds.items():
        words = "updating" if phase == "training" else phase
        took = f"{last:.1f}" if last is not None else "-"
        if snapshot.phase == phase and snapshot.state == "training":
            since = max(0.0, scene.now - scene.skew - snapshot.phase_since) if snapshot.phase_since else 0.0
            number = f" {stage.step % stage.updates + 1}/{stage.updates}" if phase == "training" and stage.updates > 1 else ""
            parts.append([("▸" if UNICODE else ">", Ink.ACTIVE), (f"{words}{number} {since:.1f}/{took} s", Ink.ACTIVE)])
        else:
            parts.append([(f"{words} ", Ink.FAINT), (took, Ink.TEXT), (" s", Ink.FAINT)])
    if (kl := latest.get("policy/kl_sequence")) is not None:
        target = f" (target {setting(stage.kl_target)})" if stage.kl_target is not None else ""
        parts.append([("KL ", Ink.FAINT), (compact(kl), Ink.TEXT), (target, Ink.FAINT)])
    if (coefficient := snapshot.settings.get("kl_coef")) is not None:
        parts.append([("kl ", Ink.FAINT), (compact(coefficient), Ink.TEXT)])
    return [(" ", Ink.BLANK), *joined(parts)]


DRAWN = (
    ("policy/reward", "reward", ""),
    ("held-out", "held-out", ""),
    ("policy/entropy", "entropy", ""),
    ("policy/response_length", "length", ""),
    ("policy/truncated_fraction", "cut off", "%"),
)
"""What rollouts add to the figures."""
OTHER = (("policy/kl", "KL", ""), ("policy/reward", "reward", ""), ("preference/margin", "margin", ""))


def _facts(scene: Scene, snapshot: Snapshot) -> Line:
    """The newest figures in one line."""
    latest = dict(snapshot.latest)
    if drawing := _drawing(snapshot):
        held_out = [latest[name] for source in drawing.mixture if (name := f"eval/{source}/reward") in latest]
        latest |= {"held-out": sum(held_out) / len(held_out)} if held_out else {}
        latest |= (
            {"policy/truncated_fraction": 100 * latest["policy/truncated_fraction"]}
            if "policy/truncated_fraction" in latest
            else {}
        )
    parts: list[Line] = []
    for name, label, unit in (
        ("train/loss", "loss", ""),
        *(DRAWN if drawing else OTHER),
        ("train/lr", "lr", ""),
        ("train/grad_norm", "grad", ""),
        ("perf/tokens_per_second", "", " tokens/s"),
    ):
        if name in latest:
            parts.append([(f"{label} " if label else "", Ink.FAINT), (compact(latest[name]), Ink.TEXT), (unit, Ink.FAINT)])
    if snapshot.tokens:
        parts.append([(compact(snapshot.tokens), Ink.TEXT), (" tokens", Ink.FAINT)])
    newest = newest_checkpoint(snapshot)
    if newest is not None:
        star = ("★" if UNICODE else "*") if newest.golden else ""
        ago = age(scene.now - scene.skew - newest.time)
        parts.append(
            [("checkpoint ", Ink.FAINT), (f"{newest.id}{star}", Ink.TEXT), (f" {ago} ago" if ago != "now" else "", Ink.FAINT)]
        )
    return [(" ", Ink.BLANK), *joined(parts)] if parts else []


SIGNS: dict[str, tuple[str, str, Ink]] = {
    "waiting": (" ", " ", Ink.FAINT),
    "running": ("▸", ">", Ink.ACTIVE),
    "done": ("✓", "*", Ink.DONE),
    "cut short": ("⊣", "/", Ink.WARNING),
    "failed": ("✗", "X", Ink.ALARM),
}


def pipeline(stages: Sequence[StageView], width: int, current: bool = True) -> list[Line]:
    """The stages side by side, each with its progress, and beneath it what it has taken or has left.

    Where they do not all fit, those around the one that runs. Not `current`: the time left is not known any more.
    """
    if not stages:
        return [[], []]
    fitting = max(1, width // 14)
    shown = list(stages)
    if len(shown) > fitting:
        running = next((number for number, stage in enumerate(shown) if stage.state == "running"), 0)
        first = max(0, min(running - 1, len(shown) - fitting))
        shown = shown[first : first + fitting]
    cells = (width - 1) // len(shown)
    bars: list[Run] = [(" ", Ink.BLANK)]
    times: list[Run] = [(" ", Ink.BLANK)]
    for stage in shown:
        unicode, ascii, ink = SIGNS[stage.state]
        label = f"{unicode if UNICODE else ascii}{stage.name} "[: cells - 2]
        part = stage.step / stage.steps if stage.steps else 0.0
        bars += fit([(label, ink), *bar(part, cells - len(label) - 2, UNICODE, ink)], cells)
        times += fit([("  ", Ink.BLANK), (_progress(stage, current), Ink.TEXT if stage.state == "running" else Ink.FAINT)], cells)
    return [bars, times]


def _progress(stage: StageView, current: bool) -> str:
    if stage.state == "running":
        left = f" {duration(stage.seconds_left)} left" if current and stage.seconds_left is not None else ""
        return f"{percent(stage.step, stage.steps)}{left}"
    if stage.state == "waiting":
        return plural(stage.steps, "step") if not is_build(stage.objective) else "waiting"
    took = duration(stage.seconds) if stage.seconds >= 1 else stage.note
    return f"{stage.state} {took}" if stage.state != "done" else took or "done"


def _machines(nodes: Sequence[NodeView], width: int, rows: int) -> list[Line]:
    """A line for each node; for the last one with room, how many more there are."""
    if not nodes or rows <= 0:
        return []
    shown: list[Line] = [cut(_machine(node, width), width) for node in nodes[:rows]]
    if len(nodes) > rows:
        away = sum(node.state in ("out of reach", "gone") for node in nodes[rows:])
        more = f" and {plural(len(nodes) - rows, 'more node')}" + (f", {away} out of reach" if away else "")
        shown[-1] = cut([*cut(_machine(nodes[rows - 1], width), width - len(more)), (more, Ink.FAINT)], width)
    return shown


def _machine(node: NodeView, width: int) -> Line:
    """GPUs where there are any; else CPUs and memory, said as such."""
    name: list[Run] = [(f" {node.name[:18]} ", Ink.TITLE)]
    if node.state != "up":
        name.append((f" {node.state.upper()} ", Ink.BADGE_HOLD))
    stats = node.stats
    if stats is None:
        return [*name, (" no figures yet", Ink.FAINT)]
    strip = max(8, min(64, width // 4))
    parts: list[Line] = []
    if stats.gpus:
        busy = [gpu.utilisation if gpu.utilisation is not None else float("nan") for gpu in stats.gpus]
        known = [part for part in busy if part == part]
        parts.append([(f"{len(stats.gpus)} GPUs ", Ink.FAINT), *spark(busy, strip, 0, 1, UNICODE, "min")])
        if known:
            parts.append([(f"{sum(known) / len(known):.0%}", Ink.TEXT), (" busy", Ink.FAINT)])
        used = sum(gpu.memory_used or 0 for gpu in stats.gpus)
        total = sum(gpu.memory_total or 0 for gpu in stats.gpus)
        if total:
            parts.append([("memory ", Ink.FAINT), (f"{size(used)} of {size(total)}", Ink.TEXT)])
        hottest = max((gpu.temperature for gpu in stats.gpus if gpu.temperature is not None), default=None)
        if hottest is not None:
            parts.append([("hottest ", Ink.FAINT), (f"{hottest:.0f} °C" if UNICODE else f"{hottest:.0f} C", Ink.TEXT)])
        power = sum(gpu.power or 0 for gpu in stats.gpus)
        if power:
            parts.append([(f"{power:,.0f} W", Ink.TEXT)])
        faulty, newest = newest_fault(node, stats.time)
        if faulty:
            parts.insert(0, [("! " if not UNICODE else "✗ ", Ink.ALARM), (f"{faulty} faulty: {newest}", Ink.ALARM)])
    else:
        average = sum(stats.cpus) / len(stats.cpus) if stats.cpus else 0.0
        parts.append([(f"{len(stats.cpus)} CPUs ", Ink.FAINT), *spark(stats.cpus, strip, 0, 1, UNICODE)])
        parts.append([(f"{average:.0%}", Ink.TEXT)])
        parts.append([("memory ", Ink.FAINT), (f"{size(stats.memory_used)} of {size(stats.memory_total)}", Ink.TEXT)])
        parts.append([(stats.gpu_note or "no GPU", Ink.FAINT)])
        if stats.rank_rss:
            parts.append([("ranks ", Ink.FAINT), (size(sum(stats.rank_rss)), Ink.TEXT)])
    if stats.disk_free is not None:
        parts.append([("disk free ", Ink.FAINT), (size(stats.disk_free), Ink.TEXT)])
    return joined([name, *parts])
