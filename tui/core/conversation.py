"""A conversation with checkpoints: what was asked and answered, broken into lines, and what each token could have been.

Pure functions on plain data; `tui.views.probe` shows them.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import NamedTuple

from midwatch.protocol import ProbeAnswer, ProbeBegan, ProbeEnd, ProbeToken, ProbeTurn
from tui.chart.sparkline import bar
from tui.chart.styles import Ink
from tui.chart.text import SECOND, spaced
from tui.core.formatting import UNICODE, plural
from tui.core.text_panel import Line, Run, wrapped

NEWLINE = "↵" if UNICODE else "\\"
CHOSEN = "▸" if UNICODE else ">"
MOST_BAR = 60


@dataclass
class Answer:
    """A checkpoint's, as far as it has come."""

    checkpoint: str
    began: ProbeBegan | None = None
    tokens: list[ProbeToken] = field(default_factory=list)
    end: ProbeEnd | None = None

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens) + (self.end.text if self.end is not None else "")

    def take(self, message: ProbeAnswer) -> None:
        match message:
            case ProbeBegan():
                self.began, self.checkpoint = message, message.checkpoint
            case ProbeToken():
                self.tokens.append(message)
            case ProbeEnd():
                self.end = message

    def stop(self) -> None:
        """What is not over is ended by the operator."""
        if self.end is None:
            self.end = ProbeEnd(ask=0, which=0, checkpoint=self.checkpoint, finish="aborted", tokens=len(self.tokens))


@dataclass
class Exchange:
    prompt: str
    answers: list[Answer]


def turns(exchanges: Sequence[Exchange], count: int) -> tuple[tuple[ProbeTurn, ...], ...]:
    """The conversation with each of `count` checkpoints; what failed was not said."""
    said: list[list[ProbeTurn]] = [[] for _ in range(count)]
    for exchange in exchanges:
        for own, answer in zip(said, exchange.answers, strict=True):
            if answer.end is None or not answer.end.problem:
                own += [ProbeTurn("user", exchange.prompt), ProbeTurn("assistant", answer.text)]
    return tuple(tuple(own) for own in said)


class TokenPosition(NamedTuple):
    """Where a token stands: its first character that is no space, else its first."""

    line: int
    column: int


class Page(NamedTuple):
    lines: list[Line]
    marks: dict[int, TokenPosition]
    """Of the newest answer's tokens."""


def page(exchanges: Sequence[Exchange], which: int, cells: int, cursor: int | None) -> Page:
    """One checkpoint's side of the conversation; the token at the cursor stands out."""
    lines: list[Line] = []
    marks: dict[int, TokenPosition] = {}
    blank: set[int] = set()
    for exchange in exchanges:
        if lines:
            lines.append([])
        lines += [
            [("> " if n == 0 else "  ", Ink.KEY), *line]
            for n, line in enumerate(wrapped(spaced(exchange.prompt), cells - 2, Ink.ACTIVE))
        ]
        answer = exchange.answers[which]
        newest = exchange is exchanges[-1]
        for row in broken(_characters(answer, cursor if newest else None), max(1, cells)):
            for column, (char, token) in enumerate(row if newest else ()):
                if token not in marks or (token in blank and char != " "):
                    marks[token] = TokenPosition(len(lines), column)
                    (blank.add if char == " " else blank.discard)(token)
            at = cursor if newest else None
            parts = groupby(row, key=lambda each: each[1] == at)
            lines.append([("".join(char for char, _ in part), Ink.HERE if here else Ink.TEXT) for here, part in parts])
        if answer.end is not None and answer.end.problem:
            lines += wrapped(answer.end.problem, cells, Ink.WARNING)
        elif answer.began is None and answer.end is None:
            lines.append([("loading the weights; the first answer takes a few seconds", Ink.FAINT)])
    return Page(lines, marks)


def _characters(answer: Answer, cursor: int | None) -> list[tuple[str, int]]:
    """The text by characters, each with its token; one that shows nothing is shown by its name while the cursor is on it."""
    found: list[tuple[str, int]] = []
    for number, token in enumerate(answer.tokens):
        words = spaced(token.text.expandtabs(4))
        if number == cursor and not words.strip("\n"):
            words = (NEWLINE if words else token.piece) + words
        found += [(char, number) for char in words]
    if answer.end is not None:
        found += [(char, len(answer.tokens)) for char in spaced(answer.end.text)]
    return found


