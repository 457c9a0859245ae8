"""Documents that every Python has: its standard library, as code, prose, questions and preferences.

Documents are held out by file: if a function's file is held out, the function is held out in all of these sources.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import sysconfig
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import xxhash

# Tests are poor examples of code; pydoc_data holds the topics, which must not be duplicated.
EXCLUDED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "pydoc_data", "lib2to3"}
QUESTIONS = (
    "What does this Python function do?",
    "Describe the function below in a sentence or two.",
    "Explain what `{name}` is for.",
    "In module `{module}` I found this. What does it do?",
)
LONGEST_ANSWER = 600  # characters
SHORT_ANSWER = 80  # characters of a preference's answers: their first sentence
RECENT = 16  # functions from which a preference takes its rejected answer
COMMON = frozenset(
    [
        "def",
        "self",
        "cls",
        "args",
        "kwargs",
        "none",
        "true",
        "false",
        "str",
        "int",
        "bool",
        "float",
        "list",
        "dict",
        "set",
        "the",
        "and",
        "for",
        "not",
        "with",
        "this",
        "that",
    ]
)

Wanted = Callable[[str], bool]  # whether documents of this key are still needed; others are not parsed


class Documented(NamedTuple):
    """A module, class or function with a docstring."""

    name: str  # within its module; "" for the module
    signature: str  # "def name(...):" for functions, else ""
    text: str  # the docstring, its indentation removed


def files() -> list[tuple[str, Path]]:
    """The library's .py files: (path within the library, path), sorted."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for directory, inner, names in os.walk(root):
        inner[:] = [name for name in inner if name not in EXCLUDED and not name.startswith("config-")]
        for name in names:
            if name.endswith(".py"):
                path = Path(directory, name)
                found.append((path.relative_to(root).as_posix(), path))
    return sorted(found)


def _text(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")


def code(wanted: Wanted) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(key, (source,)) of each file."""
    for key, path in files():
        if wanted(key):
            yield key, (_text(path),)


def docs(wanted: Wanted) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(key, (prose,)) of each module: its docstrings, each under the name of what it describes."""
    for key, path in files():
        found = documented(path) if wanted(key) else ()
        if found:
            module = _module(key)
            parts = [f"{module}.{entry.name}".rstrip(".") + "\n\n" + entry.text for entry in found]
            yield key, ("\n\n\n".join(parts) + "\n",)


def topics(wanted: Wanted) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(key, (text,)) of each topic of the language reference that `help()` shows."""
    from pydoc_data.topics import topics as all_topics

    for name, text in sorted(all_topics.items()):
        if wanted(f"topic {name}"):
            yield f"topic {name}", (text.strip() + "\n",)


def questions(wanted: Wanted) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(key, (question with a signature, first paragraph of the docstring)) of each function."""
    for key, path in files():
        if wanted(key):
            yield from ((key, pair) for pair in _pairs(key, path))


def preferences(wanted: Wanted, is_held_out: Callable[[str], bool]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(key, (question, its answer, another function's answer)); the other one is of the same split.

    Only where a preference shows: the true answer opens with a word of the function's name ("Add ..." of `add_header`),
    the other one has no word of the signature.
    """
    recent: dict[bool, deque[str]] = {False: deque(maxlen=RECENT), True: deque(maxlen=RECENT)}
    for key, path in files():
        if not wanted(key):
            continue
        others = recent[is_held_out(key)]
        for prompt, whole in _pairs(key, path):
            answer = whole.partition(". ")[0].removesuffix(".") + "."
            if len(answer) > SHORT_ANSWER:
                continue
            asked = _words(prompt.rpartition("\n\n")[2])
            choices = [other for other in others if not asked & _words(other)]
            if choices and _opens_with_name(prompt, answer):
                yield key, (prompt, answer, choices[xxhash.xxh3_64_intdigest(prompt.encode()) % len(choices)])
            others.append(answer)


def _opens_with_name(prompt: str, answer: str) -> bool:
    name = prompt.rpartition("\ndef ")[2].partition("(")[0]
    opening = _words(" ".join(answer.split()[:4]))
    return any(word in opening or word + "s" in opening for word in _words(name))


def _words(text: str) -> set[str]:
    """The content words of a text: parts of names, without common words."""
    return {word for word in re.findall(r"[A-Z]?[a-z]{2,}", text) for word in [word.lower()] if word not in COMMON}


def _module(key: str) -> str:
    return key.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _pairs(key: str, path: Path) -> Iterator[tuple[str, str]]:
    module = _module(key)
    for entry in documented(path):
        answer = " ".join(entry.text.split("\n\n")[0].split())
        if not entry.signature or not 20 <= len(answer) <= LONGEST_ANSWER or ">>>" in answer:
            continue
        name = f"{module}.{entry.name}"
        question = QUESTIONS[xxhash.xxh3_64_intdigest(name.encode()) % len(QUESTIONS)].format(name=name, module=module)
        yield f"{question}\n\n{entry.signature}", answer


@cache
def documented(path: Path) -> tuple[Documented, ...]:
    """Everything in a file that has a docstring, from top to bottom; cached, because three sources need it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tree = ast.parse(_text(path))
        except SyntaxError:
            return ()
    return tuple(_visit(tree, ""))


def _visit(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, prefix: str) -> Iterator[Documented]:
    name = prefix + node.name if not isinstance(node, ast.Module) else ""
    text = inspect.cleandoc(ast.get_docstring(node, clean=False) or "").strip()
    if text:
        signature = ""
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
            signature = f"def {node.name}({ast.unparse(node.args)}){returns}:"
        yield Documented(name, signature, text)
    if isinstance(node, ast.Module | ast.ClassDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _visit(child, f"{name}." if name else "")
