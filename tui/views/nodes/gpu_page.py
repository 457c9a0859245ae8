"""One GPU in full: its node, its rank and process, what is wrong in words, its figures and their last minutes. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

from midwatch.protocol import Gpu, NodeView
from tui.chart.formatting import UNICODE, age, duration, percent, plural, size
from tui.chart.sparkline import spark
from tui.chart.styles import Ink
from tui.core.scene import Scene
from tui.core.text_panel import Line, Run, cut, joined, wrapped
from tui.views.nodes.faults import History, faults_of, straggler_words
from tui.views.nodes.table import DEGREES, GRAVE, MARKS, SLOW, STALE, Fleet, rank_at

NAME, VALUE = 17, 24


def page(fleet: Fleet, node: NodeView, kind: str, place: int, history: History, scene: Scene, cells: int) -> list[Line]:
    """The lines of one unit's page."""
    stats = node.stats
    gpu = stats.gpus[place] if stats is not None and kind == "GPU" and place < len(stats.gpus) else None
    rank = rank_at(node, kind, place)
    title = f" {node.name}" if not kind else f" {node.name} {kind} {rank if kind == 'rank' and rank is not None else place}"
    about = "  ".join(part for part in (gpu.name, gpu.bus) if part) if gpu is not None else ""
    lines: list[Line] = [[(title, Ink.TITLE), (f"  {about}", Ink.FAINT)], _node_line(node, scene)]
    if node.note:
        lines += [[(" " * NAME, Ink.BLANK), *line] for line in wrapped(node.note, max(10, cells - NAME - 1), Ink.WARNING)]
    lines.append(_rank_line(node, rank, scene))
    for mark, words, ink in _wrong(fleet, gpu, rank, scene, kind):
        for number, line in enumerate(wrapped(words, max(10, cells - NAME - 3), ink)):
            lines.append(
                [(f" {'wrong' if number == 0 else '':<{NAME - 1}}", Ink.FAINT), (f"{mark if number == 0 else ' '} ", ink), *line]
            )
    if gpu is None:
        lines += _node_figures(node, history, cells)
    else:
        lines += _figures(gpu, node, place, history, cells)
        lines += _processes(gpu)
    if history.seconds >= 1:
        lines.append([(f" {'':<{NAME - 1}}strips: the last {duration(history.seconds)}", Ink.FAINT)])
    return [cut(line, cells) for line in lines]


def _named(name: str, *runs: Run) -> list[Run]:
    return [(f" {name:<{NAME - 1}}", Ink.FAINT), *runs]


def _node_line(node: NodeView, scene: Scene) -> Line:
    ink = Ink.TEXT if node.state == "up" else Ink.WARNING
    last = node.first_rank + node.ranks - 1
    parts: list[Line] = [[(node.state, ink)]]
    parts += [[(f"ranks {node.first_rank} to {last}" if node.ranks > 1 else f"rank {last}", Ink.TEXT)]] if node.ranks else []
    parts += [[(plural(node.failures, "failure"), Ink.WARNING)]] if node.failures else []
    stats = node.stats
    if stats is not None and node.state in ("out of reach", "gone"):
        old = age(max(0.0, scene.now - scene.skew - stats.time))
        parts.append([(f"its figures are {old} old" if old != "now" else "its figures are its last", Ink.WARNING)])
    if stats is not None and stats.disk_free is not None:
        parts.append([("disk free ", Ink.FAINT), (size(stats.disk_free), Ink.TEXT)])
    return _named("node", *joined(parts, ", "))


def _rank_line(node: NodeView, rank: int | None, scene: Scene) -> Line:
    if rank is None:
        return _named("rank", ("none", Ink.FAINT))
    beat = next((beat for beat in node.stats.ranks if beat.rank == rank), None) if node.stats is not None else None
    if beat is None:
        return _named("rank", (f"{rank}", Ink.TEXT))
    parts: list[Line] = [[(f"{rank}, process {beat.pid}", Ink.TEXT)]]
    if beat.time and node.stats is not None:
        parts.append(
            [(f"at step {beat.step:,} {age(max(0.0, node.stats.time - beat.time))} ago".replace("now ago", "now"), Ink.TEXT)]
        )
    if beat.own:
        parts.append([(f"{1000 * beat.own:.0f} ms of its own a step", Ink.TEXT)])
    return _named("rank", *joined(parts, ", "))


