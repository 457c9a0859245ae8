"""The documentation says what the code does: its commands parse, and its keys, metrics, paths and links exist."""

from __future__ import annotations

import argparse
import functools
import re
import shutil
import subprocess
import tomllib
import typing
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import pytest

from docs import recipe_keys
from launcher.cli.parser import make_parser
from midwatch.recipe import load_recipe
from midwatch.recipe.live_settings import stage_settings
from midwatch.recipe.load import Recipe
from tests import documentation
from tests.documentation import PAGES, ROOT, Span, all_spans, commands, completed, is_metric, keys_named, recipe_structs
from tui.core.command_line import parse
from tui.script import ScriptError, parse_script

LANGUAGES = {"sh", "toml", "text", "python", "yaml"}
PLACEHOLDER = re.compile(r"[A-Z][A-Z0-9-]*|…|\.\.\.")


def parser_of(words: tuple[str, ...]) -> argparse.ArgumentParser:
    """The parser of the subcommand that the words name."""
    parser = make_parser()
    for word in words:
        choices = next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), None)
        if choices is None or word not in choices:
            break
        parser = choices[word]
    return parser


@functools.cache
def raising_parser() -> argparse.ArgumentParser:
    """The parser of `midwatch`, which raises ArgumentError where it would exit."""

    def fail(message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)

    parser = make_parser()
    stack = [parser]
    while stack:
        each = stack.pop()
        each.error = fail  # type: ignore[method-assign]
        for action in each._actions:
            if isinstance(action, argparse._SubParsersAction):
                stack += dict.fromkeys(action.choices.values())
    return parser


def failure(words: tuple[str, ...], *, mention: bool) -> str:
    """Why `midwatch` would not take these words; empty if it would. Single capitals stand for numbers.

    mention: in running text a command may be named without its arguments.
    """
    if not words or words[0] in ("COMMAND", "…") or words[-1] == "...":
        return ""
    words = tuple("1" if re.fullmatch("[A-Z]", word) else word for word in words if word != "…")
    try:
        found = raising_parser().parse_args(words)
    except argparse.ArgumentError as error:
        return "" if mention and "required" in str(error) else str(error)
    except SystemExit:  # --help
        return ""
    try:
        if getattr(found, "script", None) and not PLACEHOLDER.fullmatch(found.script):
            parse_script(found.script)
    except ScriptError as error:
        return str(error)
    if found.command == "set" and not is_live_setting(found.key):
        return f"no live setting {found.key}"
    return ""


@functools.cache
def live_settings() -> set[str]:
    recipes = [load_recipe(ROOT / "recipes" / f"{name}.toml") for name in ("demo", "align")]
    return {key for recipe in recipes for stage in recipe.stage for key in stage_settings(recipe, stage)}


def is_live_setting(key: str) -> bool:
    return key in live_settings() or key.startswith("mixture.") or key in ("KEY", "…")


def test_every_block_is_fenced_and_names_its_language() -> None:
    assert [f"{span}: {span.language}" for span in all_spans() if span.language and span.language not in LANGUAGES] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_row_of_a_table_has_its_columns(page: Path) -> None:
    wrong, columns = [], 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if not line.startswith("|"):
            columns = 0
            continue
        cells = len(re.findall(r"(?<!\\)\|", line)) - 1
        columns = columns or cells
        if cells != columns:
            wrong.append(f"{page.name}:{number}: {cells} cells for {columns} columns")
    assert wrong == []


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.parent != ROOT and f": {page.name}\n" not in navigation] == []


def test_every_command_line_parses() -> None:
    found = [command for command in commands() if command.program == "midwatch"]
    assert len(found) > 80
    wrong = {
        f"{each.where}: midwatch {' '.join(each.words)}": why
        for each in found
        if (why := failure(each.words, mention=not each.where.language))
    }
    assert wrong == {}


