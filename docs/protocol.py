"""Writes the tables of commands into docs/protocol.md and docs/commands.md, from their specs: `python -m docs.protocol`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from midwatch.commands import BY_NAME, SPECS, STATES, CommandSpec, Doing, usage_of
from shards.common.files import write_atomically

PAGE = Path(__file__).with_name("protocol.md")
COMMANDS = Path(__file__).with_name("commands.md")
END = "<!-- end of table -->"
WORDS = {Doing.NOW: "now", Doing.QUEUE: "queued", Doing.SHAPE: "next start"}


def states() -> str:
    """What each state makes of each command; each refusal has a number, explained below the table."""
    reasons: list[str] = []
    lines = ["| command | " + " | ".join(STATES) + " |", "| --- |" + " --- |" * len(STATES)]
    for spec in SPECS:
        cells = []
        for state in STATES:
            doing, why = spec.states[state]
            if doing is Doing.REFUSE and why not in reasons:
                reasons.append(why)
            cells.append(WORDS.get(doing) or f"no ({reasons.index(why) + 1})")
        lines.append(f"| {spec.typed} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {why}" for number, why in enumerate(reasons, 1))]
    return "\n".join(lines)


def messages() -> str:
    """Verbs and arguments as they are sent, and what it means that a command is done."""
    lines = ["| verb | arguments | when it is done |", "| --- | --- | --- |"]
    for spec in SPECS:
        arguments = ", ".join(f"`{each.name}`" + ("" if each.required or each.default else "?") for each in spec.arguments)
        lines.append(f"| `{spec.verb}` | {arguments} | {spec.done} |")
    return "\n".join(lines)


def typed() -> str:
    """How each command is typed, its key, and who may give it."""
    lines = ["| command | what it does | key | asks first | a watch rule may give it |", "| --- | --- | --- | --- | --- |"]
    for spec in SPECS:
        asks, by_rule = ("yes" if true else "" for true in (spec.confirm, spec.by_rule))
        lines.append(f"| `{usage_of(spec)}` | {spec.help} | {_key(spec)} | {asks} | {by_rule} |")
    return "\n".join(lines)


def _key(spec: CommandSpec) -> str:
    if spec.key is None:
        return ""
    return f"`{spec.key.key}`" + (f" in {spec.key.view}" if spec.key.view else "")


def arguments() -> str:
    """Every argument that can be typed."""
    lines = ["| command | argument | meaning |", "| --- | --- | --- |"]
    for name, specs in BY_NAME.items():
        for each in {argument.name: argument for spec in specs for argument in spec.typed_arguments}.values():
            shown = f"{each.flag} {each.shown}" if each.option else each.shown
            lines.append(f"| `{name}` | `{shown}` | {each.help} |")
    return "\n".join(lines)


TABLES: dict[Path, dict[str, Callable[[], str]]] = {
    PAGE: {"messages": messages, "states": states},
    COMMANDS: {"commands": typed, "arguments": arguments},
}


def page(path: Path) -> str:
    """The page with its tables as the code has them now."""
    text = path.read_text(encoding="utf-8")
    for name, table in TABLES[path].items():
        begin = f"<!-- {name}: python -m docs.protocol -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}\n\n{table()}\n\n{END}{rest.split(END, 1)[1]}"
    return text


if __name__ == "__main__":
    for path in TABLES:
        write_atomically(path, page(path).encode())
