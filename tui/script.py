"""Scripts for headless runs: commands by step, as `20: checkpoint, golden; 30: pause; 32: resume; 40: rollback golden --skip 5`.

Entries are worked off in their order. Each waits for its step on the line in force and for the commands before it to end; while the
run is paused no step comes, so a `resume` that follows a `pause` is given after the hold has lasted a second.
"""

from __future__ import annotations

import argparse
import shlex
from dataclasses import dataclass
from typing import Any, NoReturn

from midwatch.protocol import Verb


class ScriptError(Exception):
    """The script cannot be understood; the message names the entry."""


@dataclass(frozen=True)
class ScriptStep:
    """Commands for one step."""

    step: int
    commands: tuple[tuple[Verb, dict[str, Any]], ...]
    text: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ScriptError(message)


def parse_script(text: str) -> tuple[ScriptStep, ...]:
    """Raises ScriptError."""
    entries: list[ScriptStep] = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        step, colon, words = part.partition(":")
        if not colon or not step.strip().isdigit():
            raise ScriptError(f"{part!r}: does not begin with a step (write it as `20: checkpoint`)")
        commands = tuple(parse_command(c.strip()) for c in words.split(",") if c.strip())
        if not commands:
            raise ScriptError(f"{part!r}: has no command")
        entries.append(ScriptStep(int(step), commands, part))
    if not entries:
        raise ScriptError("it is empty")
    return tuple(entries)


def parse_command(text: str) -> tuple[Verb, dict[str, Any]]:
    """A command as an operator types it, without the run. Raises ScriptError."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ScriptError(f"{text!r}: {error}") from None
    parser = _Parser(prog="", add_help=False, exit_on_error=False)
    commands = parser.add_subparsers(dest="verb", required=True)

    def add(name: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, add_help=False, exit_on_error=False)

    add("pause").add_argument("--release", action="store_true")
    add("resume")
    add("checkpoint")
    for name in ("golden", "ungolden"):
        add(name).add_argument("checkpoint", nargs="?", default="latest")
    rollback = add("rollback")
    rollback.add_argument("checkpoint")
    rollback.add_argument("--skip", type=int, default=0)
    rollback.add_argument("--lr-scale", type=float, default=1.0)
    add("advance").add_argument("--to")
    setting = add("set")
    setting.add_argument("key")
    setting.add_argument("value", type=float)
    add("cancel").add_argument("id")
    add("stop").add_argument("--now", action="store_true")
    try:
        found = vars(parser.parse_args(words))
    except (argparse.ArgumentError, ScriptError) as error:
        raise ScriptError(f"{text!r}: {error}") from None
    verb = found.pop("verb")
    if verb == "pause":
        return ("release" if found["release"] else "pause"), {}
    if verb == "stop":
        return ("stop-now" if found["now"] else "stop"), {}
    return verb, {k: v for k, v in found.items() if v is not None}
