"""What can be typed after `:`; commands as on the command line, and the names of views. Pure functions."""

from typing import Any, NamedTuple

from midwatch.commands import BY_NAME, GROUPS, Argument, CommandError, command_name, parse_command, split
from midwatch.protocol import Snapshot, Verb
from tui.core import keys


class Typed(NamedTuple):
    """A line understood: a command, a view to open, or why it is neither."""

    verb: Verb | None = None
    arguments: dict[str, Any] = {}  # noqa: RUF012  # never written to
    sure: bool = False  # do not ask
    view: str = ""
    detach: bool = False
    problem: str = ""


FIRST_WORDS = tuple(dict.fromkeys(name.split(" ")[0] for name in BY_NAME))


def parse(line: str) -> Typed:
    """A typed line, without its colon."""
    try:
        words = split(line)
        if not words:
            return Typed(problem="nothing typed")
        name, rest = words[0], words[1:]
        if name.rstrip("!") in ("q", "quit", "detach", "exit"):
            return Typed(detach=True)
        if not rest and (view := _view(name)):
            return Typed(view=view)
        verb, arguments = parse_command([name.rstrip("!"), *rest])
    except CommandError as error:
        return Typed(problem=str(error).replace("no such command", "no such command or view"))
    return Typed(verb, arguments, sure=name.endswith("!"))


def view_names() -> list[str]:
    return [*(view.name for view in keys.views()), "help"]


def _view(word: str) -> str:
    """The view that the word opens, by its name or its letter; empty: none."""
    letters = {view.key: view.name for view in keys.views()}
    return letters.get(word, word if word in view_names() else "")


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
    choices = sorted(word for word in _choices(before, last, snapshot) if word.startswith(last))
    if not choices:
        return line, []
    common = choices[0]
    for choice in choices[1:]:
        while not choice.startswith(common):
            common = common[:-1]
    ending = " " if len(choices) == 1 else ""
    return " ".join([*before, common + ending]), choices


def _choices(before: list[str], last: str, snapshot: Snapshot | None) -> list[str]:
    if not before:
        return [*FIRST_WORDS, *view_names(), "quit"]
    words = [before[0].rstrip("!"), *before[1:]]
    if words[0] in GROUPS and len(words) == 1:
        return GROUPS[words[0]]
    try:
        name, rest = command_name(words)
    except CommandError:
        return []
    specs = BY_NAME[name]
    arguments = list({argument.name: argument for spec in specs for argument in spec.typed_arguments}.values())
    options = {argument.flag: argument for argument in arguments if argument.option}
    if rest and rest[-1] in options:
        return _values(options[rest[-1]], snapshot)
    free = [argument for argument in arguments if argument.place]
    place = sum(1 for at, word in enumerate(rest) if not word.startswith("--") and (at == 0 or rest[at - 1] not in options))
    found = _values(free[place], snapshot) if place < len(free) and not last.startswith("-") else []
    flags = [*options, *(spec.flag for spec in specs if spec.flag)]
    return found or [flag for flag in flags if flag not in rest]


def _values(argument: Argument, snapshot: Snapshot | None) -> list[str]:
    return list(argument.choices(snapshot)) if argument.choices is not None and snapshot is not None else []
