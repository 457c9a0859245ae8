"""Commands as they are typed: read by the command line, the screen's prompt, scripts and watch rules, and written into the journal.

All of them read a line with argparse, from the same specs: `rollback 140 --skip 5`, `set lr=1e-4`, `node drain n3`, `stop --now`.
"""

from __future__ import annotations

import argparse
import difflib
import shlex
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

from midwatch.commands.spec import Argument, CommandSpec
from midwatch.commands.table import BY_NAME, BY_VERB
from shards.common.terminal import Parser


class CommandError(ValueError):
    """The line is no command; the message says why and how it is typed."""


class TypedCommand(NamedTuple):
    verb: str
    arguments: dict[str, Any]


def parse_command(line: str | Sequence[str]) -> TypedCommand:
    """A line, or its words. Raises CommandError."""
    words = split(line) if isinstance(line, str) else list(line)
    name, rest = command_name(words)
    parser = LineParser(prog=name, add_help=False, allow_abbrev=False)
    add_arguments(parser, name)
    try:
        return read(name, parser.parse_args(rest))
    except CommandError as error:
        raise CommandError(f"{error} (usage: {usage(name)})") from None


def split(line: str) -> list[str]:
    """The words of a line, quotes removed. Raises CommandError."""
    try:
        return shlex.split(line)
    except ValueError as error:
        raise CommandError(f"{line}: {error}") from None


def command_name(words: Sequence[str]) -> tuple[str, list[str]]:
    """The name of the command that the words begin with, and the rest of them. A verb stands for its name. Raises CommandError."""
    if not words:
        raise CommandError("nothing typed")
    if words[0] in BY_VERB and words[0] not in BY_NAME:
        spec = BY_VERB[words[0]]
        return spec.name, [*([spec.flag] if spec.flag else []), *words[1:]]
    for count in (2, 1):
        name = " ".join(words[:count])
        if len(words) >= count and name in BY_NAME:
            return name, list(words[count:])
    if words[0] in GROUPS:
        group = words[0]
        wanted = f"{group}: {words[1]!r} is none of" if len(words) > 1 else f"{group}: needs one of"
        raise CommandError(f"{wanted} {', '.join(GROUPS[group])} (usage: {group} {'|'.join(GROUPS[group])} ...)")
    close = difflib.get_close_matches(words[0], [*BY_NAME, *GROUPS], 1)
    raise CommandError(f"{words[0]}: no such command" + (f" (did you mean {close[0]!r}?)" if close else ""))


def _groups() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in BY_NAME:
        first, _, second = name.partition(" ")
        if second:
            found.setdefault(first, []).append(second)
    return found


GROUPS = _groups()
"""First words that several commands share, as `node`, with the second ones."""


class LineParser(Parser):
    """Raises CommandError where argparse would leave the process."""

    def error(self, message: str) -> NoReturn:
        raise CommandError(f"{self.prog}: {message}")


def add_arguments(parser: argparse.ArgumentParser, name: str) -> None:
    """Adds what the commands of this name are typed with."""
    added: set[str] = set()
    for spec in BY_NAME[name]:
        if spec.flag:
            parser.add_argument(spec.flag, action="store_true", help=spec.help)
        for argument in spec.typed_arguments:
            if argument.name in added:
                continue
            added.add(argument.name)
            if argument.place:
                parser.add_argument(argument.name, metavar=argument.shown, nargs=_count(spec, argument), **_value(argument))
            if argument.option:
                dest = _option_name(argument)
                parser.add_argument(argument.flag, dest=dest, metavar=argument.shown, **_value(argument))


def _count(spec: CommandSpec, argument: Argument) -> str | None:
    if argument.rest:
        return "*"
    return None if argument.required and not (spec.pair and argument is spec.arguments[-1]) else "?"


def _value(argument: Argument) -> dict[str, Any]:
    return {"type": _converter(argument), "help": argument.help.replace("%", "%%")}


