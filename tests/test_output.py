"""Only `shards.common.terminal` prints: text from others reaches a terminal through it, made safe, and is never read as markup."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PRINTING = {"shards/common/terminal.py", "midwatch/terminal.py"}
"""The module that prints, and the one that passes its names on to the screen."""
PACKAGES = ("launcher", "midwatch", "shards", "tui", "trainer")
STREAM_QUESTIONS = {"isatty", "fileno", "flush", "encoding"}
"""What may be asked of a standard stream anywhere."""
MAKERS = {
    "Console": "make_console",
    "ArgumentParser": "Parser",
    "basicConfig": "log_to_stderr",
    "StreamHandler": "log_to_stderr",
    "Traceback": "write_error",
    "print_json": "write_json",
}
MARKUP_WIDGETS = {"Static", "Label", "Button", "TextColumn", "notify", "Checkbox", "RadioButton"}
"""They read markup from a string unless told not to."""
TITLES = {"border_title", "border_subtitle", "tooltip"}


def called(node: ast.Call) -> str:
    return node.func.id if isinstance(node.func, ast.Name) else node.func.attr if isinstance(node.func, ast.Attribute) else ""


def problems(source: str) -> list[str]:
    """Where a module prints by itself, or has markup read from text that it did not write."""
    tree = ast.parse(source)
    asked = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute) and node.attr in STREAM_QUESTIONS}
    found = []
    for node in ast.walk(tree):
        said = ""
        if isinstance(node, ast.Call):
            name = called(node)
            settings = {keyword.arg: keyword.value for keyword in node.keywords}
            markup = settings.get("markup")
            literal = bool(node.args) and isinstance(node.args[0], ast.Constant)
            off = isinstance(markup, ast.Constant) and markup.value is False
            if isinstance(node.func, ast.Name) and name == "print":
                said = "print (use write_out, write_error or write_json)"
            elif name in MAKERS:
                said = f"{name} (use {MAKERS[name]})"
            elif ast.unparse(node.func) == "os.write" and node.args and ast.unparse(node.args[0]) in ("1", "2"):
                said = "os.write to a standard stream"
            elif name in MARKUP_WIDGETS and not off and not (literal and name != "TextColumn"):
                said = f"{name} without markup=False"
            elif markup is not None and not off:
                said = f"{name} with markup"
            elif name in ("from_markup", "render_markup"):
                said = name
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "sys":
            if node.attr.strip("_") in ("stdout", "stderr") and id(node) not in asked:
                said = f"sys.{node.attr}"
        elif isinstance(node, ast.ImportFrom) and (
            node.module == "rich.markup" or (node.module == "rich" and any(alias.name == "print" for alias in node.names))
        ):
            said = f"import from {node.module}"
        elif (
            isinstance(node, ast.Assign)
            and any(isinstance(target, ast.Attribute) and target.attr in TITLES for target in node.targets)
            and not isinstance(node.value, ast.Constant)
            and not (isinstance(node.value, ast.Call) and called(node.value) == "Content")
        ):
            said = "a title that is read as markup (give a Content)"
        if said:
            found.append(f"line {getattr(node, 'lineno', 0)}: {said}")
    return found


def test_nothing_prints_but_the_module_that_makes_text_safe() -> None:
    files = sorted(f for package in PACKAGES for f in (ROOT / package).rglob("*.py"))
    assert len(files) > 200
    found = {str(f.relative_to(ROOT)): problems(f.read_text(encoding="utf-8")) for f in files}
    assert {name: wrong for name, wrong in found.items() if wrong and name not in PRINTING} == {}


@pytest.mark.parametrize(
    "line",
    [
        "print(name)",
        "print(name, file=sys.stderr)",
        "sys.stdout.write(name)",
        "sys.__stderr__.write(name)",
        "write = sys.stdout.buffer",
        "show(sys.stdout)",
        "os.write(1, name)",
        "Console().print(name)",
        "rich.console.Console(stderr=True)",
        "argparse.ArgumentParser(prog=name)",
        "logging.basicConfig(stream=stream)",
        "Static(name)",
        "Label(f'{name}')",
        "self.app.notify(name)",
        "TextColumn('{task.description}')",
        "console.print(name, markup=True)",
        "console.print(name, markup=given)",
        "Text.from_markup(name)",
        "from rich.markup import escape",
        "from rich import print",
        "box.border_title = name",
    ],
)
def test_each_way_around_it_is_found(line: str) -> None:
    assert problems(line)


@pytest.mark.parametrize(
    "line", ["sys.stdout.isatty()", "write_out(name)", "Static(name, markup=False)", "Label('Name')", "box.border_title = 'Stop'"]
)
def test_what_is_safe_is_not_found(line: str) -> None:
    assert not problems(line)
