"""The HTML of posts to text: paragraphs, lists and quotes as lines, code kept as it is between fences."""

from __future__ import annotations

import re
from html.parser import HTMLParser

_BLOCKS = frozenset(("p", "div", "ul", "ol", "table", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "dl", "section", "article"))
_LINES = frozenset(("tr", "dt", "dd"))
_DROPPED = frozenset(("script", "style", "noscript", "iframe"))
_SPACE = re.compile(r"[ \t\r\n\f\v]+")
_BLANKS = re.compile(r"\n{3,}")


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._code = 0  # depth of <pre>
        self._dropped = 0
        self._lists: list[int] = []  # the next number of each open list; -1 for one without numbers
        self._quotes: list[int] = []  # where each open quote begins in parts

    def _break(self, lines: int) -> None:
        have = 0
        for part in reversed(self.parts):
            stripped = part.rstrip(" ")
            have += len(stripped) - len(stripped.rstrip("\n"))
            if stripped.rstrip("\n") or have >= lines:
                break
        self.parts.append("\n" * max(0, lines - have))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag in _DROPPED:
            self._dropped += 1
        elif tag == "pre":
            self._break(2)
            self.parts.append("```\n")
            self._code += 1
        elif tag == "code" and not self._code:
            self.parts.append("`")
        elif tag == "br":
            self.parts.append("\n")
        elif tag == "li":
            self._break(1)
            number = self._lists[-1] if self._lists else -1
            self.parts.append("  " * max(0, len(self._lists) - 1) + ("- " if number < 0 else f"{number}. "))
            if number >= 0:
                self._lists[-1] += 1
        elif tag == "blockquote":
            self._break(2)
            self._quotes.append(len(self.parts))
        elif tag in _BLOCKS:
            if tag in ("ul", "ol"):
                self._break(1 if self._lists else 2)
                self._lists.append(1 if tag == "ol" else -1)
            elif not (tag == "p" and self.parts and self.parts[-1].endswith(("- ", ". "))):
                self._break(2)
            if tag[0] == "h" and tag[1:].isdigit():
                self.parts.append("#" * int(tag[1]) + " ")
        elif tag in _LINES:
            self._break(1)
        elif tag in ("td", "th"):
            self.parts.append(" ")

    def handle_endtag(self, tag: str) -> None:
        if tag in _DROPPED:
            self._dropped = max(0, self._dropped - 1)
        elif tag == "pre" and self._code:
            self._code -= 1
            self._break(1)
            self.parts.append("```")
            self._break(2)
        elif tag == "code" and not self._code:
            self.parts.append("`")
        elif tag == "blockquote" and self._quotes:
            start = self._quotes.pop()
            quoted = "".join(self.parts[start:]).strip("\n")
            self.parts[start:] = ["\n".join(f"> {line}".rstrip() for line in quoted.split("\n"))]
            self._break(2)
        elif tag in ("ul", "ol"):
            if self._lists:
                self._lists.pop()
            self._break(1 if self._lists else 2)
        elif tag in _BLOCKS:
            self._break(2)

    def handle_data(self, data: str) -> None:
        if self._dropped:
            return
        if self._code:
            self.parts.append(data)
            return
        data = _SPACE.sub(" ", data)
        if not self.parts or self.parts[-1].endswith(("\n", " ")) or not self.parts[-1]:
            data = data.lstrip(" ")
        if data:
            self.parts.append(data)


def text_of(markup: str) -> str:
    """The text of a post's HTML."""
    parser = _Text()
    parser.feed(markup)
    parser.close()
    pieces = "".join(parser.parts).split("```")
    # Outside of code, blanks at lines' ends and more than one empty line mean nothing.
    for at in range(0, len(pieces), 2):
        pieces[at] = _BLANKS.sub("\n\n", re.sub(r"[ \t]+\n", "\n", pieces[at]))
    return "```".join(pieces).strip()
