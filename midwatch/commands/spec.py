"""What a command is: its words, arguments and help, what each state makes of it, its key.

The command line, the screen's prompt and its completion, scripts, the actions of watch rules, the keys, the controller's checks and
the tables of the docs are made from these specs. Nothing heavy is imported: `midwatch --help` reads all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from midwatch.commands.states import Cell

if TYPE_CHECKING:
    from midwatch.protocol import Snapshot, State

Kind = Literal["text", "whole number", "number"]
Choices = Callable[["Snapshot"], Iterable[str]]
"""Values that make sense for a run; more may be possible."""


class Argument(NamedTuple):
    """An argument of a command. It is typed as a word at its place, as `--name value`, or never (a screen fills it in)."""

    name: str
    """As it is sent. The option is called the same, with `-` in place of `_`."""
    help: str
    kind: Kind = "text"
    metavar: str = ""
    place: bool = True
    """It is a word at its place."""
    option: bool = False
    """It is an option. With `place`, either will do."""
    required: bool = False
    default: str = ""
    """What is sent if nothing is given; empty: the argument is not sent."""
    rest: bool = False
    """It takes all words that follow, as one text."""
    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    neutral: float | None = None
    """The value that means the same as none."""
    choices: Choices | None = None

    @property
    def shown(self) -> str:
        """What stands for its value in a usage."""
        return self.metavar or self.name.upper().replace("_", "-")

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    def convert(self, word: str) -> str | int | float:
        """The value that a word means. Raises ValueError with a reason for an operator."""
        if self.kind == "text":
            return word
        try:
            return int(word) if self.kind == "whole number" else float(word)
        except ValueError:
            raise ValueError(f"{word!r} is not a {self.kind}") from None

    def problem(self, value: object) -> str:
        """Why this cannot be the argument's value; empty if it can."""
        if self.kind == "text":
            return "" if isinstance(value, str) else f"{value!r} is not a text"
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "whole number" else (int, float)):
            return f"{value!r} is not a {self.kind}"
        if not math.isfinite(value):
            return f"{value!r} is not a finite number"
        if not (value >= self.least and value > self.above and value <= self.most):
            return f"{value!r} must be {self._bounds()}"
        return ""

    def _bounds(self) -> str:
        bounds = {"at least": self.least, "above": self.above, "at most": self.most}
        return " and ".join(f"{words} {bound:g}" for words, bound in bounds.items() if math.isfinite(bound))


class CommandKey(NamedTuple):
    """The key that gives a command on the screen."""

    key: str
    help: str
    short: str = ""
    """In the footer; empty: it is not there."""
    view: str = ""
    """The view in which it works; empty: in all of them."""


class CommandSpec(NamedTuple):
    """One command."""

    verb: str
    """Its name in messages and in the journal."""
    help: str
    done: str
    """What is true when it is done."""
    states: Mapping[State, Cell]
    words: str = ""
    """The words it is typed by, as `node drain`; empty: the verb. Commands that share them differ by their `flag`."""
    flag: str = ""
    """The option that tells it from another command of the same words, as `--now`."""
    arguments: tuple[Argument, ...] = ()
    order: str = ""
    """What the ranks are sent, by its name in `protocol.Op`; empty: they are not concerned."""
    at_once: bool = False
    """It does not wait in line behind other commands."""
    confirm: bool = False
    """Something is lost by it: a screen asks first."""
    by_rule: bool = True
    """A watch rule may give it."""
    leaves_hold: bool = False
    """It moves on a run that is paused or released. A script then does not wait for the command's step, which cannot come."""
    pair: bool = False
    """Its two arguments may be typed as `KEY=VALUE`."""
    key: CommandKey | None = None

    @property
    def name(self) -> str:
        return self.words or self.verb

    @property
    def typed(self) -> str:
        """The words and the flag, without arguments."""
        return f"{self.name} {self.flag}".rstrip()

    @property
    def typed_arguments(self) -> tuple[Argument, ...]:
        return tuple(each for each in self.arguments if each.place or each.option)

    def problem(self, arguments: Mapping[str, Any]) -> str:
        """Why these arguments cannot be sent; empty if they can."""
        known = {each.name: each for each in self.arguments}
        for name in arguments:
            if name not in known:
                return f"{self.verb}: unknown argument {name!r}"
        for name, argument in known.items():
            value = arguments.get(name)
            if value is None:
                if argument.required or argument.default:
                    return f"{self.verb}: the argument {name!r} is missing"
            elif problem := argument.problem(value):
                return f"{self.verb}: {name}: {problem}"
        return ""