def _converter(argument: Argument) -> Callable[[str], str | int | float]:
    def convert(word: str) -> str | int | float:
        try:
            return argument.convert(word)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert


def _option_name(argument: Argument) -> str:
    """Where argparse puts the option's value: apart from that of the same argument as a word."""
    return f"{argument.name}_option" if argument.place else argument.name


def read(name: str, found: argparse.Namespace) -> TypedCommand:
    """The command of this name that parsed words mean. Raises CommandError."""
    specs = BY_NAME[name]
    given = [spec for spec in specs if spec.flag and getattr(found, _dest(spec.flag))]
    if len(given) > 1:
        raise CommandError(f"{name}: only one of {', '.join(spec.flag for spec in given)} makes sense")
    spec = given[0] if given else next(each for each in specs if not each.flag)
    values = {argument.name: _given(argument, found, name) for argument in spec.typed_arguments}
    if spec.pair:
        _split_pair(spec, values)
    arguments = {key: value for key, value in values.items() if value is not None}
    if problem := spec.problem(arguments):
        raise CommandError(problem)
    return TypedCommand(spec.verb, arguments)


def _dest(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _given(argument: Argument, found: argparse.Namespace, name: str) -> Any:
    values = [getattr(found, argument.name)] if argument.place else []
    if argument.rest:
        values = [" ".join(values[0]) or None]
    if argument.option:
        values.append(getattr(found, _option_name(argument)))
    values = [value for value in values if value is not None]
    if len(values) > 1:
        raise CommandError(f"{name}: {argument.shown} is given twice, as {values[0]!r} and by {argument.flag}")
    return values[0] if values else argument.default or None


def _split_pair(spec: CommandSpec, values: dict[str, Any]) -> None:
    """`KEY=VALUE` in one word, into the two arguments."""
    key, value = spec.arguments
    if values[value.name] is None and values[key.name] is not None:
        left, equals, right = values[key.name].partition("=")
        if not left or not equals:
            raise CommandError(f"{spec.verb}: {key.shown if equals else value.shown} is missing")
        try:
            values[key.name], values[value.name] = left, value.convert(right)
        except ValueError as error:
            raise CommandError(f"{spec.verb}: {value.shown}: {error}") from None


def usage(name: str) -> str:
    """How the commands of a name are typed: `stop [--now]`."""
    flags = [f"[{spec.flag}]" for spec in BY_NAME[name] if spec.flag]
    arguments = [_usage(argument) for spec in BY_NAME[name] for argument in spec.typed_arguments]
    return " ".join([name, *arguments, *flags])


def usage_of(spec: CommandSpec) -> str:
    """How one command is typed: `stop --now`."""
    return " ".join([spec.typed, *map(_usage, spec.typed_arguments)])


def _usage(argument: Argument) -> str:
    shown = f"{argument.flag} {argument.shown}" if argument.option else argument.shown
    return shown if argument.required else f"[{shown}]"


def describe(verb: str, arguments: dict[str, Any]) -> str:
    """The command as an operator would type it; what an older version's journal holds, as well as can be."""
    spec = BY_VERB.get(verb)
    if spec is None:
        return " ".join([verb, *(f"{value}" for value in arguments.values())])
    words = [spec.typed]
    for argument in spec.typed_arguments:
        value = arguments.get(argument.name)
        if value is None or (argument.neutral is not None and value == argument.neutral):
            continue
        text = f"{value:g}" if isinstance(value, float) and argument.option else _quoted(f"{value}", argument.rest)
        words.append(f"{argument.flag} {text}" if argument.option else text)
    return " ".join(words)


def _quoted(text: str, rest: bool) -> str:
    """The text as a shell would need it; one that takes the rest of the line keeps its spaces as they are."""
    try:
        if rest and " ".join(shlex.split(text)) == text:
            return text
    except ValueError:  # an odd quotation mark
        pass
    return shlex.quote(text)
