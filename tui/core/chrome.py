"""The lines around every view: header, tabs, notices, the status of commands, the footer of keys."""

from collections.abc import Sequence

from midwatch.objectives.build_stage import is_build
from midwatch.protocol import PHASE_WORDS, Alarm, CommandView, JournalLine, Snapshot
from tui.chart.formatting import UNICODE, age, clock, compact, duration, percent, plural, setting, when
from tui.chart.styles import Ink
from tui.core import keys
from tui.core.scene import Scene, running_span, silence
from tui.core.text_panel import Line, Run, broken, cut, joined, spread, width

STATES: dict[str, tuple[str, str, Ink]] = {  # with Unicode, without, ink
    "building": ("◌", "~", Ink.BADGE_QUIET),
    "starting": ("◌", "~", Ink.BADGE_QUIET),
    "training": ("▶", ">", Ink.BADGE_GOOD),
    "paused": ("‖", "=", Ink.BADGE_HOLD),
    "recovering": ("↻", "!", Ink.BADGE_HOLD),
    "released": ("◇", "o", Ink.BADGE_HOLD),
    "finished": ("✓", "*", Ink.BADGE_GOOD),
    "failed": ("✗", "X", Ink.BADGE_ALARM),
}
LEVELS: dict[str, tuple[str, Ink]] = {"info": (" ", Ink.TEXT), "warning": ("W", Ink.WARNING), "alarm": ("A", Ink.ALARM)}
NOTICE_ROWS = 2
"""Most rows of one notice."""
PHASE_SECONDS = 10.0
"""For how long ranks are at something before it is said how long."""
PATIENCE = 10.0
"""Seconds without a link after which the screen says what else can be done."""
DOT = " · " if UNICODE else " - "


def badge(state: str) -> Run:
    """The run's state: a sign, a word and a colour."""
    unicode, ascii, ink = STATES.get(state, ("?", "?", Ink.BADGE_QUIET))
    return f" {unicode if UNICODE else ascii} {state.upper()} ", ink


def state_badge(scene: Scene, snapshot: Snapshot) -> Run:
    """The state, or that it is not known any more and since when."""
    quiet = silence(scene)
    if quiet is None:
        return badge(snapshot.state)
    return f" ? NO NEWS FOR {duration(quiet.seconds)} ", Ink.BADGE_ALARM


def header(scene: Scene, cells: int, *, state: bool = True) -> list[Run]:
    """The run, its state (unless the view says it), how far it is, and the time."""
    snapshot = scene.snapshot
    right: list[Run] = [("READ-ONLY ", Ink.WARNING)] if scene.read_only else []
    if scene.link.up:
        right.append((f"{clock(scene.now)} ", Ink.FAINT))
    elif scene.link.since is None:
        right.append(("connecting ", Ink.FAINT))
    else:
        right.append(("LINK LOST ", Ink.ALARM))
    name: Run = (f" {scene.run[: max(6, cells // 5)]} ", Ink.TITLE)
    if snapshot is None:
        return spread([name, (" midwatch", Ink.FAINT)], right, cells)
    parts: list[Line] = [[name, state_badge(scene, snapshot)] if state else [name], *_progress(snapshot, silence(scene) is None)]
    while len(parts) > 1 and width(joined(parts)) + width(right) > cells:
        parts.pop()
    return spread(joined(parts), right, cells)


def _progress(snapshot: Snapshot, current: bool) -> list[Line]:
    """The most telling first: the last give way where there is no room."""
    parts: list[Line] = []
    if snapshot.step or snapshot.state not in ("building", "starting"):
        done = percent(snapshot.step, snapshot.total_steps)
        parts.append([(f"step {snapshot.step:,}/{snapshot.total_steps:,}", Ink.TEXT), (f" {done}", Ink.FAINT)])
    if current and snapshot.seconds_left is not None and snapshot.state in ("building", "starting", "training", "recovering"):
        parts.append([(f"{duration(snapshot.seconds_left)} left", Ink.TEXT)])
    loss = snapshot.latest.get("train/loss")
    if loss is not None:
        parts.append([("loss ", Ink.FAINT), (compact(loss), Ink.TEXT)])
    if snapshot.stage and snapshot.stage != "data":
        parts.append([("in ", Ink.FAINT), (snapshot.stage, Ink.TEXT)])
    parts.append([(plural(snapshot.world, "rank"), Ink.FAINT)] if snapshot.world else [])
    parts.append([(f"lineage {snapshot.lineage}", Ink.FAINT)] if snapshot.lineages else [])
    return [part for part in parts if part]


