"""A Jinja sandbox in which a template can take neither time nor memory beyond what its input accounts for.

Jinja's own sandbox keeps a template from Python's internals and bounds `range`; strings that double, nested loops and wide formats
go on for ever in it. Here each block that is entered and each value that is made costs its size, and what a render may spend is
counted, not measured by a clock: the same template and conversation come to the same end on every machine.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterable, Sized
from itertools import islice
from types import GeneratorType
from typing import Any

import jinja2
from jinja2 import nodes, pass_context
from jinja2.compiler import CodeGenerator, Frame
from jinja2.sandbox import ImmutableSandboxedEnvironment

SIZE, SIZE_FACTOR = 1 << 20, 20
"""Characters and items of one value: so many, and so many times the conversation's."""
WORK, WORK_FACTOR = 1 << 24, 200
"""The same of all values together, blocks included."""
ITEM = 16
"""Characters that an item of a list counts as."""
BITS = 1 << 14
"""Of an integer."""
_INSERTING = frozenset(["join", "indent", "wordwrap", "translate", "tojson"])
"""Filters and methods that put a text that they are given in several places of another value."""
_WIDE = re.compile(r"\d{6}")


class ExcessError(jinja2.TemplateRuntimeError):
    """The template asks for more than it may have."""


class RenderBudget:
    """What is left to one render of a conversation of so many characters."""

    def __init__(self, characters: int) -> None:
        self.size = SIZE + SIZE_FACTOR * characters
        self.work = WORK + WORK_FACTOR * characters

    def spend(self, amount: int) -> None:
        self.work -= amount
        if self.work < 0:
            raise ExcessError("it does not come to an end")

    def measure(self, *values: object) -> int:
        """Characters and items in plain values, those that stand in several places counted in each. Raises ExcessError."""
        total, left = 0, list(values)
        while left:
            value = left.pop()
            total += 1
            if isinstance(value, str | bytes):
                total += len(value)
            elif isinstance(value, list | tuple | set | frozenset):
                total += ITEM * len(value)
                left += value if total <= self.size else ()
            elif isinstance(value, dict):
                total += ITEM * len(value)
                left += [*value.keys(), *value.values()] if total <= self.size else ()
            elif isinstance(value, int) and value.bit_length() > BITS:
                raise ExcessError("it makes a number that is too large")
            if total > self.size:
                raise ExcessError("it makes a value that is too large")
        self.spend(total)
        return total

    def check_call(self, values: Iterable[object]) -> None:
        """Before a call: what it is given, and that an integer given to it is no count or width that makes too much of that."""
        plain = list(values)
        total = self.measure(*plain)
        largest = max((abs(each) for value in plain for each in _integers(value)), default=0)
        if total * largest > self.size * 16:
            raise ExcessError("it makes a value that is too large")


def _integers(value: object) -> Iterable[int]:
    if isinstance(value, int):
        return (value,)
    return [each for each in value if isinstance(each, int)] if isinstance(value, list | tuple) else ()


def _texts(values: Iterable[object]) -> Iterable[int]:
    """Lengths of the texts among values, and among those of tables."""
    for value in values:
        if isinstance(value, str):
            yield len(value)
        elif isinstance(value, dict):
            yield from _texts(value.values())


class _Spending(threading.local):
    budget = RenderBudget(0)


_spending = _Spending()


def bounded(render: Callable[[], str], characters: int) -> str:
    """What `render` of a template of this environment gives, for a conversation of so many characters."""
    before, _spending.budget = _spending.budget, RenderBudget(characters)
    try:
        return render()
    finally:
        _spending.budget = before