def _wrong(fleet: Fleet, gpu: Gpu | None, rank: int | None, scene: Scene, kind: str) -> list[tuple[str, str, Ink]]:
    """Each fault with its letter; that there is none, where there is none."""
    found: list[tuple[str, str, Ink]] = []
    for fault in faults_of(gpu) if gpu is not None else []:
        mark = MARKS.get(fault.kind, STALE if fault.kind == "stale" else "?")
        now = scene.now - scene.skew
        ago = f" ({age(now - fault.time)} ago)".replace("now ago", "now") if fault.time else ""
        found.append((mark, fault.text + ago, Ink.ALARM if mark in GRAVE else Ink.WARNING))
    if gpu is not None and gpu.stale is not None and not any(mark == STALE for mark, _, _ in found):
        found.append((STALE, f"its figures are {duration(max(0.0, scene.now - scene.skew - gpu.stale))} old", Ink.WARNING))
    straggler = fleet.slow.get(rank) if rank is not None else None
    if straggler is not None:
        found.append((SLOW, f"slow: {straggler_words(straggler.own, straggler.median)}", Ink.WARNING))
    return found or [(" ", "nothing that it tells of" if kind == "GPU" else "nothing known", Ink.FAINT)]


def _figures(gpu: Gpu, node: NodeView, place: int, history: History, cells: int) -> list[Line]:
    none = ("no figure", Ink.FAINT)

    def row(name: str, key: str, told: str, low: float | None = None, high: float | None = None) -> Line:
        if not told:
            return _named(name, none)
        strip = spark(history.of(node.name, place, key), max(8, cells - NAME - VALUE - 2), low, high, UNICODE) if key else []
        return [*_named(name, (f"{told:<{VALUE}} ", Ink.TEXT)), *strip]

    def part(value: float | None) -> str:
        return f"{value:.0%}" if value is not None else ""

    memory = ""
    if gpu.memory_used is not None and gpu.memory_total:
        memory = f"{size(gpu.memory_used)} of {size(gpu.memory_total)}, {percent(gpu.memory_used, gpu.memory_total)}"
    power = f"{gpu.power:.0f} W" + (f" of {gpu.power_limit:.0f} W" if gpu.power_limit else "") if gpu.power is not None else ""
    slows = f", slows at {gpu.slowdown:.0f}" if gpu.slowdown is not None else ""
    heat = f"{gpu.temperature:.0f} {DEGREES}{slows}" if gpu.temperature is not None else ""
    clock = f"{gpu.clock:,} MHz" + (f" of {gpu.clock_most:,}" if gpu.clock_most else "") if gpu.clock is not None else ""
    rows = [
        row("utilisation", "utilisation", part(gpu.utilisation), 0, 1),
        row("memory", "memory", memory, 0, 1),
        row("power", "power", power, 0, gpu.power_limit),
        row("temperature", "temperature", heat, 20, 100),
        row("SM activity", "sm", part(gpu.sm), 0, 1),
        row("tensor activity", "tensor", part(gpu.tensor), 0, 1),
        row("own time a step", "step", _own(node, place)),
        row("clock", "", clock),
    ]
    links = gpu.links
    return [*rows, row("NVLinks up", "", f"{links[0]} of {links[1]}")] if links is not None else rows


def _own(node: NodeView, place: int) -> str:
    rank = rank_at(node, "GPU", place)
    beats: Sequence[float] = [beat.own for beat in node.stats.ranks if beat.rank == rank] if node.stats is not None else ()
    return f"{1000 * beats[0]:.0f} ms" if beats and beats[0] else ""


def _processes(gpu: Gpu) -> list[Line]:
    lines: list[Line] = []
    for number, process in enumerate(gpu.processes):
        whose = f"rank {process.rank}" if process.rank is not None else "not of this run"
        memory = f", {size(process.memory)}" if process.memory is not None else ""
        ink = Ink.TEXT if process.rank is not None else Ink.WARNING
        lines.append(_named("processes" if number == 0 else "", (f"{process.pid}: {whose}{memory}", ink)))
    return lines


def _node_figures(node: NodeView, history: History, cells: int) -> list[Line]:
    """Of a node without GPUs, said as such."""
    stats = node.stats
    if stats is None:
        return [_named("figures", ("none yet", Ink.FAINT))]
    strip = max(8, min(64, cells - NAME - VALUE - 2))
    average = sum(stats.cpus) / len(stats.cpus) if stats.cpus else 0.0
    lines: list[Line] = [
        _named("GPUs", (stats.gpu_note or "none", Ink.FAINT)),
        [
            *_named("CPUs", (f"{f'{len(stats.cpus)}, {average:.0%} busy':<{VALUE}} ", Ink.TEXT)),
            *spark(stats.cpus, strip, 0, 1, UNICODE),
        ],
        _named("memory", (f"{size(stats.memory_used)} of {size(stats.memory_total)}", Ink.TEXT)),
    ]
    for number, beat in enumerate(sorted(stats.ranks, key=lambda beat: beat.rank)):
        resident = f", {size(stats.rank_rss[number])}" if number < len(stats.rank_rss) else ""
        told = f"{beat.rank}: process {beat.pid}{resident}"
        own = f"{1000 * beat.own:.0f} ms a step " if beat.own else ""
        past = spark(history.of(node.name, number, "step"), strip, None, None, UNICODE)
        lines.append([*_named("ranks" if number == 0 else "", (f"{told:<{VALUE}} ", Ink.TEXT), (own, Ink.TEXT)), *past])
    return lines
