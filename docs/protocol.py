"""Writes the table of commands and states into docs/protocol.md, from the code: `python -m docs.protocol`."""

from __future__ import annotations

from pathlib import Path

from midwatch.commands import STATES, TABLE, Doing
from shards.common.files import write_atomically

PAGE = Path(__file__).with_name("protocol.md")
BEGIN, END = "<!-- table: python -m docs.protocol -->", "<!-- end of table -->"
NAMES = {"release": "pause --release", "stop-now": "stop --now"}
WORDS = {Doing.NOW: "now", Doing.QUEUE: "queued", Doing.SHAPE: "next start"}


def table() -> str:
    """The table of midwatch.commands in Markdown; each refusal has a number, explained below it."""
    reasons: list[str] = []
    lines = ["| command | " + " | ".join(STATES) + " |", "| --- |" + " --- |" * len(STATES)]
    for verb, row in TABLE.items():
        cells = []
        for state in STATES:
            doing, why = row[state]
            if doing is Doing.REFUSE and why not in reasons:
                reasons.append(why)
            cells.append(WORDS.get(doing) or f"no ({reasons.index(why) + 1})")
        lines.append(f"| {NAMES.get(verb, verb)} | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {why}" for number, why in enumerate(reasons, 1))]
    return "\n".join(lines)


def page(text: str) -> str:
    """The page with the table as the code has it now."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    write_atomically(PAGE, page(PAGE.read_text(encoding="utf-8")).encode())