def tabs(view: str, cells: int) -> list[Run]:
    """The views and their letters; short names where there is no room for long ones."""
    for length in (None, 5, 4, 3, 0):
        parts: list[Line] = []
        for each in keys.views():
            name = each.name[:length]
            if each.name == view:
                parts.append([(f" {each.key} {each.name} ", Ink.HERE)])
            else:
                parts.append([(f" {each.key}", Ink.KEY), (f" {name} " if name else " ", Ink.FAINT)])
        parts.append([(" help ", Ink.HERE)] if view == "help" else [(" ?", Ink.KEY), (" help", Ink.FAINT)])
        line = joined(parts, "")
        if sum(len(part) for part, _ in line) <= cells:
            break
    return line


def footer(view: str, read_only: bool, cells: int, *, paused: bool) -> list[Run]:
    """The keys that work here: the view's own, then commands; how to leave always, at the right."""
    always = [key for key in keys.everywhere() if key.short and key not in keys.COMMANDS]
    right = joined([_key(key, paused) for key in always]) if cells >= 60 else []
    shown: list[Line] = []
    room = cells - width(right) - 3
    own = keys.of_view(view)
    taken = {pressed for key in own for pressed in key.keys}
    commands = [key for key in keys.COMMANDS if not taken & set(key.keys)]
    for key in (*own, *commands, *(() if right else always)):
        part = _key(key, paused)
        if key.short and not (key.changes and read_only) and room >= width(part):
            shown.append(part)
            room -= width(part) + 2
    return spread([(" ", Ink.BLANK), *joined(shown)], [*right, (" ", Ink.BLANK)], cells)


def _key(key: keys.Key, paused: bool) -> Line:
    word = "resume" if key.action == "command:pause" and paused else key.short
    return [(f"{shown_key(key.shown)} ", Ink.KEY), (word, Ink.FAINT)]


def shown_key(shown: str) -> str:
    """A key's name, in ASCII where need be."""
    if UNICODE:
        return shown
    return {"↑": "Up", "↓": "Down", "←": "Left", "→": "Right"}.get(shown, shown)


def notices(scene: Scene, hidden: frozenset[str], cells: int, most: int = 3) -> list[Line]:
    """What must not be overlooked, the gravest first: a lost link, alarms, settings not in force, a changed environment."""
    found: list[Line] = []
    if scene.link.since is not None and not scene.link.up:
        found.append(_lost(scene))
    snapshot = scene.snapshot
    if snapshot is not None:
        for key, line in _notices(snapshot, scene):
            if key not in hidden:
                found.append(line)
    lines: list[Line] = [row for line in found[:most] for row in broken(line, cells, NOTICE_ROWS)]
    if len(found) > most:
        more = f" +{len(found) - most} more (j shows them)"
        lines[-1] = [*cut(lines[-1], cells - len(more)), (more, Ink.FAINT)]
    return lines


def notice_keys(snapshot: Snapshot, scene: Scene) -> frozenset[str]:
    """Names of the notices there are, to hide them by."""
    return frozenset(key for key, _ in _notices(snapshot, scene))


def _lost(scene: Scene) -> Line:
    since = scene.link.since or scene.now
    if scene.snapshot is None:
        return [(" LINK LOST ", Ink.BADGE_ALARM), (f" for {duration(scene.now - since)}; trying again", Ink.ALARM)]
    old = age(scene.now - scene.received)
    at = clock(scene.received)
    more = "; midwatch resume starts a controller if none is running" if scene.now - since > PATIENCE else ""
    words = f" this is {old} old, from {at}; the run goes on; trying again{more}"
    return [(" LINK LOST ", Ink.BADGE_ALARM), (words, Ink.ALARM)]


def _notices(snapshot: Snapshot, scene: Scene) -> list[tuple[str, Line]]:
    found: list[tuple[str, Line]] = []
    for fault in snapshot.faults:
        found.append((f"fault {fault}", [(" FAULT ", Ink.BADGE_ALARM), (f" {fault}", Ink.ALARM)]))
    for alarm in [alarm for alarm in snapshot.alarms if alarm.text not in snapshot.faults]:
        found.append((f"alarm {alarm.key} {alarm.time}", alarm_line(alarm, scene)))
    astray = unmet_settings(snapshot)
    if astray:
        words = "; ".join(astray)
        found.append((f"settings {words}", [(" SETTINGS ", Ink.BADGE_HOLD), (f" {words}", Ink.WARNING)]))
    if snapshot.changes:
        words = "; ".join(snapshot.changes)
        line = [(" CHANGED ", Ink.BADGE_HOLD), (f" since the last start: {words}", Ink.WARNING)]
        found.append((f"changes {words}", line))
    if snapshot.dropped:
        line = [(" GAPS ", Ink.BADGE_HOLD), (f" {plural(snapshot.dropped, 'row')} of metrics dropped", Ink.WARNING)]
        found.append((f"dropped {snapshot.dropped}", line))
    return found


