"""Answers to what screens ask: charts, rows, the journal, logs, what a rollback would undo."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from pathlib import Path

from launcher.controller.core.checkpoints import Commits
from launcher.controller.core.context import ControllerContext
from launcher.controller.core.snapshot import SnapshotBuilder
from midwatch import protocol as p
from midwatch.metrics.m4_columns import LineageSegment
from midwatch.recipe import Recipe
from midwatch.recipe.live_settings import KEPT_ACROSS_STAGES, stage_settings

MOST_LOG_BYTES = 4 * 1024 * 1024
"""Read of a log for one query."""


class Queries:
    """Read-only; a question that cannot be answered is refused with the reason."""

    def __init__(self, context: ControllerContext, commits: Commits, view: SnapshotBuilder) -> None:
        self._context, self._commits, self._view = context, commits, view

    async def answer(self, question: p.Message) -> p.Message:
        """Raises ProtocolError for what is no question."""
        number = getattr(question, "id", 0)
        try:
            match question:
                case p.ChartQuery():
                    return await asyncio.to_thread(self._chart, question)
                case p.MetricsQuery():
                    return await asyncio.to_thread(self._metrics, question)
                case p.JournalQuery():
                    return self._journal(question)
                case p.LogQuery():
                    return await asyncio.to_thread(self._log, question)
                case p.UndoQuery():
                    return self._undo(question)
                case p.SampleQuery():
                    return await asyncio.to_thread(self._samples, question)
                case p.TextQuery():
                    return self._text(question)
        except (ValueError, OSError, re.error) as error:
            return p.Refused(id=number, reason=str(error))
        raise p.ProtocolError(f"a client may not send a {type(question).__name__}")

    def _chart(self, query: p.ChartQuery) -> p.ChartReply:
        if not 0 < query.width <= 10_000 or query.start < 0 or query.stop <= query.start:
            raise ValueError(f"a chart of steps {query.start} to {query.stop} in {query.width} columns cannot be drawn")
        path = self._context.ledger.path() if query.lineage is None else [LineageSegment(query.lineage, -1, None)]
        columns = self._context.metrics.columns(query.metric, path, query.start, query.stop, query.width)
        return p.ChartReply(id=query.id, columns=columns.encode())

    def _metrics(self, query: p.MetricsQuery) -> p.MetricsReply:
        metrics = self._context.metrics
        path = self._context.ledger.path()
        rows = {
            name: tuple(
                p.MetricRow(lineage=r.lineage, step=r.step, tokens=r.tokens, time=r.time, value=r.value)
                for r in metrics.last(name, min(query.last, 100_000), path)
            )
            for name in query.names
        }
        return p.MetricsReply(id=query.id, names=tuple(s.name for s in metrics.names()), rows=rows)

    def _journal(self, query: p.JournalQuery) -> p.JournalReply:
        lines = self._view.journal()
        limit = max(1, min(query.limit, 5000))
        found = lines[-limit:] if query.after < 0 else [line for line in lines if line.index > query.after][:limit]
        return p.JournalReply(id=query.id, lines=tuple(found))

    def _log(self, query: p.LogQuery) -> p.LogReply:
        root = self._context.paths.logs
        found = (*root.rglob("*.log"), *root.rglob("hang-*.txt"))
        files = tuple(sorted(str(f.relative_to(root)) for f in found if f.is_file()))
        if not query.file:
            return p.LogReply(id=query.id, files=files)
        if query.file not in files:
            raise ValueError(f"there is no log {query.file!r} (there are: {', '.join(files)})")
        lines, offset = read_log(root / query.file, query.offset, max(1, min(query.lines, 10_000)), query.pattern)
        return p.LogReply(id=query.id, files=files, lines=tuple(lines), offset=offset)

    def _samples(self, query: p.SampleQuery) -> p.SampleReply:
        if query.offset < 0 or query.limit < 1:
            raise ValueError(f"{query.limit} samples from the {query.offset}th on are none")
        ledger = self._context.ledger
        return self._context.samples.find(query, ledger.path(), tuple(ledger.samples))

    def _undo(self, query: p.UndoQuery) -> p.UndoReply:
        context = self._context
        found = self._commits.find(query.checkpoint)
        if isinstance(found, str):
            raise ValueError(found)
        at = context.metrics.row_near("train/loss", context.ledger.path(), found.step)
        now = context.ledger.settings
        then = settings_after(context.recipe, found, query.lr_scale)
        changed = [f"{k} {now[k]:g} -> {v:g}" for k, v in then.items() if k in now and now[k] != v]
        return p.UndoReply(
            id=query.id,
            checkpoint=found.id,
            step=found.step,
            stage=found.stage,
            steps=max(0, context.live.step - found.step),
            tokens=max(0, context.live.tokens - (at.tokens if at is not None and found.step else 0)),
            seconds=max(0.0, context.live.step_time - (at.time if at is not None else context.live.step_time)),
            settings=tuple(changed),
        )

    def _text(self, query: p.TextQuery) -> p.TextReply:
        if query.what == "samples":
            return p.TextReply(id=query.id, samples=tuple(self._context.ledger.samples[-200:]))
        return p.TextReply(id=query.id, text=self._context.paths.recipe.read_text(encoding="utf-8"))


def settings_after(recipe: Recipe, checkpoint: p.CheckpointView, lr_scale: float) -> dict[str, float]:
    """The live settings in force after a rollback to a checkpoint: those that it holds, or the next stage's where it ends one."""
    stage = recipe.stage_index(checkpoint.stage)
    settings = dict(checkpoint.settings or stage_settings(recipe, recipe.stage[stage]))
    if checkpoint.ended and stage + 1 < len(recipe.stage):
        kept = {key: settings[key] for key in KEPT_ACROSS_STAGES if key in settings}
        settings = stage_settings(recipe, recipe.stage[stage + 1]) | kept
    if "lr_scale" in settings:
        settings["lr_scale"] *= lr_scale
    return settings


def read_log(file: Path, offset: int, limit: int, pattern: str) -> tuple[list[str], int]:
    """Whole lines of a log and the byte after them: the newest `limit` where `offset` is negative, else those from there on."""
    matches = re.compile(pattern).search if pattern else None
    with file.open("rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        start = max(0, size - MOST_LOG_BYTES) if offset < 0 else min(offset, size)
        stream.seek(start)
        content = stream.read(MOST_LOG_BYTES)
    if offset >= 0:
        return _lines_on(content, start, limit, matches)
    end = content.rfind(b"\n") + 1
    first = content.find(b"\n") + 1 if start > 0 else 0
    lines = content[first:end].decode("utf-8", errors="replace").splitlines()
    if matches is not None:
        lines = [line for line in lines if matches(line)]
    return lines[-limit:], start + end


def _lines_on(content: bytes, start: int, limit: int, matches: Callable[[str], object] | None) -> tuple[list[str], int]:
    """The first `limit` whole lines that match, and the byte after the last one looked at."""
    lines: list[str] = []
    for raw in content.split(b"\n")[:-1]:
        if len(lines) == limit:
            break
        start += len(raw) + 1
        line = raw.decode("utf-8", errors="replace").rstrip("\r")
        if matches is None or matches(line):
            lines.append(line)
    return lines, start
