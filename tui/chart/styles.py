"""Inks: the few styles that charts and strips are drawn with, and the night-time colours they stand for.

Red is kept for alarm. Every difference that colour makes, a letter, a character or a weight makes too, so nothing is
lost where there is none (NO_COLOR, 16 colours, colour blindness).
"""

from enum import IntEnum, auto

from rich.style import Style


class Ink(IntEnum):
    """What a run of text is, and so how it looks."""

    BLANK = 0
    TEXT = auto()
    TITLE = auto()
    FAINT = auto()
    AXIS = auto()
    GHOST = auto()  # a rolled-back lineage
    BORDER = auto()  # between stages
    CROSSHAIR = auto()
    MARK = auto()
    GOLD = auto()
    ALARM = auto()
    HEAT_0 = auto()
    HEAT_1 = auto()
    HEAT_2 = auto()
    HEAT_3 = auto()
    HEAT_4 = auto()
    DONE = auto()
    ACTIVE = auto()
    LINE_0 = auto()
    LINE_1 = auto()
    LINE_2 = auto()
    LINE_3 = auto()
    LINE_4 = auto()
    LINE_5 = auto()
    RAW_0 = auto()  # a line's raw values, under its smoothing
    RAW_1 = auto()
    RAW_2 = auto()
    RAW_3 = auto()
    RAW_4 = auto()
    RAW_5 = auto()
    KEY = auto()
    HERE = auto()  # the view that is open, what is chosen
    WARNING = auto()
    BADGE_GOOD = auto()  # the run's state
    BADGE_HOLD = auto()
    BADGE_ALARM = auto()
    BADGE_QUIET = auto()


LINES = 6


def line_ink(number: int) -> Ink:
    """The ink of the number-th line; they repeat after LINES, letters do not."""
    return Ink(Ink.LINE_0 + number % LINES)


def raw_ink(number: int) -> Ink:
    return Ink(Ink.RAW_0 + number % LINES)


# Okabe and Ito's colour-blind safe hues, softened for a dark room, without their red.
_HUES = ("#7ab8e0", "#e0b070", "#7fc7a5", "#c99bc9", "#d9cf7a", "#8fa3d8")
_SHADES = ("#3d5c70", "#705838", "#406453", "#644e64", "#6c683d", "#48526c")

STYLES: dict[int, Style] = {
    Ink.BLANK: Style(),
    Ink.TEXT: Style.parse("#b8c0cc"),
    Ink.TITLE: Style.parse("bold #d0d7e2"),
    Ink.FAINT: Style.parse("#6b7585"),
    Ink.AXIS: Style.parse("#4a5260"),
    Ink.GHOST: Style.parse("dim #66707e"),
    Ink.BORDER: Style.parse("#5f6b80"),
    Ink.CROSSHAIR: Style.parse("bold #d0d7e2"),
    Ink.MARK: Style.parse("#9fb4cc"),
    Ink.GOLD: Style.parse("bold #e5c76b"),
    Ink.ALARM: Style.parse("bold #e06c6c"),
    Ink.HEAT_0: Style.parse("#4a5260"),
    Ink.HEAT_1: Style.parse("#4f7a8c"),
    Ink.HEAT_2: Style.parse("#5f9ea0"),
    Ink.HEAT_3: Style.parse("#7fc7a5"),
    Ink.HEAT_4: Style.parse("#b5dc9a"),
    Ink.DONE: Style.parse("#7fc7a5"),
    Ink.ACTIVE: Style.parse("bold #7ab8e0"),
    Ink.KEY: Style.parse("bold #9fb4cc"),
    Ink.HERE: Style.parse("bold reverse #9fb4cc"),
    Ink.WARNING: Style.parse("#e5c76b"),
    Ink.BADGE_GOOD: Style.parse("bold reverse #7fc7a5"),
    Ink.BADGE_HOLD: Style.parse("bold reverse #e5c76b"),
    Ink.BADGE_ALARM: Style.parse("bold reverse #e06c6c"),
    Ink.BADGE_QUIET: Style.parse("bold reverse #8a94a6"),
    **{Ink.LINE_0 + number: Style.parse(hue) for number, hue in enumerate(_HUES)},
    **{Ink.RAW_0 + number: Style.parse(f"dim {shade}") for number, shade in enumerate(_SHADES)},
}
