"""Draws up the snapshot that screens show, from the ledger and what is live."""

from __future__ import annotations

import statistics
from pathlib import Path

import msgspec

from launcher.controller.core.context import ControllerContext, Node
from midwatch.commands import describe
from midwatch.journal import entries as j
from midwatch.metrics.m4_columns import LineageSegment
from midwatch.objectives.build_stage import BUILD, is_build
from midwatch.protocol import CheckpointView, JournalLine, NodeView, Snapshot, StageView
from midwatch.recipe import Stage, stage_inputs
from midwatch.words import plural
from shards.common.errors import ShardError
from shards.sampling.mixing import parts, shares

EVENTS = 12
ENDED_COMMANDS = 8
ALARMS = 50
"""Standing alarms that screens are sent, the newest."""


class SnapshotBuilder:
    """Keeps what is costly to work out between two snapshots."""

    def __init__(self, context: ControllerContext) -> None:
        self._context = context
        self._lines: list[JournalLine] = []
        self._read = 0
        self._ends: dict[int, int] = {}
        self._mixtures: dict[str, dict[str, float]] = {}
        self._losses: dict[tuple[str, int], dict[str, tuple[float, float]]] = {}

    def journal(self) -> list[JournalLine]:
        """All entries that an operator should see, oldest first."""
        entries = self._context.journal.entries
        while self._read < len(entries):
            term, entry = entries[self._read]
            line = line_of(self._context, self._read, term, entry)
            if line is not None:
                self._lines.append(line)
            self._read += 1
        return self._lines

    def snapshot(self) -> Snapshot:
        context = self._context
        ledger, live = context.ledger, context.live
        stages = self._stages()
        left = [s.seconds_left for s in stages if s.state in ("running", "waiting")]
        commands = [context.as_durable(c) for c in ledger.commands.values()]
        ended = [c for c in commands if c.state not in ("queued", "sent")][-ENDED_COMMANDS:]
        checkpoints = [
            msgspec.structs.replace(c, missing=c.id in ledger.missing, doubt=ledger.doubt(c)) for c in ledger.checkpoints.values()
        ]
        return Snapshot(
            run=context.recipe.run.name,
            directory=str(context.paths.root),
            state=ledger.state,
            reason=ledger.reason,
            phase=live.phase.phase if live.phase is not None else "",
            time=context.clock(),
            started=ledger.started,
            term=context.term,
            generation=ledger.generation,
            lineage=ledger.lineage,
            world=ledger.world if ledger.generation_live else 0,
            step=live.step,
            total_steps=self._total_steps(stages),
            tokens=live.tokens,
            stage=next((s.name for s in stages if s.state == "running"), ""),
            seconds_left=sum(s for s in left if s is not None) if left and None not in left else None,
            stages=tuple(stages),
            lineages=tuple(ledger.lineages.values()),
            checkpoints=tuple(sorted(checkpoints, key=lambda c: (c.step, c.time))),
            commands=(*ended, *(c for c in commands if c.state in ("queued", "sent"))),
            nodes=self._nodes(),
            latest=dict(live.latest),
            settings=ledger.settings,
            settings_asked=ledger.asked,
            events=tuple(self.journal()[-EVENTS:]),
            changes=ledger.changes,
            dropped=live.dropped,
            refused_peers=live.refused_peers,
            stragglers=live.stragglers,
            samples=context.samples.taken + len(ledger.samples),
            phase_since=live.phase_since,
            faults=tuple(fault for fault in (context.journal_fault, live.storage_fault) if fault),
            undone=undone.id if isinstance(undone := ledger.find("undone"), CheckpointView) else "",
            left_at=self._left_at(),
            heard=live.heard,
            step_seconds=statistics.median(live.step_seconds) if live.step_seconds else None,
            alarms=tuple(ledger.standing_alarms()[:ALARMS]),
        )

    def _left_at(self) -> dict[int, int]:
        """Kept for each lineage that has been left: it takes no further step."""
        ledger, metrics = self._context.ledger, self._context.metrics
        found: dict[int, int] = {}
        for line in ledger.lineages:
            if line == ledger.lineage:
                self._ends.pop(line, None)
                continue
            if line not in self._ends:
                newest = metrics.latest("train/loss", [LineageSegment(line, -1, None)])
                self._ends[line] = newest.step if newest is not None else ledger.lineages[line].fork_step
            found[line] = self._ends[line]
        return found

    def _nodes(self) -> tuple[NodeView, ...]:
        ledger = self._context.ledger
        order = {name: i for i, name in enumerate(ledger.generation_nodes)} if ledger.generation_live else {}
        return tuple(self._node(node, order.get(node.name)) for node in self._context.live.nodes.values())

    def _node(self, node: Node, place: int | None) -> NodeView:
        """`place`: among the nodes of the living generation."""
        ledger, cluster = self._context.ledger, self._context.recipe.cluster
        record, used = ledger.node(node.name), place is not None
        state: str = "up" if node.reachable and (used or cluster.backend == "local") else "spare" if node.reachable else "gone"
        if record.mark != "in use":
            state = record.mark
        elif not node.reachable:
            state = "out of reach" if used else "starting" if node.stats is None and not node.problem else "gone"
        return NodeView(
            name=node.name,
            state=state,  # type: ignore[arg-type]  # one of the literals above
            ranks=cluster.ranks_per_node if used or cluster.backend == "local" else 0,
            first_rank=place * cluster.ranks_per_node if place is not None else 0,
            failures=record.failures,
            note=record.reason if record.mark != "in use" else node.problem,
            stats=node.stats,
        )

    def _total_steps(self, stages: list[StageView]) -> int:
        return sum(s.step if s.state in ("done", "cut short") else s.steps for s in stages if not is_build(s.objective))

    def _stages(self) -> list[StageView]:
        context = self._context
        current = context.live.phase.stage if context.live.phase is not None else ""
        views = [self._data_stage()]
        source, stages = context.recipe.model.source, context.recipe.stage
        products: dict[str, str] = {}
        pace = statistics.median(context.live.step_seconds) if context.live.step_seconds else None
        for index, stage in enumerate(stages):
            base = stage_inputs.base(stages, index, products)
            view = self._stage(stage, current, source if base is None else products.get(stages[base].name, source), pace)
            if view.product is not None:
                products[stage.name] = view.product
            views.append(view)
        return views

    def _data_stage(self) -> StageView:
        context = self._context
        seconds = context.ledger.data_seconds
        if seconds is not None:
            note = "built" if seconds else "was there already"
            return StageView(name="data", objective=BUILD, state="done", step=100, steps=100, seconds=seconds, note=note)
        part, note = context.live.building
        began = context.live.building_since
        spent = context.clock() - began if began else 0.0
        state = "failed" if context.state == "failed" else "running"
        left = spent / part - spent if part > 0.02 else None
        return StageView(
            name="data",
            objective=BUILD,
            state=state,  # type: ignore[arg-type]  # one of the two literals above
            step=int(100 * part),
            steps=100,
            seconds=spent,
            seconds_left=left,
            note=note,
        )

    def _stage(self, stage: Stage, current: str, origin: str | None, pace: float | None) -> StageView:
        context = self._context
        record = context.ledger.stage_record(stage.name)
        running = stage.name == current
        step, seconds, left = 0, 0.0, None
        state = "waiting"
        phase = context.live.phase
        if (
            running
            and phase is not None
            and not (record is not None and record.ended is not None and record.stage_steps >= stage.steps)
        ):
            state = "running"
            first = record.first_step if record is not None else context.live.step - phase.stage_step
            step = max(0, min(stage.steps, context.live.step - first))
            seconds = context.clock() - record.began if record is not None else 0.0
            left = pace * (stage.steps - step) if pace is not None else None
        elif record is not None and record.ended is not None:
            state = "done" if record.stage_steps >= stage.steps else "cut short"
            step, seconds = record.stage_steps, record.ended - record.began
        elif record is not None and record.began:
            state = "running"
            step = max(0, min(stage.steps, context.live.step - record.first_step))
            seconds = context.clock() - record.began
        return StageView(
            name=stage.name,
            objective=stage.objective,
            state=state,  # type: ignore[arg-type]  # one of the literals above
            step=step,
            steps=stage.steps,
            context=stage.context,
            global_batch=stage.global_batch,
            mixture=self._mixture(stage),
            lr=stage.lr,
            seconds=seconds,
            seconds_left=left if state == "running" else None,
            tokens=step * stage.global_batch * stage.context,
            product=record.product if record is not None and state in ("done", "cut short") else None,
            origin=origin,
            losses=self._stage_losses(stage, state) if record is not None else {},
            updates=stage.updates_drawn if stage.draws else 0,
            kl_target=stage.rollout_settings.kl_target if stage.draws else None,
        )

    def _mixture(self, stage: Stage) -> dict[str, float]:
        """Its weights, or, where they are by tokens, the shares that come of them, once the data is there."""
        context = self._context
        if stage.mixture_by == "weight" or context.ledger.data_seconds is None or context.recipe.data.dir is None:
            return stage.mixture
        if stage.name not in self._mixtures:
            try:
                self._mixtures[stage.name] = shares(Path(context.recipe.data.dir), stage.mixture, stage.mixing)
            except ShardError:  # of what a stage is still to make nothing is known
                return stage.mixture
        return self._mixtures[stage.name]

    def _stage_losses(self, stage: Stage, state: str) -> dict[str, tuple[float, float]]:
        """First and newest held-out loss of each source within the stage, on the line in force."""
        context = self._context
        record = context.ledger.stage_record(stage.name)
        if record is None:
            return {}
        key = (stage.name, context.ledger.lineage)
        if key in self._losses and state in ("done", "cut short"):
            return self._losses[key]
        losses = {}
        path = context.ledger.path()
        stop = (record.last_step if record.last_step is not None and state != "running" else context.live.step) + 1
        for source in [part for name in stage.sources for part in parts(Path(context.recipe.data.dir or "."), name)]:
            # The row at a later stage's border is the end of the stage before it; what this one found there has its own name.
            first = record.first_step
            rows = context.metrics.rows(f"eval/{source}/loss", path, first + (first > 0), stop, 10_000)
            before = context.metrics.rows(f"eval/{source}/loss_before", path, first, first + 1, 1)
            found = [float(row["value"]) for row in (*before, *rows)]
            if found:
                losses[source] = (found[0], found[-1])
        if state in ("done", "cut short"):
            self._losses[key] = losses
        return losses


