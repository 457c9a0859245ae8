"""What TeX reads character by character: comments, and text that is taken as it is written, where `%` and `\\` mean themselves.

One pass over a source, as TeX makes it: whichever begins first decides what the characters after it are. Verbatim text and URLs are
set aside, so that no later pass takes them for markup.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from shards.readers.texmacros import groups

_NAMES = "verbatim|Verbatim|BVerbatim|LVerbatim|verbatimtab|lstlisting|minted|alltt|Sinput|Soutput"
_ENVIRONMENT = re.compile(rf"begin\s*\{{((?:{_NAMES})\*?)\}}")
_TOKEN = re.compile(r"""\\(?:[A-Za-z@]+|.)|[%|"!+]""", re.DOTALL)
_COMMENT = re.compile(r"%[^\n]*(?:\n[ \t]*)?")
_SHORT = re.compile(r"\*?\s*(?:\[[^\]\n]{0,200}\])?\s*\{?\s*\\?([|\"!+])\s*\}?")
_DEFINED = re.compile(r"\*?\s*\{?\s*\\(?:[A-Za-z@]+|.)", re.DOTALL)
_LET = re.compile(r"\s*\\(?:[A-Za-z@]+|.)\s*=?\s*(?:\\(?:[A-Za-z@]+|.))?", re.DOTALL)
_BODY = re.compile(r"\s*\}?(?:\s|#[1-9]|\[[^\]\n]{0,200}\])*(?=\{)")
_OPTIONAL = re.compile(r"\s*\[[^\[\]]*\]")
_BRACE = re.compile(r"(\\(?:url|path|nolinkurl|href|Url|lstinline|mintinline)\b|\n[ \t]*\n)|\\.|[{}]", re.DOTALL)
_PARAMETER = re.compile(r"#[1-9]")
_ESCAPED = re.compile(r"\\([%#&_~])")
_REMOVED = re.compile(r"\\begin\{comment\}|\\iffalse\b")
_REMOVED_ENDS = {"\\begin{comment}": re.compile(r"\\end\{comment\}"), "\\iffalse": re.compile(r"\\fi\b")}
_URL_MARKS = frozenset('|!"+/@?')  # by which \url is delimited; any other character begins what \path is used for elsewhere
URLS = frozenset(("url", "path", "nolinkurl", "Url"))
INLINE = frozenset(("lstinline", "mintinline"))
_DEFINITIONS = frozenset(("def", "edef", "gdef", "xdef", "newcommand", "renewcommand", "providecommand", "DeclareRobustCommand"))
_SHORT_ON = frozenset(("MakeShortVerb", "DefineShortVerb", "lstMakeShortInline"))
_SHORT_OFF = frozenset(("DeleteShortVerb", "UndefineShortVerb", "lstDeleteShortInline"))
_INPUTS = frozenset(
    (
        "input", "@input", "include", "subfile", "subfileinclude", "import", "inputfrom", "includefrom", "subimport",
        "subinputfrom", "subincludefrom",
    )
)  # fmt: skip
_OWN = re.compile(
    r"%[^\n]*|\\(?:[egx]?def|let|(?:re)?newcommand|DeclareRobustCommand)\*?\s*\{?\s*"
    r"\\(url|path|nolinkurl|Url|href|lstinline|mintinline)(?![A-Za-z@])|\\.",
    re.DOTALL,
)


def own_names(sources: Iterable[str]) -> frozenset[str]:
    """The commands of URLs and of code that a paper defines itself: they take their arguments as any macro does."""
    return frozenset(found[1] for text in sources for found in _OWN.finditer(text) if found[1])


def lexed(
    text: str,
    kept: list[str],
    short: set[str] | None = None,
    own: frozenset[str] = frozenset(),
    including: Callable[[str, int], None] | None = None,
) -> str:
    """A source without comments; what is verbatim is put into `kept`, and a mark with its number in its place.

    short: the characters that are a short form of \\verb where the source begins; it is changed to those where it ends.
    own: see `own_names`. including: called with the text and the place of each command that includes a file.
    """
    short = set() if short is None else short
    return _Lexer(text.replace("\ue000", "").replace("\ue001", ""), kept, short, own, including).text()


