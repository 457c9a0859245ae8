"""Names by which Textual finds things: handlers of messages, and the classes that styles are for. A rename must not lose them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import typing

import pytest
from textual.message import Message
from textual.widget import Widget

import tui


def classes() -> list[type]:
    modules = [importlib.import_module(each.name) for each in pkgutil.walk_packages(tui.__path__, "tui.")]
    found = {
        each for module in modules for _, each in inspect.getmembers(module, inspect.isclass) if each.__module__ == module.__name__
    }
    return sorted(found, key=lambda each: each.__qualname__)


CLASSES = classes()


@pytest.mark.parametrize(
    "each", [c for c in CLASSES if issubclass(c, Widget) and "DEFAULT_CSS" in vars(c)], ids=lambda c: c.__name__
)
def test_styles_are_for_the_class_that_has_them(each: type[Widget]) -> None:
    names = set(re.findall(r"(?:^|[},])\s*([A-Z]\w*)", each.DEFAULT_CSS))
    assert names <= {base.__name__ for base in each.__mro__}


@pytest.mark.parametrize("each", CLASSES, ids=lambda c: c.__name__)
def test_handlers_are_called_as_their_messages_are(each: type) -> None:
    for name, method in inspect.getmembers(each, inspect.isfunction):
        if name.startswith("on_") and method.__module__.startswith("tui.") and len(inspect.signature(method).parameters) == 2:
            message = next(iter(typing.get_type_hints(method, localns=dict(vars(each))).values()))
            if inspect.isclass(message) and issubclass(message, Message):
                assert name == message.handler_name
