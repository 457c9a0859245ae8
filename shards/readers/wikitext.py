"""Wikitext to plain text, in time linear in its length: what is broken in the markup stays as text, and swallows nothing after it.

Gone are comments, templates, tables, references, files, categories, galleries and tags; links leave their text, headings and
lists stay, mathematics and code stay as they are. Sections that nothing is left of go with their heading.
"""

from __future__ import annotations

import html
import re
from typing import NamedTuple

from shards.readers.wikinames import CATEGORIES, FILES

_CODE_TAGS = "nowiki|pre|source|syntaxhighlight|math|chem|ce"
_CODE_NAMES = frozenset(_CODE_TAGS.split("|"))
_DROPPED_TAGS = (
    "ref|references|gallery|timeline|imagemap|score|table|templatestyles|graph|mapframe|maplink|hiero|categorytree|inputbox"
)
_TAG = re.compile(rf"<(?:(/?)((?i:{_DROPPED_TAGS}|{_CODE_TAGS}))\b([^<>]*?)(/?)>|(!--))|(-->)")
_BRACES = re.compile(r"\{\{|\}\}|\{\||\|\}(?!\})")
_BRACKETS = re.compile(r"\[\[|\]\]")
_OUTER_LINK = re.compile(r"\[(?:https?:|ftp:|mailto:|irc:)?//[^\s\]\[<>]*[ \t]*([^\]\[\n]*)\]|\[mailto:[^\s\]]*[ \t]*([^\]\n]*)\]")
_QUOTES = re.compile(r"'{2,5}")
_HEADING = re.compile(r"^(={1,6})[ \t]*(.*?)[ \t]*\1[ \t]*$", re.MULTILINE)
_LIST = re.compile(r"^([*#:;]+)[ \t]*", re.MULTILINE)
_RULE = re.compile(r"^-{4,}[ \t]*$", re.MULTILINE)
_BREAK = re.compile(r"<br\b[^<>]*>", re.IGNORECASE)
_ANY_TAG = re.compile(r"</?[a-zA-Z][^<>\n]{0,500}>")
_MAGIC = re.compile(r"__[A-Z]{3,25}__")
_CONVERSION = re.compile(r"-\{(?:[^{}|]*\|)?(?:zh(?:-\w+)?:)?([^{}:;]*)[^{}]*\}-")
_EMPTY_BRACKETS = re.compile(r"[ \t]?\((?:[ \t]*[,;:·–/]?[ \t]*)*\)")
_OPEN_COMMA = re.compile(r"\([ \t]*[,;][ \t]*")
_SPACES = re.compile(r" {2,}")
_BLANKS = re.compile(r"\n{3,}")
_FILE_NAME = re.compile(r"\.[A-Za-z0-9]{2,5}\s*\Z")
_LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z]{2,10}){0,2}\Z")
_PROJECTS = frozenset(("wikt", "wiktionary", "commons", "s", "q", "b", "n", "v", "d", "m", "meta", "species", "voy", "wikisource"))
_AROUND = " \t\u200e\u200f"  # marks of direction come along when a name is copied
_SENTINEL = "\ue000{}\ue001"
_KEPT = re.compile("\ue000(\\d+)\ue001")


class Namespaces(NamedTuple):
    """The names, in small letters, by which links to files and to categories begin.

    files: those of the dump's own language and MediaWiki's own, which every wiki knows. Those of other languages are looked at too,
    since dumps do not list a language's older names; but they are words of the text as well, unless the name of a file follows.
    """

    files: frozenset[str] = frozenset(("file", "image", "media"))
    categories: frozenset[str] = CATEGORIES


KNOWN = Namespaces()


def plain(text: str, spaces: Namespaces = KNOWN) -> str:
    """The text of an article; "" where there is none."""
    kept: list[str] = []
    text = text.replace("\ue000", "").replace("\ue001", "").replace("\r\n", "\n")
    text = _tags(text, kept)
    text = _braces(text)
    text = _links(text, spaces)
    text = _OUTER_LINK.sub(lambda found: found[1] or found[2] or "", text)
    text = _CONVERSION.sub(r"\1", text)
    text = _QUOTES.sub("", text)
    text = _MAGIC.sub("", _RULE.sub("", text))
    text = _ANY_TAG.sub("", _BREAK.sub("\n", text))
    text = _LIST.sub(lambda found: "- " if found[1][-1] in "*#" else "", text)
    text = html.unescape(text)
    text = _OPEN_COMMA.sub("(", _EMPTY_BRACKETS.sub("", text))
    text = _HEADING.sub(_heading, text)
    text = "\n".join(line.strip() for line in _SPACES.sub(" ", text.replace("\t", " ").replace("\u00a0", " ")).split("\n"))
    text = _BLANKS.sub("\n\n", _without_empty_sections(text)).strip()
    return _KEPT.sub(lambda found: kept[int(found[1])], text).strip("\n")


