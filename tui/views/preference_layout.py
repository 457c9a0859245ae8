"""A pair of answers beside each other, and how far an annotator is. Pure functions on plain data; `tui.views.prefer` shows them."""

from midwatch.protocol import Agreement, Choice, PreferencePair, PreferenceState, Share
from tui.chart.formatting import UNICODE, plural
from tui.chart.styles import Ink
from tui.chart.text import spaced
from tui.core.conversation import broken
from tui.core.text_panel import Line, joined, width, wrapped

ARROWS = ("←", "→") if UNICODE else ("Left", "Right")
WORDS: dict[Choice, str] = {
    "left": "the left one is better",
    "right": "the right one is better",
    "tie": "a tie",
    "both-bad": "both bad",
    "skip": "skipped",
}


def prompt(pair: PreferencePair, cells: int) -> list[Line]:
    """What was asked: each message behind who says it, unless one user's is all there is."""
    lines: list[Line] = []
    for turn in pair.prompt:
        head = "> " if len(pair.prompt) == 1 else f"{turn.role}: "
        body = wrapped(spaced(turn.text.expandtabs(4)), max(1, cells - len(head)), Ink.ACTIVE if turn.role == "user" else Ink.TEXT)
        lines += [[(head if n == 0 else " " * len(head), Ink.KEY), *line] for n, line in enumerate(body)]
    return lines


def answer(text: str, cells: int) -> list[Line]:
    if not text.strip():
        return [[("(an empty answer)", Ink.FAINT)]]
    rows = broken([(char, 0) for char in spaced(text.expandtabs(4)).rstrip("\n")], max(1, cells))
    return [[("".join(char for char, _ in row), Ink.TEXT)] for row in rows]


def heading(side: int, stacked: bool, place: str, chosen: bool) -> Line:
    """Over an answer: how it is chosen, and how much of it is in sight."""
    name = (("upper", "lower") if stacked else ("left", "right"))[side]
    ink = Ink.HERE if chosen else Ink.TITLE
    more = f"  {place}" if place not in ("", "all") else ""
    return [(f" {ARROWS[side]} {side + 1} ", ink), (f" {name} ", ink if chosen else Ink.TEXT), (more, Ink.FAINT)]


def progress(state: PreferenceState) -> Line:
    """How far the annotator is."""
    parts: list[Line] = [
        [(f" {state.annotator} ", Ink.TITLE)],
        [(f"{state.today} today", Ink.TEXT)],
        [(f"{state.total} in all", Ink.TEXT)],
    ]
    if state.seconds is not None:
        parts.append([(f"{state.seconds:.1f} s each", Ink.TEXT)])
    parts.append([(f"{plural(state.left, 'prompt')} left", Ink.FAINT)])
    if state.pair is not None and state.pair.shared:
        parts.append([("all get this one", Ink.FAINT)])
    return joined(parts)


def agreement(found: Agreement, cells: int) -> Line:
    """Between annotators, with the reward model, and between the sides; the last give way where there is no room."""
    if found.measure:
        value = f"{found.value:.2f}" if found.value is not None else "-"
        pairs = f" on {plural(found.pairs, 'pair')} of {found.annotators}"
        between: Line = [(f" {found.measure} ", Ink.FAINT), (value, Ink.TEXT), (pairs, Ink.FAINT)]
    else:
        between = [(" no pair decided by two yet", Ink.FAINT)]
    parts = [between, _share("reward model agrees ", found.reward), _share("left side ", found.left)]
    while len(parts) > 1 and width(joined(parts)) > cells:
        parts.pop()
    return joined(parts)


def _share(name: str, found: Share) -> Line:
    if found.low is None or found.high is None:
        return ()
    part = f"{100 * found.hits / found.count:.0f}%"
    return [(name, Ink.FAINT), (part, Ink.TEXT), (f" ({100 * found.low:.0f}-{100 * found.high:.0f}) of {found.count}", Ink.FAINT)]
