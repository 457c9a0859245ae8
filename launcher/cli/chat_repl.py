"""A conversation at the terminal: lines are prompts, and lines that begin with `/` change what is asked, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TextIO

import msgspec

from midwatch import protocol as p
from shards.common.terminal import write_out

HELP = """\
/checkpoint ID      talk to another one: its id, a step, newest or golden
/against ID         and to a second one beside it; /against alone ends that
/form chat|text     through the chat template, or continued as it is; /form auto by the checkpoint's stage
/temperature X      0: always the likeliest token; likewise /top_p, /top_k, /limit, /seed
/again              the last prompt once more, with the next seed
/clear              forget the conversation
/quit               or Ctrl-D; Ctrl-C ends an answer
a line that is to begin with / begins with //"""

Show = Callable[[p.ProbeAsk, TextIO | None], tuple[int, list[str]]]
"""Writes the answers to an ask; how many failed, and their texts."""
NUMBERS: dict[str, type[Any]] = {"temperature": float, "top_p": float, "top_k": int, "limit": int, "seed": int}


class Talk:
    def __init__(self, ask: p.ProbeAsk, show: Show, read: Callable[[str], str] = input, out: TextIO | None = None) -> None:
        """ask: the settings to begin with. read: a line, after a prompt."""
        self._ask, self._show, self._read, self._out = ask, show, read, out
        self._turns: list[list[p.ProbeTurn]] = [[] for _ in ask.checkpoints]

    def run(self) -> int:
        """Until its end; the exit status."""
        if self._read is input:
            import readline  # noqa: F401  # it edits what `input` reads

        write_out(f"talking to {' and '.join(self._ask.checkpoints)}; /help lists the commands, Ctrl-D ends", to=self._out)
        while True:
            try:
                line = self._read("> ")
            except (EOFError, KeyboardInterrupt):
                write_out(to=self._out)
                return 0
            except UnicodeDecodeError:
                write_out("that line is not UTF-8; set the terminal or the locale to UTF-8", to=self._out)
                continue
            if line.strip() == "/quit":
                return 0
            if line.startswith("/") and not line.startswith("//"):
                self._change(line[1:].strip())
            elif line.strip():
                self._say(line[1:] if line.startswith("//") else line)

    def _say(self, prompt: str) -> None:
        self._set(prompt=prompt, turns=tuple(tuple(turns) for turns in self._turns))
        self._answer()

    def _answer(self) -> None:
        ask = self._ask
        try:
            failed, texts = self._show(ask, self._out)
        except KeyboardInterrupt:
            write_out(" (stopped)", to=self._out)
            return
        if not failed:
            said = p.ProbeTurn("user", ask.prompt)
            before = ask.turns or ((),) * len(texts)
            self._turns = [[*turns, said, p.ProbeTurn("assistant", text)] for turns, text in zip(before, texts, strict=True)]

    def _change(self, line: str) -> None:
        name, _, value = line.partition(" ")
        value = value.strip()
        if name == "checkpoint" and value:
            self._choose(value, *self._ask.checkpoints[1:])
        elif name == "against":
            self._choose(self._ask.checkpoints[0], *([value] if value else []))
        elif name == "form" and value in ("auto", "chat", "text"):
            self._set(form=value)
        elif name in NUMBERS:
            try:
                self._set(**{name: NUMBERS[name](value)})
            except ValueError:
                write_out(f"/{name}: {value!r} is not a number", to=self._out)
        elif name == "clear":
            self._turns = [[] for _ in self._ask.checkpoints]
        elif name == "again" and self._ask.prompt:
            self._set(seed=self._ask.seed + 1)
            self._answer()
        else:
            write_out(HELP, to=self._out)

    def _choose(self, *checkpoints: str) -> None:
        """What was said to others is not this one's conversation."""
        self._set(checkpoints=checkpoints, turns=())
        self._turns = [[] for _ in checkpoints]

    def _set(self, **changes: Any) -> None:
        self._ask = msgspec.structs.replace(self._ask, **changes)