class _Generator(CodeGenerator):
    """Each block reports that it is entered, and each display of items what it holds."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        self.writeline("environment.enter()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.joined((")
        for each in node.nodes:
            self.visit(each, frame)
            self.write(", ")
        self.write("))")

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._sized(super().visit_List, node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._sized(super().visit_Dict, node, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._sized(super().visit_Tuple, node, frame)
        else:
            super().visit_Tuple(node, frame)

    def _sized(self, visit: Callable[[Any, Frame], None], node: nodes.Node, frame: Frame) -> None:
        self.write("environment.sized(")
        visit(node, frame)
        self.write(")")


@pass_context
def _finalize(_: Any, value: object) -> object:
    """Of what is written out. That it takes a context keeps Jinja from working out constants when it compiles."""
    _spending.budget.measure(value)
    return value


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Render with `bounded`."""

    code_generator_class = _Generator
    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(optimized=False, finalize=_finalize, **options)
        del self.globals["lipsum"]
        for name, filter in self.filters.items():
            self.filters[name] = self._bounded(filter, name)

    def add_filter(self, name: str, filter: Callable[..., Any]) -> None:
        self.filters[name] = self._bounded(filter, name)

    def enter(self) -> None:
        _spending.budget.spend(16)

    def sized(self, value: object) -> object:
        _spending.budget.measure(value)
        return value

    def joined(self, values: tuple[object, ...]) -> str:
        _spending.budget.measure(*values)
        return "".join(map(str, values))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        budget = _spending.budget
        if operator == "**" and isinstance(left, int) and isinstance(right, int) and left.bit_length() * max(right, 0) > BITS:
            raise ExcessError("it makes a number that is too large")
        if operator == "*":
            counts = [(a, b) for a, b in ((left, right), (right, left)) if isinstance(b, int) and not isinstance(a, int | float)]
            for items, count in counts:
                if budget.measure(items) * max(count, 0) > budget.size:
                    raise ExcessError("it makes a value that is too large")
        if operator == "%" and isinstance(left, str):
            self._check_format(left, (right,))
        return self.sized(super().call_binop(context, operator, left, right))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # as Jinja declares it
        # Jinja's sandbox puts a function of its own in the place of `str.format`.
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        values = (*args, *kwargs.values())
        if isinstance(owner, str) and getattr(__obj, "__name__", "") in ("format", "format_map"):
            __self._check_format(owner, values)
        elif isinstance(owner, str) and getattr(__obj, "__name__", "") == "replace" and len(args) > 1:
            __self._check_replacement(owner, args[0], args[1])
        elif isinstance(owner, str) and getattr(__obj, "__name__", "") in _INSERTING:
            __self._check_insertions((owner, *values))
        _spending.budget.check_call((owner, *values))
        return __self._whole(super().call(__context, __obj, *args, **kwargs))

    def _bounded(self, filter: Callable[..., Any], name: str) -> Callable[..., Any]:
        skipped = int(hasattr(filter, "jinja_pass_arg"))  # the environment, or a context

        @functools.wraps(filter)
        def called(*args: Any, **kwargs: Any) -> Any:
            given = (*args[skipped:], *kwargs.values())
            if name == "format" and given:
                self._check_format(str(given[0]), given[1:])
            elif name == "replace" and len(given) > 2:
                self._check_replacement(given[0], given[1], given[2])
            elif name in _INSERTING:
                self._check_insertions(given)
            _spending.budget.check_call(given)
            return self._whole(filter(*args, **kwargs))

        return called

    def _whole(self, value: Any) -> Any:
        """A call's result, measured; a generator as the list that it makes."""
        if isinstance(value, GeneratorType):
            value = list(islice(value, _spending.budget.size))
        return self.sized(value)

    def _check_format(self, text: str, values: tuple[object, ...]) -> None:
        if _WIDE.search(text):
            raise ExcessError("it asks for a wide field")
        _spending.budget.check_call((text, *values))

    def _check_insertions(self, values: tuple[object, ...]) -> None:
        """A text may be put between, or in the place of, each item or character of another value."""
        longest = max(_texts(values), default=0)
        items = max((len(value) for value in values if isinstance(value, Sized)), default=0)
        if longest * items > _spending.budget.size * 16:
            raise ExcessError("it makes a value that is too large")

    def _check_replacement(self, text: object, old: object, new: object) -> None:
        times = str(text).count(str(old)) if str(old) else len(str(text)) + 1
        if times * len(str(new)) > _spending.budget.size:
            raise ExcessError("it makes a value that is too large")
