"""What the documentation names, read from its Markdown: commands, recipe fragments, metrics and paths."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
METRIC_FAMILIES = ("train", "perf", "policy", "preference", "value", "eval", "data", "made", "synthetic")


class Span(NamedTuple):
    """A piece of a page: a fenced block, or a text in backticks."""

    page: str
    line: int
    language: str
    """Of a block; empty for backticks."""
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def spans(file: Path) -> tuple[Span, ...]:
    """All blocks and backticks of a page. A block that is only indented has the language `indented`."""
    name = str(file.relative_to(ROOT))
    found: list[Span] = []
    block: list[str] | None = None
    language, began, before = "", 0, ""
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if block is None:
                block, language, began = [], line[3:].strip(), number
            else:
                found.append(Span(name, began, language or "none", "\n".join(block)))
                block = None
        elif block is not None:
            block.append(line)
        elif line.startswith("    ") and not before.strip():
            found.append(Span(name, number, "indented", line))
        else:
            texts = [match[1] or match[2] for match in re.finditer(r"`` (.+?) ``|`([^`]+)`", line)]
            if line.startswith("|"):
                texts = [text.replace("\\|", "|") for text in texts]
            found += [Span(name, number, "", text) for text in texts]
        before = line
    assert block is None, f"{name}: a block that begins at line {began} does not end"
    return tuple(found)


def all_spans() -> Iterator[Span]:
    return itertools.chain.from_iterable(map(spans, PAGES))


def variants(command: str) -> list[str]:
    """A command with its optional parts `[...]` left out and put in, and each of its alternatives `a|b`."""
    optional = re.search(r"\s*\[((?:--)?[^\[\]]*)\](?=\s|$)", command)
    if optional is not None:
        without = command[: optional.start()] + command[optional.end() :]
        return variants(without) + variants(command[: optional.start()] + " " + optional[1] + command[optional.end() :])
    words = [word.split("|") if re.fullmatch(r"[\w-]+(\|[\w-]+)+", word) else [word] for word in command.split(" ")]
    return [" ".join(each) for each in itertools.product(*words)]


def split(line: str) -> list[list[str]]:
    """The commands of a shell line, each as words, without comments, redirections and substitutions."""
    line = re.sub(r"<\(([^()]*)\)", r"FILE ; \1", line)
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if word and set(word) <= set("|&;"):
            found.append([])
        else:
            found[-1].append(word)
    commands = []
    for words in found:
        end = next((i for i, word in enumerate(words) if word in ("<", ">", ">>")), len(words))
        commands.append(words[:end])
    return [words for words in commands if words]


class Command(NamedTuple):
    where: Span
    program: str
    """`midwatch`, `make`, `python -m` or the name of another program."""
    words: tuple[str, ...]


def commands() -> list[Command]:
    """Every command line of Midwatch's own in `sh` blocks and in backticks."""
    found: list[Command] = []
    for span in all_spans():
        if span.language in ("sh", "console"):
            lines = [line.removeprefix("$ ") for line in span.text.replace("\\\n", " ").splitlines()]
        elif not span.language and re.match(r"(midwatch|make|torchrun|python) ", span.text):
            lines = [span.text]
        else:
            continue
        for variant in itertools.chain.from_iterable(map(variants, lines)):
            for words in split(variant):
                found += _own(span, words)
    return found


def _own(span: Span, words: list[str]) -> list[Command]:
    """Our program among the words of one command, wherever it stands (`kubectl exec ... -- midwatch attach RUN`)."""
    names = [Path(word).name for word in words]
    for name in ("midwatch", "make"):
        if name in names and not (name == "midwatch" and words[0] == "python3"):
            return [Command(span, name, tuple(words[names.index(name) + 1 :]))]
    if "-m" in words and names[0] in ("python", "python3", "torchrun"):
        return [Command(span, "python -m", tuple(words[words.index("-m") + 1 :]))]
    return []


@cache
def metrics_of_the_code() -> tuple[frozenset[str], tuple[re.Pattern[str], ...], frozenset[str]]:
    """(names, patterns, every other string) in the trainer: a pattern has `[^/]+` where an f-string has a value."""
    names: set[str] = set()
    patterns: set[str] = set()
    strings: set[str] = set()
    family = re.compile(rf"({'|'.join(METRIC_FAMILIES)})/")
    for file in (ROOT / "trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                (names if family.match(node.value) else strings).add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [re.escape(str(v.value)) if isinstance(v, ast.Constant) else "[^/]+" for v in node.values]
                if re.match("(eval|data)/", "".join(parts)):  # others are looked up by such a name, not reported
                    patterns.add("".join(parts))
    return frozenset(names), tuple(map(re.compile, sorted(patterns))), frozenset(strings)


def is_metric(name: str) -> bool:
    """Whether the trainer reports a metric of this name; SOURCE and NAME stand for a source's name."""
    names, patterns, strings = metrics_of_the_code()
    name = name.removesuffix("_before")  # the first evaluation of a stage adds it to each name
    if name in names:
        return True
    tail = name.rsplit("/", 1)[1]
    return any(
        pattern.fullmatch(name) and (not pattern.pattern.endswith("[^/]+") or tail in strings or f"policy/{tail}" in names)
        for pattern in patterns
    )


@cache
def recipe_structs() -> dict[str, type[msgspec.Struct]]:
    """Every table of a recipe by its path: `model`, `stage.policy`, `data.clean.pii`."""
    from midwatch.recipe.load import Recipe

    found: dict[str, type[msgspec.Struct]] = {}

    def visit(kind: Any, path: str) -> None:
        for each in (kind, *typing.get_args(kind)):
            if isinstance(each, type) and issubclass(each, msgspec.Struct) and path not in found:
                found[path] = each
                hints = typing.get_type_hints(each)
                for field in msgspec.structs.fields(each):
                    visit(hints[field.name], f"{path}.{field.encode_name}".lstrip("."))

    visit(Recipe, "")
    return found


@cache
def keys_named(name: str) -> list[tuple[type[msgspec.Struct], msgspec.structs.FieldInfo]]:
    """All recipe keys of this name, in whatever table."""
    structs = dict.fromkeys(recipe_structs().values())
    return [(struct, field) for struct in structs for field in msgspec.structs.fields(struct) if field.encode_name == name]


def completed(raw: dict[str, Any], struct: type[msgspec.Struct]) -> dict[str, Any]:
    """A fragment of a table with something in the place of each required key that it leaves out."""
    hints = typing.get_type_hints(struct)
    whole = dict(raw)
    for field in msgspec.structs.fields(struct):
        kind, name = hints[field.name], field.encode_name
        inner = [k for k in (kind, *typing.get_args(kind)) if isinstance(k, type) and issubclass(k, msgspec.Struct)]
        if name in raw and inner:
            value = raw[name]
            whole[name] = [completed(each, inner[0]) for each in value] if isinstance(value, list) else completed(value, inner[0])
        elif name not in raw and field.required:
            whole[name] = _something(kind)
    return whole


def _something(kind: Any) -> Any:
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)[0]
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return completed({}, kind)
    for candidate in ("x", 1, 0.5, {}, []):
        try:
            msgspec.convert(candidate, kind)
        except msgspec.ValidationError:
            continue
        return candidate
    raise AssertionError(f"no example of {kind}")