def alarm_line(alarm: Alarm, scene: Scene) -> Line:
    """An alarm that stands: when it came last, how often, since which step, and what it says."""
    often = f" {alarm.count:,} times" + (f" since step {alarm.step:,}" if alarm.step is not None else "") if alarm.count > 1 else ""
    at = f" (step {alarm.last_step:,})" if alarm.last_step is not None else ""
    return [(" ALARM ", Ink.BADGE_ALARM), (f" {clock(alarm.last_time + scene.skew)}{often} {alarm.text}{at}", Ink.ALARM)]


def unmet_settings(snapshot: Snapshot) -> list[str]:
    """Settings asked for that are not in force, as `lr 0.0003 in force, 0.0001 asked for`."""
    return [
        f"{key} {setting(snapshot.settings[key]) if key in snapshot.settings else '?'} in force, {setting(value)} asked for"
        for key, value in snapshot.settings_asked.items()
        if snapshot.settings.get(key) != value
    ]


def told(event: JournalLine, scene: Scene, *, kinds: bool = True) -> list[Run]:
    """A journal entry on one line: time, level's letter, kind, words, author."""
    letter, ink = LEVELS[event.level]
    kind = f"{event.kind:<10.10} " if kinds else ""
    by = f" ({event.author})" if event.author else ""
    moment = when(event.time + scene.skew, scene.now)
    return [(f"{moment} ", Ink.FAINT), (f"{letter} ", ink), (kind, Ink.FAINT), (event.text, ink), (by, Ink.FAINT)]


def outcome(view: CommandView, words: str) -> tuple[str, Ink]:
    """What came of a command, in an operator's words."""
    at = f" at step {view.step:,}" if view.step is not None else ""
    because = f": {view.reason}" if view.reason else ""
    found = ", ".join(f"{key} {value}" for key, value in view.detail.items() if key not in ("step", "key"))
    detail = f" ({found})" if found else ""
    ink = Ink.DONE if view.state == "done" else Ink.TEXT if view.state == "cancelled" else Ink.WARNING
    state = "waits in line" if view.state == "queued" else "sent to the ranks" if view.state == "sent" else view.state
    return f"{words}: {state}{at}{because}{detail}", ink


def open_commands(commands: Sequence[CommandView]) -> list[CommandView]:
    return [command for command in commands if command.state in ("queued", "sent")]


def state_words(scene: Scene) -> list[Run]:
    """What the run is at, and why, in one line."""
    snapshot = scene.snapshot
    if snapshot is None:
        return [("waiting for the controller", Ink.FAINT)]
    running = running_span(snapshot)
    quiet = silence(scene)
    parts: list[Line] = [[(f"was {snapshot.state}: {quiet.words}", Ink.ALARM)]] if quiet is not None else []
    building = next((stage for stage in snapshot.stages if is_build(stage.objective) and stage.state == "running"), None)
    if snapshot.state == "building" and building is not None:
        words = f"{building.name}: {building.step}%" + (f", {building.note}" if building.note else "")
        parts.append([(words, Ink.TITLE)])
        parts.append(_left(building.seconds_left) if quiet is None else [])
    elif running is not None:
        stage = running.stage
        parts.append([(f"{stage.name}: step {stage.step:,} of {stage.steps:,}", Ink.TITLE)])
        if quiet is None and snapshot.state in ("training", "recovering", "starting"):
            parts.append(_left(stage.seconds_left))
    if snapshot.phase not in ("", "training", "paused") and snapshot.state in ("training", "starting", "recovering"):
        since = scene.now - scene.skew - snapshot.phase_since if snapshot.phase_since else 0.0
        span = f" for {duration(since)}" if since >= PHASE_SECONDS else ""
        parts.append([(PHASE_WORDS.get(snapshot.phase, snapshot.phase) + span, Ink.TEXT)])
    if snapshot.reason:
        ink = Ink.ALARM if snapshot.state == "failed" else Ink.WARNING if snapshot.state == "recovering" else Ink.TEXT
        parts.append([(snapshot.reason, ink)])
    return joined(parts, DOT)


def _left(seconds: float | None) -> Line:
    return [(f"{duration(seconds)} left", Ink.TEXT)] if seconds is not None else []
