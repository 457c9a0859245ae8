"""The report of a build as a page: what was read, what each step took away, what is left, and samples of what went."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from shards.build.filter_stats import Count, Funnel, Sample
from shards.build.report import BuildReport, SourceReport
from shards.commands.output import short, size
from shards.common.terminal import make_console

BAR = 16  # cells; a line with a rule's long name still fits 80 columns
SHOWN = 160  # characters of a sample


def page(report: BuildReport, samples: int) -> RenderableType:
    """All of it; `samples`: of each reason."""
    parts: list[RenderableType] = []
    if len(report.sources) > 1:
        tokens = sum(source.tokens for source in report.sources)
        whole = sum(source.text_bytes for source in report.sources)
        parts += [Text("All sources", style="bold"), _funnel(report.total(), tokens, whole), Text()]
    for name, said in report.models.items():
        parts.append(Text.assemble((name, "bold"), f"  {said}", overflow="fold"))
    if report.models:
        parts.append(Text())
    for source in report.sources:
        parts += _source(source, samples)
    return Group(*parts)


def write_html(report: BuildReport, path: Path, samples: int) -> None:
    """The same page as a file for a browser."""
    console = make_console(record=True, width=120, file=io.StringIO(), force_terminal=True)
    console.print(page(report, samples))
    path.write_text(console.export_html(inline_styles=True), encoding="utf-8")


def _source(source: SourceReport, samples: int) -> Iterator[RenderableType]:
    yield Text.assemble((source.name, "bold"), (f"  {source.origin}", "dim"), overflow="fold")
    yield _funnel(source.funnel, source.tokens, source.text_bytes)
    for title, counts in (("removed", source.funnel.reasons), ("changed", source.funnel.changed), *source.funnel.told.items()):
        if counts:
            yield _counts(title, counts)
    if source.rejected:
        yield _counts("left out, in rejected.jsonl", {reason: Count(count) for reason, count in source.rejected.items()})
    if source.notes:
        yield _counts("kept, but", {note: Count(count) for note, count in source.notes.items()})
    if samples and source.funnel.samples:
        yield Text("samples of what was removed", style="dim")
        for reason, found in sorted(source.funnel.samples.items()):
            yield Padding(Group(*_samples(reason, found[:samples])), (0, 0, 0, 2))
    yield Text()


def _funnel(funnel: Funnel, tokens: int, text_bytes: int) -> Table:
    """A row for what was there after each step. Tokens before encoding are estimated by the bytes that one takes in the end."""
    table = Table(box=None, pad_edge=False)
    for name in ("after", "documents", "text", "tokens", "of all text"):
        table.add_column(name, justify="left" if name in ("after", "of all text") else "right", no_wrap=True)
    counts = list(funnel.steps.items())
    most = counts[0][1].bytes if counts else 0
    each = text_bytes / tokens if tokens else 0.0
    for step, count in counts:
        share = count.bytes / most if most else 0.0
        bar = "━" * min(BAR, round(share * BAR))  # what is made can be more than what was read
        about = f"~{short(count.bytes / each)}" if each else "-"
        table.add_row(step, f"{count.documents:,}", size(count.bytes), about, f"{bar:<{BAR}} {share:>6.1%}")
    table.add_row("encoded", "", size(text_bytes), f"{tokens:,}", "", style="bold")
    return table


def _counts(title: str, counts: dict[str, Count]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column(title, overflow="fold")
    table.add_column("documents", justify="right")
    sized = any(count.bytes for count in counts.values())
    if sized:
        table.add_column("text", justify="right")
    for reason, count in sorted(counts.items(), key=lambda item: (-item[1].documents, item[0])):
        table.add_row(reason, f"{count.documents:,}", *([size(count.bytes)] if sized else []))
    return table


def _samples(reason: str, samples: list[Sample]) -> Iterator[RenderableType]:
    yield Text(reason, style="yellow")
    for sample in samples:
        said = "" if sample.reason == reason else f", {sample.reason}"
        if place := f"{sample.where}{said}".removeprefix(", "):
            yield Text(place, style="dim", overflow="fold")
        text = " ".join(sample.text.split())
        yield Padding(Text(text[:SHOWN] + ("..." if len(text) > SHOWN else ""), overflow="fold"), (0, 0, 0, 2))
