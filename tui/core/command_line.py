"""What can be typed after `:`; commands as on the command line, and the names of views. Pure functions."""

import shlex
from typing import Any, NamedTuple, cast

from midwatch.commands import check_arguments
from midwatch.protocol import Snapshot, Verb
from tui.core import keys

ASK = ("rollback", "advance", "stop", "stop-now", "node-drain", "node-add", "node-quarantine")
"""Commands after which something is lost: a dialog says what, unless the verb ends with `!`."""


class Typed(NamedTuple):
    """A line understood: a command, a view to open, or why it is neither."""

    verb: Verb | None = None
    arguments: dict[str, Any] = {}  # noqa: RUF012  # never written to
    sure: bool = False  # do not ask
    view: str = ""
    detach: bool = False
    problem: str = ""


OPTIONS: dict[str, tuple[str, ...]] = {
    "pause": ("--release",),
    "release": (),
    "resume": (),
    "checkpoint": (),
    "golden": (),
    "ungolden": (),
    "rollback": ("--skip", "--lr-scale"),
    "advance": ("--to",),
    "set": (),
    "cancel": (),
    "stop": ("--now",),
    "node": (),
    "acknowledge": (),
}
NODE = ("drain", "add", "quarantine")
USAGE = {
    "golden": "golden CHECKPOINT",
    "ungolden": "ungolden CHECKPOINT",
    "rollback": "rollback CHECKPOINT [--skip N] [--lr-scale X]",
    "advance": "advance [--to STAGE]",
    "set": "set KEY VALUE",
    "cancel": "cancel NUMBER",
    "pause": "pause [--release]",
    "stop": "stop [--now]",
    "node": "node drain|add|quarantine NAME",
    "acknowledge": "acknowledge [ALARM]",
}
VIEWS = (*(view.name for view in keys.VIEWS), "help")


def parse(line: str) -> Typed:
    """A typed line, without its colon."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        return Typed(problem=f"{line}: {error}")
    if not words:
        return Typed(problem="nothing typed")
    name, rest = words[0], words[1:]
    sure = name.endswith("!")
    name = name.rstrip("!")
    if name in ("q", "quit", "detach", "exit"):
        return Typed(detach=True)
    if name in VIEWS and not (name == "checkpoint" or rest):
        return Typed(view=name)
    letters = {view.key: view.name for view in keys.VIEWS}
    if name in letters and not rest:
        return Typed(view=letters[name])
    if name not in OPTIONS:
        return Typed(problem=f"{name}: no such command or view (Tab lists them)")
    try:
        verb, arguments = _read(name, rest)
    except ValueError as error:
        usage = USAGE.get(name, name)
        return Typed(problem=f"{error} (usage: {usage})")
    problem = check_arguments(verb, arguments)
    return Typed(problem=problem) if problem else Typed(verb, arguments, sure)


def _read(name: str, words: list[str]) -> tuple[Verb, dict[str, Any]]:
    """Verb and arguments. Raises ValueError saying what is wrong."""
    options: dict[str, str] = {}
    plain: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        option, _, value = word.partition("=")
        if option.startswith("--"):
            if option not in OPTIONS[name]:
                raise ValueError(f"{name}: no option {option}")
            if option in ("--now", "--release"):
                options[option] = ""
            elif value or left:
                options[option] = value or left.pop(0)
            else:
                raise ValueError(f"{name}: {option} needs a value")
        else:
            plain.append(word)
    wanted = {"golden": 1, "ungolden": 1, "rollback": 1, "set": 2, "cancel": 1, "node": 2}.get(name, 0)
    if name == "advance" and len(plain) == 1 and "--to" not in options:
        options["--to"] = plain.pop()
    if name == "acknowledge":
        plain = [" ".join(plain) or "all"]
        wanted = 1
    if len(plain) != wanted:
        raise ValueError(f"{name}: {len(plain)} words where {wanted} are needed")
    return _verb(name, plain, options)


def _verb(name: str, plain: list[str], options: dict[str, str]) -> tuple[Verb, dict[str, Any]]:
    match name:
        case "pause":
            return ("release" if "--release" in options else "pause"), {}
        case "release":
            return "release", {}
        case "resume":
            return "resume", {}
        case "checkpoint":
            return "checkpoint", {}
        case "golden":
            return "golden", {"checkpoint": plain[0]}
        case "ungolden":
            return "ungolden", {"checkpoint": plain[0]}
        case "rollback":
            arguments: dict[str, Any] = {"checkpoint": plain[0]}
            if "--skip" in options:
                arguments["skip"] = whole(options["--skip"], "--skip")
            if "--lr-scale" in options:
                arguments["lr_scale"] = number(options["--lr-scale"], "--lr-scale")
            return "rollback", arguments
        case "advance":
            return "advance", {"to": options["--to"]} if "--to" in options else {}
        case "set":
            return "set", {"key": plain[0], "value": number(plain[1], plain[0])}
        case "cancel":
            return "cancel", {"id": plain[0].lstrip("#")}
        case "acknowledge":
            return "acknowledge", {"alarm": plain[0]}
        case "node":
            if plain[0] not in NODE:
                raise ValueError(f"node: {plain[0]!r} is none of {', '.join(NODE)}")
            return cast(Verb, f"node-{plain[0]}"), {"node": plain[1]}
    return ("stop-now" if "--now" in options else "stop"), {}


def number(word: str, name: str) -> float:
    """Raises ValueError in an operator's words."""
    try:
        return float(word)
    except ValueError:
        raise ValueError(f"{name}: {word!r} is not a number") from None


def whole(word: str, name: str) -> int:
    """Raises ValueError in an operator's words."""
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"{name}: {word!r} is not a whole number") from None


def complete(line: str, snapshot: Snapshot | None) -> tuple[str, list[str]]:
    """The line completed as far as it is certain, and what could follow."""
    words = line.split(" ")
    *before, last = words
    choices = sorted(word for word in _choices(before, snapshot) if word.startswith(last))
    if not choices:
        return line, []
    common = choices[0]
    for choice in choices[1:]:
        while not choice.startswith(common):
            common = common[:-1]
    ending = " " if len(choices) == 1 else ""
    return " ".join([*before, common + ending]), choices


def _choices(before: list[str], snapshot: Snapshot | None) -> list[str]:
    if not before:
        return [*OPTIONS, *VIEWS, "quit"]
    name = before[0].rstrip("!")
    if name not in OPTIONS:
        return []
    found = [option for option in OPTIONS[name] if option not in before]
    if snapshot is None:
        return found
    if name == "rollback" and len(before) == 1:
        undone = ["undone"] if snapshot.undone else []
        found = ["golden", "latest", *undone, *(c.id for c in snapshot.checkpoints)]
    elif name == "golden" and len(before) == 1:
        found = ["latest", *(c.id for c in snapshot.checkpoints if not c.golden)]
    elif name == "ungolden" and len(before) == 1:
        found = [c.id for c in snapshot.checkpoints if c.golden]
    elif name == "set" and len(before) == 1:
        found = list(snapshot.settings)
    elif name == "cancel" and len(before) == 1:
        found = [str(c.number) for c in snapshot.commands if c.state == "queued"]
    elif name == "acknowledge" and len(before) == 1:
        found = ["all", *(alarm.key for alarm in snapshot.alarms)]
    elif name == "node":
        names = [node.name for node in snapshot.nodes]
        found = list(NODE) if len(before) == 1 else names if len(before) == 2 else []
    elif name == "advance" and before[-1] == "--to":
        found = [stage.name for stage in snapshot.stages if stage.state == "waiting"]
    return found
