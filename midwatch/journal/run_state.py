"""What the journal's entries add up to: lineages, checkpoints, commands, stages and the run's state.

`Ledger.apply` is the only way it changes, so a controller that takes over gets the same ledger from the same journal.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, cast

import msgspec

from midwatch.journal import alarms
from midwatch.journal import entries as j
from midwatch.metrics.m4_columns import LineageSegment
from midwatch.protocol import Alarm, CheckpointView, CommandView, Lineage, Replay, Sampled, State


@dataclass(frozen=True)
class StageRecord:
    """A stage's course along the line in force."""

    began: float
    first_step: int
    """Step of the run at which it began."""
    ended: float | None = None
    last_step: int | None = None
    stage_steps: int = 0
    """Its own steps, when it ended."""
    product: str | None = None


@dataclass
class NodeRecord:
    """What the journal holds for and against a node."""

    mark: Literal["in use", "drained", "quarantined"] = "in use"
    reason: str = ""
    failures: int = 0
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class Ledger:
    """The run as the journal tells it."""

    run: str = ""
    """The run's id; empty in journals of earlier versions."""
    state: State = "building"
    reason: str = ""
    started: float = 0.0
    recipe: j.RunBegan | j.RecipeChanged | None = None
    """What the recipe was when a controller last read it."""
    term: int = 0
    generation: int = 0
    """The newest; it lives while `generation_live`."""
    generation_live: bool = False
    generation_commits: list[str] = field(default_factory=list)
    """Checkpoints of the newest generation that are committed."""
    generation_nodes: tuple[str, ...] = ()
    """Its nodes, in the order of their ranks."""
    nodes: dict[str, NodeRecord] = field(default_factory=dict)
    world: int = 0
    held: bool = False
    """An operator has paused the ranks and not resumed them since."""
    reported: int = 0
    """Highest number of rank 0's messages in this generation that is stored."""
    lineages: dict[int, Lineage] = field(default_factory=dict)
    lineage: int = 0
    newest_lineage: int = 0
    """Highest number that a lineage ever had; abandoned ones count."""
    checkpoints: dict[str, CheckpointView] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)
    """What verification found of each checkpoint that failed it."""
    left_line: dict[str, float] = field(default_factory=dict)
    """When each checkpoint that is not on the line in force left it, by the id."""
    undone: tuple[str, ...] = ()
    """Checkpoints that the last rollback took off the line."""
    missing: frozenset[str] = frozenset()
    """Checkpoints that were out of sight at the last look; of the moment, not of the journal."""
    committed_after: dict[str, int] = field(default_factory=dict)
    """Number of the newest command when each checkpoint was committed: their order, whatever the clock says."""
    commands: dict[int, CommandView] = field(default_factory=dict)
    newest_command: int = 0
    """Highest number that a command ever had."""
    by_id: dict[str, int] = field(default_factory=dict)
    """Number of each command by the id that its client gave it."""
    start_checkpoint: str | None = None
    """What the newest generation started from."""
    sent_in: dict[int, int] = field(default_factory=dict)
    """Generation that each command was last sent to."""
    rollbacks: dict[int, int] = field(default_factory=dict)
    """Lineage that each rollback command has opened."""
    applied: int = 0
    """Highest number of a command that the ranks have answered."""
    sets: list[tuple[int, int, str, float]] = field(default_factory=list)
    """(lineage, step, key, value) of each `set` that was applied."""
    borders: list[j.StageBegan | j.StageEnded] = field(default_factory=list)
    """Beginnings and ends of stages, on all lineages, in their order."""
    settings: dict[str, float] = field(default_factory=dict)
    asked: dict[str, float] = field(default_factory=dict)
    """Settings asked for that a rollback has put back."""
    samples: list[Sampled] = field(default_factory=list)
    agents: dict[str, j.AgentStarted] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    changes: tuple[str, ...] = ()
    data_seconds: float | None = None
    alarms: dict[str, Alarm] = field(default_factory=dict)
    """Every alarm by its key, repeats counted; those acknowledged are among them."""
    generation_environment: dict[str, str] = field(default_factory=dict)
    _left: dict[int, tuple[int, dict[str, float], tuple[str, ...]]] = field(default_factory=dict)
    """For each lineage that one in force was left for: that one, the settings asked for then, and what was `undone` then."""

    def apply(self, term: int, entry: j.Entry) -> None:
        """Takes one entry into account."""
        self.term = term
        self.reported = max(self.reported, entry.report)
        handler = getattr(self, f"_on_{type(entry).__name__}", None)
        if handler is not None:
            handler(entry)

    # One method an entry kind, named after it.

    def _on_TermBegan(self, entry: j.TermBegan) -> None:
        if entry.generation > self.generation:
            self.generation, self.generation_live = entry.generation, False
        self.newest_lineage = max(self.newest_lineage, entry.lineage)
        self.newest_command = max(self.newest_command, entry.command)
        self.changes = differences(self.versions, entry.versions)
        self.versions = entry.versions
        for number, command in self.commands.items():
            if command.verb == "rollback" and command.state == "sent" and number not in self.rollbacks:
                self.commands[number] = msgspec.structs.replace(command, state="queued")

    def _on_RunBegan(self, entry: j.RunBegan) -> None:
        self.started, self.run = entry.time, entry.id
        self.recipe = entry

    def _on_RecipeChanged(self, entry: j.RecipeChanged) -> None:
        self.recipe = entry

    def _on_RunCopied(self, entry: j.RunCopied) -> None:
        self.run = entry.id
        self.agents.clear()  # they are the original's

    def _on_StateChanged(self, entry: j.StateChanged) -> None:
        self.state, self.reason = cast(State, entry.state), entry.reason
        if entry.state == "failed":
            self._raise_alarm(entry, f"failed: {entry.reason}" if entry.reason else "failed", None)
        else:
            self.alarms.pop(alarms.FAILED, None)

    def _on_DataBuilt(self, entry: j.DataBuilt) -> None:
        self.data_seconds = entry.seconds

    def _on_AgentStarted(self, entry: j.AgentStarted) -> None:
        self.agents[entry.node] = entry

    def _on_NodeMarked(self, entry: j.NodeMarked) -> None:
        node = self.node(entry.node)
        node.mark, node.reason = entry.mark, entry.reason
        if entry.mark == "in use":
            node.failures = 0

    def _on_NodeFailed(self, entry: j.NodeFailed) -> None:
        self.node(entry.node).failures += 1
        self._raise_alarm(entry, f"{entry.node} failed: {entry.reason}", None)

    def _on_Noted(self, entry: j.Noted) -> None:
        if entry.level == "alarm":
            self._raise_alarm(entry, entry.text, entry.step)

    def _raise_alarm(self, entry: j.StateChanged | j.NodeFailed | j.Noted, text: str, step: int | None) -> None:
        """Adds an alarm, or counts one more repeat. What lies on a line that was rolled back is no repeat's beginning."""
        path = self.path()
        on_line = lambda alarm: alarm.step is None or _on_path(path, alarm.lineage, alarm.step)  # noqa: E731
        alarms.add(self.alarms, entry, text, step, self.lineage, on_line)

    def _on_RanksEnvironment(self, entry: j.RanksEnvironment) -> None:
        self.node(entry.node).environment = entry.environment

    def _on_GenerationBegan(self, entry: j.GenerationBegan) -> None:
        self.generation, self.generation_live, self.world = entry.generation, True, entry.world
        self.generation_nodes = entry.nodes
        self.generation_commits = []
        self.reported = 0
        self.start_checkpoint = entry.checkpoint
        if self.generation_environment:
            self.changes = differences(self.generation_environment, entry.environment)
        self.generation_environment = entry.environment

    def _on_GenerationEnded(self, entry: j.GenerationEnded) -> None:
        self.generation = max(self.generation, entry.generation)
        self.generation_live = False

    def _on_CommandAccepted(self, entry: j.CommandAccepted) -> None:
        self.by_id[entry.id] = entry.number
        self.newest_command = max(self.newest_command, entry.number)
        self.commands[entry.number] = CommandView(
            id=entry.id,
            number=entry.number,
            verb=entry.verb,
            arguments=entry.arguments,
            author=entry.author,
            time=entry.time,
            state="queued",
        )

    def _on_CommandSent(self, entry: j.CommandSent) -> None:
        self.sent_in[entry.number] = entry.generation
        self.newest_command = max(self.newest_command, entry.number)
        if entry.number in self.commands:  # not so where damage has taken its acceptance
            self.commands[entry.number] = msgspec.structs.replace(self.commands[entry.number], state="sent")

    def _on_CommandEnded(self, entry: j.CommandEnded) -> None:
        self.newest_command = max(self.newest_command, entry.number)
        if entry.number not in self.commands:
            return
        command = msgspec.structs.replace(
            self.commands[entry.number], state=entry.state, step=entry.step, detail=entry.detail, reason=entry.reason
        )
        self.commands[entry.number] = command
        if entry.state in ("done", "failed") and entry.step is not None:
            self.applied = max(self.applied, entry.number)
        if entry.state == "done" and command.verb in ("pause", "resume", "release"):
            self.held = command.verb == "pause"
        if command.verb == "acknowledge" and entry.state == "done":
            alarms.acknowledge(self.alarms, entry.detail.get("alarms", ()), entry.author)
        if command.verb == "set" and entry.state == "done":
            key, value = str(command.arguments["key"]), float(command.arguments["value"])
            self.sets.append((self.lineage, entry.step or 0, key, value))
            self.asked.pop(key, None)

    def _on_LineageOpened(self, entry: j.LineageOpened) -> None:
        lineage = entry.lineage
        if entry.number is not None:
            self.rollbacks[entry.number] = lineage.id
        self._left[lineage.id] = self.lineage, self.asked, self.undone
        if lineage.cause == "rollback":
            path = self.path()
            undone = {k: v for line, step, k, v in self.sets if _on_path(path, line, step) and step >= lineage.fork_step}
            self.asked = self.asked | undone
        self.lineages[lineage.id] = lineage
        self.lineage, self.newest_lineage = lineage.id, max(self.newest_lineage, lineage.id)
        if lineage.cause == "crash" and lineage.parent is not None:
            again = [(step, k, v) for line, step, k, v in self.sets if line == lineage.parent and step >= lineage.fork_step]
            self.sets += [(lineage.id, step, k, v) for step, k, v in again]
        left = self._place_checkpoints(entry.time)
        if lineage.cause == "rollback":
            self.undone = left

    def _place_checkpoints(self, now: float) -> tuple[str, ...]:
        """Finds out anew which checkpoints are on the line in force; the ids of those that have just left it."""
        left = []
        for id, view in self.checkpoints.items():
            on_line = self._on_line(view)
            if view.on_line and not on_line:
                left.append(id)
                self.left_line[id] = now
            elif on_line:
                self.left_line.pop(id, None)
            self.checkpoints[id] = msgspec.structs.replace(view, on_line=on_line)
        return tuple(left)

    def _on_LineageAbandoned(self, entry: j.LineageAbandoned) -> None:
        before, self.asked, self.undone = self._left.get(entry.lineage, (0, {}, ()))
        self.lineages.pop(entry.lineage, None)
        self.rollbacks = {number: lineage for number, lineage in self.rollbacks.items() if lineage != entry.lineage}
        if self.lineage == entry.lineage or self.lineage not in self.lineages:
            self.lineage = before if before in self.lineages else max(self.lineages, default=0)
        self._place_checkpoints(entry.time)

    def _on_CheckpointCommitted(self, entry: j.CheckpointCommitted) -> None:
        view = CheckpointView(
            id=entry.id,
            step=entry.step,
            lineage=entry.lineage,
            stage=entry.stage,
            stage_step=entry.stage_step,
            ended=entry.ended,
            time=entry.time,
            bytes=entry.bytes,
            suspect=entry.suspect,
            loss=entry.loss,
            doubt=entry.doubt,
            settings=entry.settings,
        )
        self.checkpoints[entry.id] = view = msgspec.structs.replace(view, on_line=self._on_line(view))
        if not view.on_line:
            self.left_line[entry.id] = entry.time
        self.digests[entry.id] = entry.digest
        self.committed_after[entry.id] = self.newest_command
        if entry.generation == self.generation:
            self.generation_commits.append(entry.id)

    def _on_CheckpointPruned(self, entry: j.CheckpointPruned) -> None:
        for kept in (self.checkpoints, self.digests, self.damaged, self.left_line, self.committed_after):
            kept.pop(entry.id, None)

    def _on_CheckpointDamaged(self, entry: j.CheckpointDamaged) -> None:
        if entry.reason:
            self.damaged[entry.id] = entry.reason
        else:
            self.damaged.pop(entry.id, None)

    def _on_GoldenMarked(self, entry: j.GoldenMarked) -> None:
        if entry.id in self.checkpoints:
            self.checkpoints[entry.id] = msgspec.structs.replace(self.checkpoints[entry.id], golden=entry.golden)

    def _on_StageBegan(self, entry: j.StageBegan) -> None:
        self.borders.append(entry)

    def _on_StageEnded(self, entry: j.StageEnded) -> None:
        self.borders.append(entry)

    def _on_SettingsInForce(self, entry: j.SettingsInForce) -> None:
        self.settings = entry.settings
        self.asked = {k: v for k, v in self.asked.items() if k in entry.settings and entry.settings[k] != v}

    def _on_SampleTaken(self, entry: j.SampleTaken) -> None:
        self.samples.append(
            Sampled(stage=entry.stage, step=entry.step, lineage=entry.lineage, prompt=entry.prompt, text=entry.text)
        )

    # Questions.

    def node(self, name: str) -> NodeRecord:
        """The node's record, an empty one where nothing is known of it."""
        return self.nodes.setdefault(name, NodeRecord())

    def find(self, name: str) -> CheckpointView | str:
        """The checkpoint an operator means; else why there is none.

        name: its id, a step on the line in force, or the newest that is there as `latest`, `golden` or `undone`: the newest on the
        line that the last rollback left.
        """
        views = self.checkpoints
        if name in views:
            return views[name]
        there = sorted((c for c in views.values() if c.id not in self.missing), key=lambda c: (c.step, c.time))
        if name == "undone":
            left = [c for c in there if c.id in self.undone and not c.on_line]
            return left[-1] if left else "no rollback has left a checkpoint that is still there"
        on_line = [c for c in there if c.on_line]
        if name == "latest":
            return on_line[-1] if on_line else "there is no checkpoint yet"
        if name == "golden":
            golden = [c for c in on_line if c.golden]
            return golden[-1] if golden else "no checkpoint on this line is golden; mark one with: golden ID"
        if name.isdecimal() and len(name) < 20:
            at = [c for c in on_line if c.step == int(name)]
            if at:
                return at[-1]
        steps = ", ".join(c.id for c in on_line[-8:]) or "none yet"
        return f"there is no checkpoint {name!r}; the newest on this line: {steps}"

    def path(self, lineage: int | None = None) -> list[LineageSegment]:
        """The segments of the line that ends in a lineage (the one in force), oldest first."""
        segments: list[LineageSegment] = []
        current, last = self.lineages.get(self.lineage if lineage is None else lineage), None
        while current is not None:
            segments.append(LineageSegment(current.id, current.fork_step if current.parent is not None else -1, last))
            last = current.fork_step if last is None else min(last, current.fork_step)
            # A parent is older than its child; a journal that says otherwise must not lead round in a circle.
            parent = current.parent
            current = self.lineages.get(parent) if parent is not None and parent < current.id else None
        segments.reverse()
        return segments

    def _on_line(self, checkpoint: CheckpointView) -> bool:
        return _on_path(self.path(), checkpoint.lineage, checkpoint.step)

    def restart_point(self) -> CheckpointView | None:
        """The newest good checkpoint of the lineage in force that is there, else its fork; None: from the beginning."""
        bad = self.missing | self.damaged.keys()
        own = [c for c in self.checkpoints.values() if c.lineage == self.lineage and not c.suspect and c.id not in bad]
        if own:
            return max(own, key=lambda c: (c.step, c.ended, c.time))
        lineage = self.lineages.get(self.lineage)
        return self.checkpoints.get(lineage.fork) if lineage is not None and lineage.fork is not None else None

    def rule_alarms(self) -> list[tuple[int, str]]:
        """(step, text) of watch rules' alarms about the line in force that nobody has acknowledged, by step."""
        path = self.path()
        found = [a for a in self.alarms.values() if a.rule and not a.acknowledged]
        return sorted((a.step, a.text) for a in found if a.step is not None and _on_path(path, a.lineage, a.step))

    def doubt(self, checkpoint: CheckpointView) -> str:
        """Why a checkpoint should not be trusted though its metrics are finite; empty where nothing speaks against it."""
        if checkpoint.id in self.damaged:
            return f"damaged: {self.damaged[checkpoint.id]}"
        if checkpoint.on_line:
            for step, text in self.rule_alarms():
                if step <= checkpoint.step:
                    return f"after the alarm at step {step}: {text}"
        return checkpoint.doubt

    def trusted(self) -> list[CheckpointView]:
        """Checkpoints of the line in force that are there and that nothing speaks against, oldest first."""
        first = min((step for step, _ in self.rule_alarms()), default=None)
        bad = self.missing | self.damaged.keys()
        found = [c for c in self.checkpoints.values() if c.on_line and not c.suspect and not c.doubt and c.id not in bad]
        return sorted((c for c in found if first is None or c.step < first), key=lambda c: (c.step, c.time))

    def resumes(self) -> bool:
        """Whether a resume is under way: the next ranks do not hold, whatever was asked for before it."""
        return any(c.verb == "resume" and c.state == "sent" for c in self.commands.values())

    def replays(self, after_step: int) -> tuple[Replay, ...]:
        """Sets of the lineage in force from a step on, to be applied again after a crash."""
        return tuple(Replay(step=s, key=k, value=v) for line, s, k, v in self.sets if line == self.lineage and s >= after_step)

    def stage_record(self, stage: str) -> StageRecord | None:
        """The stage's course on the line in force; the newest where it was begun again.

        Ranks that die between a stage's last checkpoint and the word of its end leave that word unsaid: the checkpoint says it, or
        the stage after it, which has begun.
        """
        path = self.path()
        record: StageRecord | None = None
        for border in self.borders:
            if not _on_path(path, border.lineage, border.step):
                continue
            if border.stage != stage:
                if record is not None and record.ended is None and isinstance(border, j.StageBegan):
                    record = _ended(record, border.time, border.step)
            elif isinstance(border, j.StageBegan):
                record = StageRecord(began=border.time, first_step=border.step - border.stage_step)
            elif record is not None:
                record = replace(_ended(record, border.time, border.step), stage_steps=border.stage_step, product=border.product)
        if record is not None and record.product is None:
            ends = [c for c in self.checkpoints.values() if c.stage == stage and c.ended and c.on_line and c.time >= record.began]
            if ends:
                last = max(ends, key=lambda c: c.time)
                record = replace(_ended(record, last.time, last.step), product=last.id)
        return record

    def standing_alarms(self) -> list[Alarm]:
        """Alarms that nobody has acknowledged, the newest first."""
        return sorted((a for a in self.alarms.values() if not a.acknowledged), key=lambda a: a.last_time, reverse=True)

    def open_commands(self) -> list[CommandView]:
        """Commands not yet ended, oldest first."""
        return [c for c in self.commands.values() if c.state in ("queued", "sent")]


def _ended(record: StageRecord, time: float, step: int) -> StageRecord:
    return replace(record, ended=time, last_step=step, stage_steps=step - record.first_step)


def _on_path(path: list[LineageSegment], lineage: int, step: int) -> bool:
    return any(line == lineage and (last is None or step <= last) for line, _, last in path)


def differences(before: dict[str, str], now: dict[str, str]) -> tuple[str, ...]:
    """What changed, as `name: old -> new`; nothing where there was nothing before."""
    if not before:
        return ()
    keys = sorted(before.keys() | now.keys())
    return tuple(f"{k}: {before.get(k, 'none')} -> {now.get(k, 'none')}" for k in keys if before.get(k) != now.get(k))