def line_of(context: ControllerContext, index: int, term: int, entry: j.Entry) -> JournalLine | None:
    """The entry in an operator's words; None for what only the machine needs."""
    told = _tell(context, entry)
    if told is None:
        return None
    kind, text, level = told
    return JournalLine(index=index, time=entry.time, term=term, kind=kind, author=entry.author, text=text, level=level)  # type: ignore[arg-type]  # a level


def _tell(context: ControllerContext, entry: j.Entry) -> tuple[str, str, str] | None:
    match entry:
        case j.TermBegan():
            return "controller", f"term {entry.term} began on {entry.host}", "info"
        case j.RunBegan():
            return "run", f"{entry.name} began", "info"
        case j.StateChanged():
            return (
                "state",
                entry.state + (f": {entry.reason}" if entry.reason else ""),
                "alarm" if entry.state == "failed" else "info",
            )
        case j.DataBuilt():
            return "data", f"built in {entry.seconds:.0f} s" if entry.seconds else "was there already", "info"
        case j.GenerationBegan():
            source = f"from {entry.checkpoint}" if entry.checkpoint else "from the beginning"
            return "ranks", f"generation {entry.generation}: {plural(entry.world, 'rank')}, {source}", "info"
        case j.NodeMarked():
            reason = f": {entry.reason}" if entry.reason else ""
            return "node", f"{entry.node} is {entry.mark}{reason}", "info" if entry.mark == "in use" else "warning"
        case j.NodeFailed():
            return "node", f"{entry.node} failed: {entry.reason}", "alarm"
        case j.GenerationEnded():
            return "ranks", f"generation {entry.generation} ended at step {entry.step}: {entry.cause}", "info"
        case j.CommandAccepted():
            return "command", f"#{entry.number} {describe(entry.verb, entry.arguments)}", "info"
        case j.CommandEnded():
            return _tell_outcome(context, entry)
        case j.LineageOpened():
            line = entry.lineage
            since = f"from {line.fork}" if line.fork else "from the beginning"
            # Of a rollback that ranks carry out it is not known yet how many steps it undoes: its outcome says so.
            undone = f", {plural(entry.undone, 'step')} undone" if entry.undone and line.cause == "crash" else ""
            skip = f", {plural(line.skip, 'step')} of data skipped" if line.skip else ""
            scale = f", learning rate x{line.lr_scale:g}" if line.lr_scale != 1 else ""
            return (
                "lineage",
                f"{line.id} ({line.cause}) {since}{undone}{skip}{scale}",
                "info" if line.cause == "start" else "warning",
            )
        case j.LineageAbandoned():
            return "lineage", f"{entry.lineage} was abandoned: the rollback did not come about", "warning"
        case j.CheckpointCommitted():
            size = entry.bytes / 1e6
            suspect = ", SUSPECT" if entry.suspect else ""
            return (
                "checkpoint",
                f"{entry.id}: {size:.1f} MB in {entry.seconds:.2f} s{suspect}",
                "warning" if entry.suspect else "info",
            )
        case j.CheckpointPruned():
            return "checkpoint", f"{entry.id} deleted", "info"
        case j.CheckpointDamaged():
            words = f"is damaged: {entry.reason}" if entry.reason else "can be read again"
            return "checkpoint", f"{entry.id} {words}", "alarm" if entry.reason else "info"
        case j.GoldenMarked():
            return "golden", f"{entry.id} is {'golden' if entry.golden else 'golden no more'}", "info"
        case j.StageBegan():
            return "stage", f"{entry.stage} began at step {entry.step}", "info"
        case j.StageEnded():
            return "stage", f"{entry.stage} ended after {plural(entry.stage_step, 'step')}: {entry.product}", "info"
        case j.Noted():
            at = f" (step {entry.step:,})" if entry.step is not None and entry.level != "info" else ""
            return "note", entry.text + at, entry.level
        case j.SampleTaken():
            return "sample", f"{entry.stage}: {entry.prompt!r} -> {entry.text[:80]!r}", "info"
        case _:
            return None


def _tell_outcome(context: ControllerContext, entry: j.CommandEnded) -> tuple[str, str, str]:
    command = context.ledger.commands.get(entry.number)
    words = describe(command.verb, command.arguments) if command is not None else ""
    at = f" at step {entry.step}" if entry.step is not None else ""
    reason = f": {entry.reason}" if entry.reason else ""
    found = ", ".join(f"{k} {v}" for k, v in entry.detail.items() if k != "step")
    return (
        "outcome",
        f"#{entry.number} {words}: {entry.state}{at}{reason}{f' ({found})' if found else ''}",
        ("info" if entry.state in ("done", "cancelled") else "warning"),
    )
