"""Macros of a LaTeX source: the simple ones that its author defines, and putting their text where they are used.

Simple are \\newcommand and its kin, \\def with plain parameters and \\DeclareMathOperator. What computes is left as it is.
"""

from __future__ import annotations

import re
from typing import NamedTuple

MOST = 200_000  # uses that are expanded in a paper
DEEPEST = 24  # macros within macros
LARGEST = 1 << 25  # characters that a paper may become


class MacroError(ValueError):
    """Macros whose expansion does not terminate, or grows without bound."""


class Macro(NamedTuple):
    """A macro: how many arguments, the first one's default where it is optional, and its text with #1 to #9."""

    arguments: int
    default: str | None
    text: str


_DEFINITION = re.compile(
    r"\\(?:re|provide)?(?:new)?command\*?\s*(?:\{\s*(\\[A-Za-z@]+|\\.)\s*\}|(\\[A-Za-z@]+))\s*(?:\[(\d)\])?\s*(\[[^\]]*\])?\s*(?=\{)"
    r"|\\(?:new|renew|provide|DeclareRobust)(?:robustcmd|Command|command)\*?\s*\{?\s*(\\[A-Za-z@]+)\s*\}?\s*(?:\[(\d)\])?\s*(\[[^\]]*\])?\s*(?=\{)"
    r"|\\(?:long\s*\\)?[egx]?def\s*(\\[A-Za-z@]+)\s*((?:#\d)*)\s*(?=\{)"
    r"|\\DeclareMathOperator(\*?)\s*\{?\s*(\\[A-Za-z@]+)\s*\}?\s*(?=\{)"
)
_USE = re.compile(r"\\([A-Za-z@]+)")
_MAGIC = re.compile(r"\\(?:if|else|fi|expandafter|csname|newif|loop|catcode|futurelet|@ifnextchar|ifnum|ifx|global|let)\b")
_GROUP = re.compile(r"\\.|[{}]", re.DOTALL)
_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|[^\s{}]")
_PARAMETER = re.compile(r"#([1-9])")
KEPT = frozenset(("title", "author", "date", "section", "subsection", "begin", "end", "item", "label", "ref", "cite", "input"))


def groups(text: str) -> dict[int, int]:
    """Where each group that closes has closed, by where it opens; in one pass, so that what does not close costs nothing."""
    found: dict[int, int] = {}
    opened: list[int] = []
    for each in _GROUP.finditer(text):
        if each[0] == "{":
            opened.append(each.start())
        elif each[0] == "}" and opened:
            found[opened.pop()] = each.end()
    return found


def collect(text: str) -> dict[str, Macro]:
    """The simple macros that a source defines, the last definition of each."""
    macros: dict[str, Macro] = {}
    closes = groups(text)
    for found in _DEFINITION.finditer(text):
        end = closes.get(found.end())
        if end is None:
            continue
        inner = text[found.end() + 1 : end - 1]
        name = (found[1] or found[2] or found[5] or found[8] or found[11])[1:]
        if found[11]:
            macro = Macro(0, None, rf"\operatorname{{{inner}}}")
        elif found[8]:
            macro = Macro(len(found[9]) // 2, None, inner)
        else:
            default = found[4] or found[7]
            macro = Macro(int(found[3] or found[6] or 0), default[1:-1] if default else None, inner)
        if name not in KEPT and not _MAGIC.search(inner) and name.isalpha():
            macros[name] = macro
    return macros


def without_definitions(text: str) -> str:
    """The text without the definitions of macros in it."""
    out: list[str] = []
    at = 0
    closes = groups(text)
    for found in _DEFINITION.finditer(text):
        end = closes.get(found.end())
        if found.start() < at or end is None:
            continue
        out.append(text[at : found.start()])
        at = end
    out.append(text[at:])
    return "".join(out)


def expand(text: str, macros: dict[str, Macro], *, title_only: bool = False) -> str:
    """The text with its macros' texts in their place. Of a preamble only \\title and \\abstract, where `title_only`."""
    if title_only:
        parts, closes = [], groups(text)
        for found in re.finditer(r"\\(?:title|abstract)\s*(?:\[[^\]]*\])?\s*(?=\{)", text):
            end = closes.get(found.end())
            if end is not None:
                parts.append(text[found.start() : end])
        text = "\n".join(parts)
    return _Expansion(macros).of(without_definitions(text), 0)


class _Expansion:
    def __init__(self, macros: dict[str, Macro]) -> None:
        self._macros = macros
        self._left = MOST
        self._room = LARGEST

    def of(self, text: str, depth: int) -> str:
        if depth > DEEPEST:
            raise MacroError("a macro within itself")
        out: list[str] = []
        at = 0
        closes = groups(text)
        for found in _USE.finditer(text):
            macro = self._macros.get(found[1])
            if macro is None or found.start() < at or _escaped(text, found.start()):
                continue
            end, arguments = _arguments(text, found.end(), macro, closes)
            if end < 0:
                continue  # an argument is missing: left as it is
            self._left -= 1
            self._room -= len(macro.text) + sum(map(len, arguments))
            if self._left < 0 or self._room < 0:
                raise MacroError(f"\\{found[1]} grows without bound")
            inner = _with(macro.text, arguments)
            out.append(text[at : found.start()])
            said = self.of(inner, depth + 1)
            # TeX ends a command's name at the first character that is no letter: a blank in between keeps that so.
            out.append(said + (" " if _ends_with_name(said) and (text[end : end + 1].isalpha() or text[end - 1] == " ") else ""))
            at = end
        out.append(text[at:])
        return "".join(out)


def _with(text: str, arguments: list[str]) -> str:
    return _PARAMETER.sub(lambda found: arguments[int(found[1]) - 1] if int(found[1]) <= len(arguments) else "", text)


def _ends_with_name(text: str) -> bool:
    at = len(text)
    while at > 0 and text[at - 1].isalpha():
        at -= 1
    return at < len(text) and at > 0 and text[at - 1] == "\\"


def _escaped(text: str, at: int) -> bool:
    backslashes = 0
    while at > 0 and text[at - 1] == "\\":
        backslashes, at = backslashes + 1, at - 1
    return backslashes % 2 == 1


def _arguments(text: str, at: int, macro: Macro, closes: dict[int, int]) -> tuple[int, list[str]]:
    """Where the arguments end, and what they are; -1 where one is missing."""
    given: list[str] = []
    if macro.default is not None:
        start = _blank(text, at)
        close = text.find("]", start) if text[start : start + 1] == "[" else -1
        given.append(text[start + 1 : close] if close > 0 else macro.default)
        at = close + 1 if close > 0 else at
    while len(given) < macro.arguments:
        start = _blank(text, at)
        if text[start : start + 1] == "{":
            at = closes.get(start, -1)
            if at < 0:
                return -1, []
            given.append(text[start + 1 : at - 1])
        else:
            token = _TOKEN.match(text, start)
            if token is None:
                return -1, []
            given.append(token[0])
            at = token.end()
    if macro.arguments == 0 and text.startswith("{}", at):
        at += 2
    elif macro.arguments == 0 and text[at : at + 1] in (" ", "\t"):
        while text[at : at + 1] in (" ", "\t"):
            at += 1
    return at, given


def _blank(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\n"):
        at += 1
    return at
