"""Writes docs/recipe-keys.md, every key of a recipe, from the structs that read it: `python -m docs.recipe_keys`.

A key's meaning is the docstring or the comment at its field. Both are gone at run time, so they are read from the source.
"""

from __future__ import annotations

import ast
import inspect
import math
import sys
import types
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from midwatch.objectives.registry import built_in
from midwatch.objectives.setting import Setting, settings_of
from midwatch.recipe import Recipe, Stage
from midwatch.recipe.objective_settings import FIELD
from midwatch.run_directory import write_atomically

PAGE = Path(__file__).with_name("recipe-keys.md")
HEAD = """# Recipe keys

Every key of a [recipe](recipe.md), with its type, default, possible values and meaning. A key that is unknown, of the wrong type or
out of bounds is an error that names the line. Sizes that do not fit together are refused too; `midwatch check` says which.

This page is generated from the code: `python -m docs.recipe_keys`.
"""


class Table(NamedTuple):
    """A table of a recipe: `path` is `stage.rollout`, `many` says whether it is written `[[...]]`."""

    path: str
    struct: type[msgspec.Struct]
    many: bool

    @property
    def heading(self) -> str:
        return f"[[{self.path}]]" if self.many else f"[{self.path}]"


class Key(NamedTuple):
    name: str
    kind: str
    default: str
    bounds: str
    meaning: str


def tables() -> Iterator[Table]:
    """All tables, in the order in which the recipe's struct names them, each before those inside it."""

    def visit(struct: type[msgspec.Struct], path: str) -> Iterator[Table]:
        hints = typing.get_type_hints(struct)
        for field in msgspec.structs.fields(struct):
            inner, many = _struct_in(hints[field.name])
            if inner is not None:
                place = f"{path}.{field.encode_name}".lstrip(".")
                yield Table(place, inner, many)
                yield from visit(inner, place)

    yield from visit(Recipe, "")


def _struct_in(hint: Any) -> tuple[type[msgspec.Struct] | None, bool]:
    """The struct that a field holds, if it does, and whether it holds a list of them."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return hint, False
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType, tuple, typing.Annotated):
        for argument in arguments:
            inner, _ = _struct_in(argument)
            if inner is not None:
                return inner, origin is tuple
    return None, False


def keys(table: Table) -> list[Key]:
    """The keys of a table. Those that hold tables link to the sections of these."""
    hints = typing.get_type_hints(table.struct, include_extras=True)
    meanings, bounds = _meanings(table.struct), _bounds(table.struct)
    found = []
    for field in msgspec.structs.fields(table.struct):
        if (table.struct, field.name) == (Stage, FIELD):
            continue  # an objective's own keys, which have tables of their own
        hint = hints[field.name]
        inner, many = _struct_in(hint)
        if inner is not None:
            name = f"{table.path}.{field.encode_name}"
            kind = f"[{'list of tables' if many else 'table'}](#{_anchor(name)})"
        else:
            kind = kind_of(hint)
        limits = "; ".join(filter(None, (_choices(hint), _metadata(hint) or bounds.get(field.encode_name, ""))))
        found.append(Key(field.encode_name, kind, default_of(field), limits, meanings.get(field.name, "")))
    return found


def objective_keys(struct: type[msgspec.Struct]) -> list[Key]:
    """The keys of a stage that are an objective's own."""
    hints, settings = typing.get_type_hints(struct, include_extras=True), settings_of(struct)
    found = []
    for field in msgspec.structs.fields(struct):
        setting, hint = settings[field.name], hints[field.name]
        limits = "; ".join(filter(None, (_choices(hint), _span(setting))))
        live = f" Live: {setting.live[0]:g} to {setting.live[1]:g}." if setting.live else ""
        meaning = setting.help[:1].upper() + setting.help[1:].rstrip(".") + "."
        found.append(Key(field.encode_name, kind_of(hint), default_of(field), limits, meaning + live))
    return found


def _span(setting: Setting) -> str:
    least = f"{'> ' if setting.above else '≥ '}{setting.least:g}" if setting.least > -math.inf else ""
    most = f"≤ {setting.most:g}" if setting.most < math.inf else ""
    return ", ".join(filter(None, (least, most)))


