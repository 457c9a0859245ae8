"""The body of a LaTeX document to text: headings, lists and paragraphs as lines, mathematics as it is, the rest taken away."""

from __future__ import annotations

import re
import unicodedata

from shards.readers.texmacros import groups
from shards.readers.texnames import ACCENTS, DROPPED, HEADINGS, LETTERS, MATHS, SECOND, TWO, WITHOUT

_TOKEN = re.compile(
    rf"\\begin\s*\{{((?:{MATHS})\*?)\}}|\\begin\s*\{{({DROPPED})(\*?)\}}|\\(begin|end)\s*\{{([^{{}}]*)\}}"
    r"|(\$\$?|\\\(|\\\[)|\\([A-Za-z@]+)(\*?)|\\(.)|([{}~])|(``|'')|(---?)",
    re.DOTALL,
)
_CLOSING = {"$": "$", "$$": "$$", "\\(": "\\)", "\\[": "\\]"}
_KEPT = re.compile("\ue000(\\d+)\ue001")
_VERB = re.compile(
    r"\\begin\{(\w+)\*?\}(?:\[[^\]\n]*\])?(?:\{[^{}\n]*\})*\n?(.*?)\n?[ \t]*\\end\{\w+\*?\}\Z|\\verb\*?(.)(.*)\3\Z", re.DOTALL
)
_CITED = re.compile(r"[ ~]*\((?:[ ~;,]|see|e\.g\.|i\.e\.)*\)|[ ~]*\[[ ~;,]*\]")


def body_text(preamble: str, body: str, kept: list[str]) -> str:
    """The text of a paper; `kept` is what was set aside as verbatim."""
    text = _Body(preamble + "\n" + body).text()
    text = _CITED.sub("", text)
    text = re.sub(r"[ \t]+([,.;:!?])(?=\s)", r"\1", text)
    lines = [re.sub(r"[ \t]+", " ", line).strip() if not line.startswith("\t\t") else line for line in text.split("\n")]
    text = re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()
    text = _KEPT.sub(lambda found: _verbatim(kept[int(found[1])]), text)
    return text + "\n" if text else ""


def _verbatim(raw: str) -> str:
    found = _VERB.match(raw)
    if not found:
        return raw
    return f"`{found[4]}`" if found[3] else f"```\n{found[2]}\n```"