def _without_removed(text: str) -> str:
    """The text without comment environments and what \\iffalse skips; one that is not closed stays."""
    out: list[str] = []
    at = done = 0
    absent: set[str] = set()
    while (found := _REMOVED.search(text, at)) is not None:
        at = found.end()
        end = None if found[0] in absent else _REMOVED_ENDS[found[0]].search(text, at)
        if end is None:
            absent.add(found[0])
            continue
        out.append(text[done : found.start()])
        at = done = end.end()
    out.append(text[done:])
    return "".join(out)


class _Lexer:
    def __init__(
        self, text: str, kept: list[str], short: set[str], own: frozenset[str], including: Callable[[str, int], None] | None
    ) -> None:
        self._text, self._kept, self._short, self._own, self._including = text, kept, short, own, including
        self._next: dict[str, int] = {}  # where each delimiter was found last; -1 where it does not come any more
        self._closes: dict[int, int] | None = None
        self._body_end = 0  # of the macro's definition that was read last
        self._out: list[str] = []
        self._from = 0  # what was not given out yet
        self._absent: set[str] = set()  # ends of environments that do not come any more

    def text(self) -> str:
        at = 0
        while (found := _TOKEN.search(self._text, at)) is not None:
            at = self._take(found)
        self._out.append(self._text[self._from :])
        return _without_removed("".join(self._out))

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
        if name in _DEFINITIONS or name == "let":
            return self._definition(name, stop)
        if name in _SHORT_ON or name in _SHORT_OFF:
            if (made := _SHORT.match(text, stop)) is None:
                return stop
            (self._short.add if name in _SHORT_ON else self._short.discard)(made[1])
            return made.end()
        if name in _INPUTS and self._including is not None:
            self._including(text, start)
        if name in self._own:
            return stop
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
        end = self._next.get(mark, 0)
        if 0 <= end <= at:
            end = self._next[mark] = self._text.find(mark, at + 1)
        return end + 1 if end > 0 and self._text.find("\n", at, end) < 0 else 0

    def _definition(self, name: str, at: int) -> int:
        """Behind the name that a definition gives, which is no use of it; for \\let, behind the name of its meaning too."""
        found = (_LET if name == "let" else _DEFINED).match(self._text, at)
        if found is None:
            return at
        if name != "let" and (body := _BODY.match(self._text, found.end())) is not None:
            if self._closes is None:
                self._closes = groups(self._text)
            self._body_end = max(self._body_end, self._closes.get(body.end(), 0))
        return found.end()

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
        end = self._braced(at) or (0 if self._text[at : at + 1] in ("{", "}", "\\", "#") else self._delimited(at))
        code = self._text[at + 1 : end - 1]
        if end and start < self._body_end and _PARAMETER.search(code):  # a macro's argument, which is not known yet
            self._out.append(f"{self._text[self._from : start]}\\texttt{{{code}}}")
            self._from = end
            return end
        return self._aside(start, end, f"\\verb\0{code}\0") if end else at

    def _url(self, at: int) -> int:
        """A URL as it is written, the command around it left in its place; one that takes a macro's argument is no text yet."""
        if (options := _OPTIONAL.match(self._text, at)) is not None:
            at = options.end()
        at = self._blank(at)
        end = self._braced(at) or (self._delimited(at) if self._text[at : at + 1] in _URL_MARKS else 0)
        url = self._text[at + 1 : end - 1]
        if not end or "\n" in url.strip() or ("%" not in url and _PARAMETER.search(url)):
            return at
        self._out.append(f"{self._text[self._from : at]}{{")
        self._from = at + 1
        self._aside(at + 1, end, _ESCAPED.sub(r"\1", "".join(url.split())))
        self._out.append("}")
        return end