def kind_of(hint: Any) -> str:
    """A type in the words of TOML."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return kind_of(arguments[0])
    if origin is typing.Literal:
        return " or ".join(dict.fromkeys(kind_of(type(value)) for value in arguments))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(kind_of(each) for each in arguments if each is not type(None)))
    if origin is tuple:
        of = [each for each in arguments if each is not Ellipsis]
        return f"list of {kind_of(of[0])}" if Ellipsis in arguments else f"list of {len(of)} {kind_of(of[0])}s"
    if origin is dict:
        return f"table of {kind_of(arguments[1])}"
    names = {int: "integer", float: "number", str: "string", bool: "boolean", Any: "anything"}
    return names[hint]


def _choices(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{_toml(value)}`" for value in typing.get_args(hint))
    parts = (_choices(each) for each in typing.get_args(hint) if not isinstance(each, (str, int, float, bool)))
    return "; ".join(filter(None, parts))


def _metadata(hint: Any) -> str:
    """Bounds that are part of the type."""
    for each in typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else ():
        if isinstance(each, msgspec.Meta):
            signs = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
            return ", ".join(f"{sign} {getattr(each, key):,}" for key, sign in signs.items() if getattr(each, key) is not None)
    return ""


def default_of(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
    if value is None or isinstance(value, msgspec.Struct):
        return ""
    return f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(each)}" for key, each in value.items()) + "}"
    return f"{value:g}" if isinstance(value, float) else str(value)


@cache
def _source(module: str) -> tuple[ast.Module, list[str]]:
    text = inspect.getsource(sys.modules[module])
    return ast.parse(text), text.splitlines()


def _class(struct: type) -> ast.ClassDef:
    tree, _ = _source(struct.__module__)
    return next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == struct.__name__)


def _meanings(struct: type) -> dict[str, str]:
    """What is written at each field: the string below it, or the comment behind it."""
    found: dict[str, str] = {}
    for each in reversed(struct.__mro__):
        if each is msgspec.Struct or not issubclass(each, msgspec.Struct):
            continue
        _, lines = _source(each.__module__)
        body = _class(each).body
        for node, after in zip(body, [*body[1:], None], strict=True):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            assert node.end_lineno is not None and node.end_col_offset is not None
            # ast counts columns in bytes
            behind = lines[node.end_lineno - 1].encode()[node.end_col_offset :].decode().strip()
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
                found[node.target.id] = " ".join(after.value.value.split())
            elif behind.startswith("#") and not behind.startswith(("# noqa", "# type")):
                found[node.target.id] = behind.lstrip("# ")
    return found


def _bounds(struct: type) -> dict[str, str]:
    """The limits that a struct's `problems` puts on its keys by `bounded(self, least, most, keys)`, and a module's table `MOST`."""
    found: dict[str, str] = {}
    for each in struct.__mro__:
        if each is msgspec.Struct or not issubclass(each, msgspec.Struct):
            continue
        names = vars(sys.modules[each.__module__])
        text = ast.unparse(_class(each))
        if "in MOST.items()" in text:
            found |= {key: f"1 to {most:,}" for key, most in names["MOST"].items()}
        for node in ast.walk(_class(each)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "bounded":
                least, most = (eval(ast.unparse(argument), dict(names)) for argument in node.args[1:3])
                found |= dict.fromkeys(ast.literal_eval(node.args[3]), f"{least:,} to {most:,}")
    return found


def _anchor(path: str) -> str:
    return path.replace(".", "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def page() -> str:
    parts = [HEAD]
    for table in tables():
        parts.append(f"\n## `{table.heading}`\n")
        about = ast.get_docstring(_class(table.struct))
        if about:
            parts.append(f"\n{about}\n")
        parts.append(f"\n{_HEADER}")
        for key in keys(table):
            cells = (f"`{key.name}`", key.kind, key.default, key.bounds, key.meaning)
            parts.append(_row(cells))
        if table.struct is Stage:
            for spec in built_in():
                if own := objective_keys(spec.settings):
                    parts.append(f"\n### Of objective `{spec.name}`\n\n{spec.summary}\n\n{_HEADER}")
                    parts += [_row((f"`{key.name}`", key.kind, key.default, key.bounds, key.meaning)) for key in own]
    return "".join(parts)


_HEADER = "| key | type | default | values | meaning |\n| --- | --- | --- | --- | --- |\n"


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |\n".replace("|  |", "| |").replace("|  |", "| |")


if __name__ == "__main__":
    write_atomically(PAGE, page().encode())
