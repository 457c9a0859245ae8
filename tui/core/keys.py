"""The keys: they drive dispatch, the footer, the help and docs/keys.md alike.

A key's action `open:watch` calls `do_open("watch")` on the view that is open, or on the app where the view has no such method. The
keys of commands are in the commands' specs; their action is `command:VERB`. Keys are plain letters and arrows: terminals and
multiplexers lose the others.
"""

import functools
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from midwatch.commands import SPECS


class Key(NamedTuple):
    keys: tuple[str, ...]  # as Textual names them
    shown: str
    text: str  # in the help
    action: str
    short: str = ""  # in the footer; empty: not there
    changes: bool = False  # asks something of the run: not bound on a read-only screen
    planned: bool = False  # not there yet


class ViewSpec(NamedTuple):
    """A view as it has registered itself."""

    key: str
    """The letter that opens it; empty: it has no tab."""
    name: str
    text: str
    """In the help."""
    place: int
    """Among the tabs, from the left."""
    keys: tuple[Key, ...]
    """Its own, which go before everybody's."""
    make: Callable[..., Any]
    """The class of its widget."""


ViewClass = TypeVar("ViewClass", bound=type)
_registered: dict[str, ViewSpec] = {}


def register(key: str, name: str, text: str, *, place: int, keys: tuple[Key, ...]) -> Callable[[ViewClass], ViewClass]:
    """A decorator for the class of a view. Every module of `tui.views` is imported before views are asked for."""

    def decorate(kind: ViewClass) -> ViewClass:
        _registered[name] = ViewSpec(key, name, text, place, keys, kind)
        return kind

    return decorate


@functools.cache
def _all() -> dict[str, ViewSpec]:
    package = importlib.import_module("tui.views")
    for module in pkgutil.walk_packages(package.__path__, "tui.views."):
        importlib.import_module(module.name)
    return {spec.name: spec for spec in sorted(_registered.values(), key=lambda spec: spec.place)}


def view(name: str) -> ViewSpec:
    return _all()[name]


def views() -> tuple[ViewSpec, ...]:
    """Those with a tab, from the left."""
    return tuple(spec for spec in _all().values() if spec.key)


def of_view(name: str) -> tuple[Key, ...]:
    """A view's own keys."""
    spec = _all().get(name)
    return spec.keys if spec is not None else ()


def all_of_views() -> dict[str, tuple[Key, ...]]:
    """Each view's own keys, in the order of the tabs."""
    return {spec.name: spec.keys for spec in _all().values()}


PLANNED = (("d", "data", "what was read: mixture against target, any past batch as text"),)
"""Views that are not there yet: letter, name, text."""


def commands(view: str = "") -> tuple[Key, ...]:
    """The keys that give commands in this view; without one, everywhere."""
    bound = [(spec.verb, spec.key) for spec in SPECS if spec.key is not None and spec.key.view == view]
    return tuple(Key((key.key,), key.key, key.help, f"command:{verb}", key.short, changes=True) for verb, key in bound)


COMMANDS = commands()


@functools.cache
def everywhere() -> tuple[Key, ...]:
    """The keys that work in every view, unless the view has them itself."""
    return (
        *(Key((each.key,), each.key, f"{each.name}: {each.text}", f"open:{each.name}") for each in views()),
        *COMMANDS,
        Key(("colon",), ":", "a command line; Tab completes, arrows go through what was typed before", "prompt", "type"),
        Key(("question_mark",), "?", "this help", "open:help"),
        Key(("H",), "H", "stacks of the last hang, in logs", "stacks"),
        Key(("escape",), "Esc", "go back; hide a notice", "back"),
        Key(("q",), "q", "detach: the run goes on without this screen", "detach", "detach"),
        *(Key((key,), key, f"{name}: {text}", f"missing:{name}", planned=True) for key, name, text in PLANNED),
    )


MOVE = (
    Key(("up",), "↑", "up", "move:-1"),
    Key(("down",), "↓", "down", "move:1"),
    Key(("pageup",), "PgUp", "a page up", "page:-1"),
    Key(("pagedown", "space"), "PgDn", "a page down", "page:1"),
    Key(("home",), "Home", "to the first", "end:-1"),
    Key(("end", "G"), "End", "to the last", "end:1"),
)
READ = (
    Key(("enter",), "Enter", "the line whole, and back", "whole", "whole"),
    Key(("less_than_sign",), "<", "to the left", "shift:-1"),
    Key(("greater_than_sign",), ">", "to the right: what does not fit", "shift:1", "sideways"),
    Key(("W",), "W", "wrap long lines, or cut them", "wrap", "wrap"),
)
FILTER = Key(("slash",), "/", "filter by a regular expression; an empty one ends it", "filter", "filter")


def find(view: str, pressed: str) -> Key | None:
    """The key that was pressed, a view's own before everybody's."""
    return next((key for key in (*of_view(view), *everywhere()) if pressed in key.keys), None)