class _Body:
    """One pass through a body. Where a group has to be closed that does not, what is open is taken as text."""

    def __init__(self, source: str) -> None:
        self._source = source
        self._groups = groups(source)
        self._missing: set[str] = set()  # ends that do not come any more
        self._out: list[str] = []
        self._at = 0

    def text(self) -> str:
        source = self._source
        while (found := _TOKEN.search(source, self._at)) is not None:
            self._out.append(source[self._at : found.start()])
            self._at = found.end()
            self._take(found)
        self._out.append(source[self._at :])
        return "".join(self._out)

    def _take(self, found: re.Match[str]) -> None:
        if found[1] or found[6]:
            self._maths(found)
        elif found[2]:
            self._close_at(f"\\end{{{found[2]}{found[3]}}}")
        elif found[4]:
            self._environment(found[4] == "begin", found[5].rstrip("*"))
        elif found[7]:
            self._command(found[7], bool(found[8]))
        elif found[9]:
            self._symbol(found[9])
        elif found[10]:
            self._out.append(" " if found[10] == "~" else "")
        elif found[11]:
            self._out.append('"')
        else:
            self._out.append("—" if found[12] == "---" else "–")

    def _maths(self, found: re.Match[str]) -> None:
        """Mathematics as it is written, labels taken out."""
        closing = f"\\end{{{found[1]}}}" if found[1] else _CLOSING[found[6]]
        end = self._find(closing)
        if end < 0:
            self._out.append(found[0])
            return
        inner = re.sub(r"[ \t]*\\label\s*\{[^{}]*\}", "", self._source[self._at : end])
        if found[1]:
            self._line()
        self._out.append(found[0] + inner + closing)
        self._at = end + len(closing)

    def _line(self) -> None:
        """What follows begins a line."""
        said = next((part for each in reversed(self._out) if (part := each.rstrip(" \t"))), "\n")
        if not said.endswith("\n"):
            self._out.append("\n")

    def _find(self, closing: str) -> int:
        at = self._at
        while closing not in self._missing and (at := self._source.find(closing, at)) >= 0:
            before = at
            while before > 0 and self._source[before - 1] == "\\":
                before -= 1
            if closing[0] == "\\" or (at - before) % 2 == 0:
                return at
            at += 1
        self._missing.add(closing)
        return -1

    def _close_at(self, closing: str) -> None:
        end = self._find(closing)
        if end >= 0:
            self._at = end + len(closing)

    def _environment(self, begins: bool, name: str) -> None:
        if begins:
            self._optional()
            if name == "minipage" or name.startswith("wrap"):
                self._argument()
            if name == "abstract":
                self._out.append("\n\n## Abstract\n\n")
                return
        self._out.append("\n\n" if name not in ("document", "center", "small", "footnotesize") else "\n")

    def _optional(self) -> str:
        found = re.compile(r"[ \t]*\n?[ \t]*\[([^\[\]]*(?:\[[^\[\]]*\][^\[\]]*)*)\]").match(self._source, self._at)
        if found is None:
            return ""
        self._at = found.end()
        return found[1]

    def _argument(self) -> str | None:
        """The group that follows, if one does."""
        start = self._at
        while self._source[start : start + 1] in (" ", "\t", "\n"):
            start += 1
        end = self._groups.get(start)
        if end is None:
            return None
        self._at = end
        return self._source[start + 1 : end - 1]

    def _inner(self, text: str | None) -> str:
        return " ".join(_Body(text).text().split()) if text else ""

    def _command(self, name: str, starred: bool) -> None:
        if name in HEADINGS or name == "title":
            self._optional()
            said = self._inner(self._argument())
            self._out.append(f"\n\n{'#' * HEADINGS.get(name, 1)} {said}\n\n" if said else "")
        elif name == "item":
            said = self._inner(self._optional())
            self._line()
            self._out.append(f"- {said} " if said else "- ")
            self._skip_blank()
        elif name in ("footnote", "footnotetext"):
            self._optional()
            said = self._inner(self._argument())
            self._out.append(f" ({said})" if said else "")
        elif name in ("caption", "abstract"):
            self._optional()
            self._out.append(f"\n\n{self._inner(self._argument())}\n\n")
        elif name in ("url", "path", "nolinkurl"):
            self._out.append(self._argument() or "")
        elif name in WITHOUT:
            self._drop(name)
        elif name in SECOND:
            self._last()
        elif name in ACCENTS:
            self._accent(name)
        elif name in LETTERS:
            self._out.append(LETTERS[name])
            self._skip_blank() if name.isalpha() else None
            if self._source.startswith("{}", self._at):
                self._at += 2
        else:  # of all others the arguments in braces are text, their optional ones are not
            self._optional()
            if self._source[self._at : self._at + 1] not in ("{", "\n"):
                self._skip_blank()

    def _drop(self, name: str) -> None:
        while self._optional():
            pass
        for _ in range(2 if name in TWO else 1):
            self._argument()
            self._optional()

    def _last(self) -> None:
        self._optional()
        said: str | None = None
        while (each := self._argument()) is not None:
            said = each
        self._out.append(_Body(said).text() if said else "")

    def _skip_blank(self) -> None:
        while self._source[self._at : self._at + 1] in (" ", "\t"):
            self._at += 1

    def _symbol(self, char: str) -> None:
        if char in "%&$#_{}":
            self._out.append(char)
        elif char == "\\":
            found = re.compile(r"\*?[ \t]*(?:\[[^\]\n]*\])?").match(self._source, self._at)
            self._at = found.end() if found else self._at
            self._out.append("\n")
        elif char in ACCENTS:
            self._accent(char)
        elif char in " \n":
            self._out.append(" ")

    def _accent(self, name: str) -> None:
        found = re.compile(r"\s*(?:\{\s*\\?([A-Za-z])\s*\}|\\([ij])\b\s*|([A-Za-z]))").match(self._source, self._at)
        if found is not None:
            letter = found[1] or found[2] or found[3]
            self._at = found.end()
            self._out.append(unicodedata.normalize("NFC", letter + ACCENTS[name]))
        elif self._source.startswith("{}", self._at):
            self._at += 2
            self._out.append({"~": "~", "^": "^"}.get(name, ""))