def _heading(found: re.Match[str]) -> str:
    return f"\n{'#' * max(2, len(found[1]))} {found[2].strip('=').strip()}\n" if found[2].strip("= ") else ""


def _tags(text: str, kept: list[str]) -> str:
    """Without comments and the tags that are dropped with what they hold; code and mathematics set aside as they are."""
    out: list[str] = []
    at = 0
    # Where each tag is closed for the last time: one that is not closed any more swallows nothing.
    last_close: dict[str, int] = {}
    found = list(_TAG.finditer(text))
    for tag in found:
        if tag[6] or tag[1]:
            last_close["-->" if tag[6] else tag[2].lower()] = tag.start()
    opened: tuple[str, int, int] | None = None  # name, where it begins, where what it holds begins
    for tag in found:
        name = "-->" if tag[5] or tag[6] else tag[2].lower()
        closes = bool(tag[6] or tag[1])
        if opened is not None:
            if closes and name == opened[0]:
                held = text[opened[2] : tag.start()]
                if name in _CODE_NAMES:
                    kept.append(_code(name, held))
                    out.append(_SENTINEL.format(len(kept) - 1))
                opened, at = None, tag.end()
            continue
        out.append(text[at : tag.start()])
        at = tag.end()
        if not closes and not tag[4]:
            if last_close.get(name, -1) > tag.start():
                opened = (name, tag.start(), tag.end())
            elif tag[5]:
                at = len(text)  # as browsers and MediaWiki do: a comment without an end goes on to the text's end
                break
    out.append(text[at:])
    return "".join(out)


def _code(name: str, held: str) -> str:
    if name in ("math", "chem", "ce"):
        return f"${held.strip()}$" if held.strip() else ""
    held = html.unescape(held)
    if name == "nowiki":
        return held
    return f"\n```\n{held.strip(chr(10))}\n```\n" if "\n" in held.strip() else f"`{held.strip()}`"


def _braces(text: str) -> str:
    """Without templates and tables: the outermost of those that are closed."""
    stack: list[tuple[bool, int]] = []  # whether it is a table, where it begins
    spans: list[tuple[int, int]] = []
    for found in _BRACES.finditer(text):
        token = found[0]
        if token in ("{|", "|}") and not _begins_line(text, found.start()):
            continue
        if token in ("{{", "{|"):
            stack.append((token == "{|", found.start()))
            continue
        is_table = token == "|}"
        # A table's end closes what was left open within it; a template's end closes no table around it.
        place = len(stack) - 1
        while is_table and place >= 0 and not stack[place][0]:
            place -= 1
        if place >= 0 and stack[place][0] == is_table:
            start = stack[place][1]
            del stack[place:]
            while spans and spans[-1][0] >= start:
                spans.pop()
            spans.append((start, found.end()))
    out: list[str] = []
    at = 0
    for start, end in spans:
        out.append(text[at:start])
        at = end
    out.append(text[at:])
    return "".join(out)


def _begins_line(text: str, at: int) -> bool:
    while at > 0 and text[at - 1] in " \t:":
        at -= 1
    return at == 0 or text[at - 1] == "\n"


def _links(text: str, spaces: Namespaces) -> str:
    stack: list[list[str]] = [[]]
    at = 0
    for found in _BRACKETS.finditer(text):
        stack[-1].append(text[at : found.start()])
        at = found.end()
        if found[0] == "[[":
            stack.append([])
        elif len(stack) > 1:
            inner = "".join(stack.pop())
            stack[-1].append(_link(inner, spaces))
        else:
            stack[-1].append(found[0])
    stack[-1].append(text[at:])
    return "".join("".join(part) for part in stack)


def _link(inner: str, spaces: Namespaces) -> str:
    """What a link leaves: its text, or its target; nothing of files, categories and other languages' pages."""
    target, _, rest = inner.partition("|")
    prefix, colon, _ = target.partition(":")
    prefix = prefix.replace("_", " ").strip(_AROUND).lower()
    if colon:
        if prefix in spaces.files or prefix in spaces.categories or (prefix in FILES and _FILE_NAME.search(target)):
            return ""
        if not rest and (_LANGUAGE.match(prefix) or prefix in _PROJECTS) and " " not in prefix:
            return ""
    if rest:
        return rest.rpartition("|")[2] if "|" in rest else rest
    return target.lstrip(":").strip()


def _without_empty_sections(text: str) -> str:
    out: list[str] = []
    below = 0  # depth of the kept heading that follows
    has_text = False
    for line in reversed(text.split("\n")):
        depth = _depth(line)
        if not depth:
            has_text = has_text or bool(line)
        elif has_text or below > depth:
            below, has_text = depth, False
        else:
            continue
        out.append(line)
    return "\n".join(reversed(out))


def _depth(line: str) -> int:
    depth = len(line) - len(line.lstrip("#"))
    return depth if depth >= 2 and line[depth : depth + 1] == " " else 0