def test_every_option_of_a_command_in_backticks_exists() -> None:
    """`pause --release`: without the name of the program."""
    verbs = next(a.choices for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    wrong = []
    for span in all_spans():
        words = span.text.split()
        if span.language or words[:1] == [] or words[0] not in verbs or "--" not in span.text:
            continue
        parser = parser_of(tuple(words))
        options = {option for action in parser._actions for option in action.option_strings}
        wrong += [f"{span}: {word}" for word in re.findall(r"--[a-z-]+", span.text) if word not in options]
    assert wrong == []


def test_every_line_typed_after_a_colon_is_understood() -> None:
    wrong = []
    for span in all_spans():
        if span.language or not re.match(r":[a-z]", span.text):
            continue
        for variant in documentation.variants(span.text[1:]):
            line = re.sub(r"\b[NX]\b|\bVALUE\b", "1", variant)
            if problem := parse(line).problem:
                wrong.append(f"{span}: {variant}: {problem}")
    assert wrong == []


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_every_target_of_make_exists() -> None:
    targets = {command.words for command in commands() if command.program == "make"}
    assert len(targets) > 4
    for words in targets:
        done = subprocess.run(["make", "-n", *words], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_module_that_is_run_exists() -> None:
    modules = {command.words[0]: command.where for command in commands() if command.program == "python -m"}
    assert {name: str(where) for name, where in modules.items() if name != "venv" and find_spec(name) is None} == {}


def test_every_recipe_fragment_is_one() -> None:
    found = [span for span in all_spans() if span.language == "toml" and not span.text.startswith("[project")]
    assert len(found) > 12
    wrong = {}
    for span in found:
        try:
            msgspec.convert(completed(tomllib.loads(span.text), Recipe), Recipe)
        except (msgspec.ValidationError, tomllib.TOMLDecodeError) as error:
            wrong[str(span)] = str(error)
    assert wrong == {}


def wrong_key(span: Span) -> str:
    """Why a text in backticks, `[table] key` or `key = value`, is no key of a recipe; empty if it is, or is something else."""
    structs = recipe_structs()
    table = re.fullmatch(r"\[\[?([a-z][a-z0-9_.]*)\]\]?(?: ([a-z_0-9]+))?(?: = .*)?", span.text)
    assignment = re.fullmatch(r"(?:\[\[?[a-z_.]+\]\]? )?([a-z_0-9]+) = (.+)", span.text)
    if table is not None and table[1].startswith("tool."):
        return ""  # of pyproject.toml
    if table is not None and table[1] not in structs and (table[2] or "." in table[1]):
        return f"no table {table[1]}"
    if table is not None and table[2] and table[2] not in structs[table[1]].__struct_encode_fields__:
        return f"[{table[1]}] has no key {table[2]}"
    if assignment is None:
        return ""
    keys = keys_named(assignment[1])
    try:
        value = tomllib.loads(f"value = {assignment[2]}")["value"]
    except tomllib.TOMLDecodeError:
        return "" if keys and ("…" in span.text or "..." in span.text) else f"{assignment[1]}: not TOML"
    fits = [key for struct, key in keys if converts(value, struct, key)]
    return "" if fits else f"no key {assignment[1]} takes {assignment[2]}"


def converts(value: Any, struct: type[msgspec.Struct], key: msgspec.structs.FieldInfo) -> bool:
    kind = typing.get_type_hints(struct)[key.name]
    try:
        raw = completed({key.encode_name: value}, struct)[key.encode_name]
        msgspec.convert(raw, kind)
    except (msgspec.ValidationError, AttributeError):
        return False
    return True


def test_every_key_in_backticks_is_one() -> None:
    wrong = {f"{span}: {span.text}": why for span in all_spans() if not span.language and (why := wrong_key(span))}
    assert wrong == {}


def test_every_key_in_a_table_of_keys_is_one() -> None:
    """Tables whose first column is headed `key` list recipe keys, in every page but that of the keyboard's keys."""
    wrong, count = [], 0
    for page in (ROOT / "docs" / name for name in ("recipe.md", "cleaning.md", "parallel.md")):
        listing = False
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
            cells = [cell.strip() for cell in line.split(" | ")]
            heading = re.fullmatch(r"\|? ?keys?(?: .*)?", cells[0])
            listing = (listing and line.startswith("|")) or (heading is not None and len(cells) > 1)
            if listing and heading is None and not line.startswith("| ---"):
                for name in re.findall(r"`([^`]+)`", cells[0]):
                    key = re.sub(r"^\[.*\] | = .*$", "", name)
                    count += 1
                    if not keys_named(key) and name.strip("[]") not in recipe_structs() and not re.search(r'^"', key):
                        wrong.append(f"{page.name}:{number}: {name}")
    assert wrong == []
    assert count > 120


def test_every_metric_is_reported_by_the_trainer() -> None:
    family = re.compile(rf"({'|'.join(documentation.METRIC_FAMILIES)})/[\w/]+")
    found: dict[str, Span] = {}
    for span in all_spans():
        names = re.findall(r'^metric = "(.+?)"', span.text, re.M) if span.language == "toml" else [span.text]
        found |= {name: span for name in names if family.fullmatch(name)}
    assert len(found) > 50
    assert {name: str(span) for name, span in found.items() if not is_metric(name)} == {}


def test_every_path_exists() -> None:
    """Of the repository: what begins with one of its folders, or is one of its files."""
    folders = "|".join(sorted(each.name for each in ROOT.iterdir() if each.is_dir() and not each.name.startswith(".")))
    inside = re.compile(rf"({folders})/[\w./-]*|[\w-]+\.(md|toml|txt)|Makefile")
    found = [span for span in all_spans() if not span.language and inside.fullmatch(span.text) and "NAME" not in span.text]
    assert len(found) > 70
    known = {file.name for folder in (".", "docs", "recipes", "shards/readers") for file in (ROOT / folder).iterdir()}
    known |= {"recipe.toml"}  # in a run's directory
    wrong = [f"{span}: {span.text}" for span in found if not (ROOT / span.text).exists() and span.text not in known]
    assert wrong == []


def test_the_page_of_recipe_keys_is_generated_from_the_structs() -> None:
    assert recipe_keys.PAGE.read_text(encoding="utf-8") == recipe_keys.page(), "write it again with: python -m docs.recipe_keys"


def test_the_page_of_recipe_keys_reads_docstrings_comments_and_bounds() -> None:
    found = {f"{table.path}.{key.name}": key for table in recipe_keys.tables() for key in recipe_keys.keys(table)}
    assert len(found) > 250
    assert found["checkpoint.every"].meaning.startswith("Steps between checkpoints") and found[
        "checkpoint.every"
    ].bounds.startswith("1 to")
    assert found["data.level"] == recipe_keys.Key("level", "integer", "`9`", "", "zstd compression level, 1 to 19")
    assert found["cluster.device"].bounds == '`"auto"`, `"cpu"`, `"cuda"`'
    assert found["stage.anneal"].kind == "[list of tables](#stageanneal)"
    assert found["watch.window"].default == "`128`"  # inherited


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    heads = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.S)
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path) if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert wrong == []


def test_the_page_of_the_architecture_names_many_paths() -> None:
    named = [span for span in documentation.spans(ROOT / "docs" / "architecture.md") if not span.language and "/" in span.text]
    assert len(named) > 30
