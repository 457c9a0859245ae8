"""Scripts for headless runs: commands by step, as `20: checkpoint, golden; 30: pause; 32: resume; 40: rollback golden --skip 5`.

Entries are worked off in their order. Each waits for its step on the line in force and for the commands before it to end; while the
run is paused no step comes, so a `resume` that follows a `pause` is given after the hold has lasted a second.
"""

from __future__ import annotations

from dataclasses import dataclass

from midwatch.commands import CommandError, TypedCommand, parse_command


class ScriptError(Exception):
    """The script cannot be understood; the message names the entry."""


@dataclass(frozen=True)
class ScriptStep:
    """Commands for one step."""

    step: int
    commands: tuple[TypedCommand, ...]
    text: str


def parse_script(text: str) -> tuple[ScriptStep, ...]:
    """Raises ScriptError."""
    entries: list[ScriptStep] = []
    for part in filter(None, (p.strip() for p in text.split(";"))):
        step, colon, words = part.partition(":")
        if not colon or not step.strip().isdigit():
            raise ScriptError(f"{part!r}: does not begin with a step (write it as `20: checkpoint`)")
        commands = tuple(_command(c.strip()) for c in words.split(",") if c.strip())
        if not commands:
            raise ScriptError(f"{part!r}: has no command")
        entries.append(ScriptStep(int(step), commands, part))
    if not entries:
        raise ScriptError("it is empty")
    return tuple(entries)


def _command(text: str) -> TypedCommand:
    try:
        return parse_command(text)
    except CommandError as error:
        raise ScriptError(f"{text!r}: {error}") from None
