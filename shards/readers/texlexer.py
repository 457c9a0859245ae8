"""What TeX reads character by character: comments, and text that is taken as it is written, where `%` and `\\` mean themselves.

One pass over a source, as TeX makes it: whichever begins first decides what the characters after it are. Verbatim text and URLs are
set aside, so that no later pass takes them for markup.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NAMES = "verbatim|Verbatim|BVerbatim|LVerbatim|verbatimtab|lstlisting|minted|alltt|Sinput|Soutput"
_ENVIRONMENT = re.compile(rf"begin\s*\{{((?:{_NAMES})\*?)\}}")
_TOKEN = re.compile(r"""\\(?:[A-Za-z@]+|.)|[%|"!+]""", re.DOTALL)
_COMMENT = re.compile(r"%[^\n]*(?:\n[ \t]*)?")
_SHORT = re.compile(r"\\(?:MakeShortVerb|DefineShortVerb|lstMakeShortInline)\*?\s*(?:\[[^\]]*\])?\s*\{?\s*\\?([|\"!+])\s*\}?")
_OPTIONAL = re.compile(r"\s*\[[^\[\]]*\]")
_BRACE = re.compile(r"(\\(?:url|path|nolinkurl|href|Url|lstinline|mintinline)\b|\n[ \t]*\n)|\\.|[{}]", re.DOTALL)
_PARAMETER = re.compile(r"#[1-9]")
_ESCAPED = re.compile(r"\\([%#&_~])")
_REMOVED = re.compile(r"\\begin\{comment\}.*?\\end\{comment\}|\\iffalse\b.*?\\fi\b", re.DOTALL)
URLS = frozenset(("url", "path", "nolinkurl", "Url"))
INLINE = frozenset(("lstinline", "mintinline"))


def short_verbs(sources: Iterable[str]) -> frozenset[str]:
    """The characters that a paper makes a short form of \\verb."""
    return frozenset(found[1] for text in sources for found in _SHORT.finditer(text))


def lexed(text: str, kept: list[str], short: frozenset[str] = frozenset()) -> str:
    """A source without comments; what is verbatim is put into `kept`, and a mark with its number in its place."""
    return _Lexer(text.replace("\ue000", "").replace("\ue001", ""), kept, short).text()


class _Lexer:
    def __init__(self, text: str, kept: list[str], short: frozenset[str]) -> None:
        self._text, self._kept, self._short = text, kept, short
        self._out: list[str] = []
        self._from = 0  # what was not given out yet
        self._absent: set[str] = set()  # ends of environments that do not come any more

    def text(self) -> str:
        at = 0
        while (found := _TOKEN.search(self._text, at)) is not None:
            at = self._take(found)
        self._out.append(self._text[self._from :])
        return _REMOVED.sub("", "".join(self._out))

    def _take(self, found: re.Match[str]) -> int:
        """Where to look on."""
        text, start, stop = self._text, found.start(), found.end()
        if found[0] == "%":
            return self._comment(start)
        if found[0] in self._short:
            end = self._delimited(start)
            return self._aside(start, end, rf"\verb{text[start:end]}") if end else stop
        name = found[0][1:]
        if name == "begin" and (opened := _ENVIRONMENT.match(text, start + 1)):
            end = self._end(f"\\end{{{opened[1]}}}", opened.end())
            return self._aside(start, end, text[start:end]) if end else opened.end()
        if name == "verb":
            end = self._delimited(stop + (text[stop : stop + 1] == "*"))
            return self._aside(start, end, text[start:end]) if end else stop
        if name in INLINE:
            return self._inline(name, start, stop)
        if name in URLS or name == "href":
            return self._url(stop)
        return stop

    def _aside(self, start: int, end: int, raw: str) -> int:
        self._kept.append(raw)
        self._out.append(f"{self._text[self._from : start]}\ue000{len(self._kept) - 1}\ue001")
        self._from = end
        return end

    def _comment(self, start: int) -> int:
        # A comment takes its line's end and the next line's indentation with it; but an empty line still ends a paragraph,
        # and after a blank a line's end is no more than another one.
        found = _COMMENT.match(self._text, start)
        assert found is not None
        end = found.end()
        self._out.append(self._text[self._from : start])
        if (self._text[end : end + 1] == "\n" or self._text[max(0, start - 1) : start] in (" ", "\t")) and not self._begins_line(
            start
        ):
            self._out.append("\n")
        self._from = end
        return end

    def _begins_line(self, at: int) -> bool:
        while at > 0 and self._text[at - 1] in " \t":
            at -= 1
        return at == 0 or self._text[at - 1] == "\n"

    def _end(self, closing: str, at: int) -> int:
        """Behind the end of an environment; 0 where there is none."""
        end = -1 if closing in self._absent else self._text.find(closing, at)
        if end < 0:
            self._absent.add(closing)
            return 0
        return end + len(closing)

    def _delimited(self, at: int) -> int:
        """Behind what stands between two of the character that is there, on one line; 0 where it is none."""
        mark = self._text[at : at + 1]
        if not mark or mark.isspace() or mark.isalpha() or mark == "*":
            return 0
        line = self._text.find("\n", at)
        end = self._text.find(mark, at + 1, len(self._text) if line < 0 else line)
        return end + 1 if end > 0 else 0

    def _braced(self, at: int) -> int:
        """Behind the group that opens there; 0 where none does that closes in its paragraph, and before another command for URLs.

        Commands for URLs have none of their kind within; so those that are not closed are not read again and again.
        """
        if self._text[at : at + 1] != "{":
            return 0
        depth = 0
        for found in _BRACE.finditer(self._text, at):
            if found[0] == "{":
                depth += 1
            elif found[0] == "}":
                depth -= 1
                if not depth:
                    return found.end()
            elif found[1]:
                return 0
        return 0

    def _blank(self, at: int) -> int:
        while self._text[at : at + 1] in (" ", "\t"):
            at += 1
        return at

    def _inline(self, name: str, start: int, at: int) -> int:
        """Code within a line: what it says, as \\verb would have it."""
        if (options := _OPTIONAL.match(self._text, at)) is not None:
            at = options.end()
        if name == "mintinline":  # its language
            at = self._braced(at) or at
        end = self._braced(at) or self._delimited(at)
        return self._aside(start, end, f"\\verb\0{self._text[at + 1 : end - 1]}\0") if end else at

    def _url(self, at: int) -> int:
        """A URL as it is written, the command around it left in its place; one that takes a macro's argument is no text yet."""
        if (options := _OPTIONAL.match(self._text, at)) is not None:
            at = options.end()
        at = self._blank(at)
        end = self._braced(at) or self._delimited(at)
        url = self._text[at + 1 : end - 1]
        if not end or "\n" in url.strip() or ("%" not in url and _PARAMETER.search(url)):
            return at
        self._out.append(f"{self._text[self._from : at]}{{")
        self._from = at + 1
        self._aside(at + 1, end, _ESCAPED.sub(r"\1", "".join(url.split())))
        self._out.append("}")
        return end