def broken(chars: Sequence[tuple[str, int]], cells: int) -> list[list[tuple[str, int]]]:
    """Lines of at most `cells`: broken at line ends, after a space where there is one, else anywhere."""
    rows: list[list[tuple[str, int]]] = []
    row: list[tuple[str, int]] = []
    space = 0
    """Length of the row with its last space that is not an indent; 0: there is none."""
    for char in chars:
        if char[0] == "\n":
            rows.append(row)
            row, space = [], 0
            continue
        if len(row) == cells:
            cut = space or (cells - 1 if char[0] == SECOND and cells > 1 else cells)
            rows.append(row[:cut])
            row, space = row[cut:], 0
        row.append(char)
        if char[0] == " " and any(before != " " for before, _ in row):
            space = len(row)
    return [*rows, row] if row else rows


def beside(marks: dict[int, TokenPosition], cursor: int, by: int) -> int | None:
    """The token above (-1) or below (1) one, the nearest in its column; None where there is none."""
    before = [token for token in marks if token <= cursor]  # one that shows nothing stands with what comes before it
    if not before:
        return None
    at = marks[max(before)]
    row = [(abs(mark.column - at.column), token) for token, mark in marks.items() if mark.line == at.line + by]
    return min(row)[1] if row else None


def heading(answer: Answer | None, name: str, active: bool) -> Line:
    """Whose column it is, and how its newest answer went."""
    ink = Ink.TITLE if active else Ink.TEXT
    sign = f"{CHOSEN} " if active else "  "
    if answer is None:
        return [(sign, ink), (name, ink)]
    began, end = answer.began, answer.end
    named: list[Run] = [(sign, ink), (answer.checkpoint, ink)]
    if began is not None:
        named.append((f" {began.stage}, {began.form}", Ink.FAINT))
    if end is None:
        figures = plural(len(answer.tokens), "token")
    elif end.problem:
        return [*named, ("  failed", Ink.WARNING)]
    else:
        speed = f", {end.tokens_per_second:.1f}/s" if end.seconds else ""
        score = f", score {end.score:.3f}" if end.score is not None else ""
        how = {"stop": "ended", "length": "cut at its limit", "aborted": "stopped"}[end.finish]
        figures = f"{plural(end.tokens, 'token')}{speed}, {how}{score}"
    return [*named, (f"  {figures}", Ink.FAINT)]


def bars(answer: Answer | None, cursor: int | None, cells: int, rows: int) -> list[Line]:
    """What could have stood where the cursor is, the likeliest first, in `rows` lines: the first one tells the token itself."""
    if answer is None or not answer.tokens or rows < 2:
        return []
    at = len(answer.tokens) - 1 if cursor is None else min(cursor, len(answer.tokens) - 1)
    token = answer.tokens[at]
    place = f"token {at + 1} of {len(answer.tokens)}"
    told = f"  log p {token.log_prob:.2f} nats; likeliest here:"
    lines: list[Line] = [[(f" {place} ", Ink.FAINT), (_quoted(token.piece), Ink.TITLE), (told, Ink.FAINT)]]
    shown = list(token.alternatives[: rows - 1])
    if shown and token.piece not in [piece for piece, _ in shown]:
        shown[-1] = (token.piece, math.exp(token.log_prob))
    name = min(18, max(8, cells // 4))
    room = min(MOST_BAR, cells - name - 11)
    for piece, chance in shown:
        drawn = piece == token.piece
        ink = Ink.ACTIVE if drawn else Ink.TEXT
        lines.append(
            [
                (f" {CHOSEN if drawn else ' '} ", ink),
                (_quoted(piece)[:name].ljust(name), ink),
                (f"{100 * chance:5.1f}% ", ink),
                *bar(chance, room, UNICODE, Ink.ACTIVE if drawn else Ink.MARK),
            ]
        )
    return lines


def _quoted(piece: str) -> str:
    """In quotes, so that its spaces show; line ends and the like as escapes."""
    shown = piece if piece.isprintable() else piece.encode("unicode_escape").decode()
    return f"'{spaced(shown)}'"
