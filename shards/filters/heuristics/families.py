"""All families of rules together: what a build applies to a text."""

from __future__ import annotations

import msgspec

from shards.filters.heuristics import c4, fineweb, gopher
from shards.filters.heuristics.settings import C4, FineWeb, GopherQuality, GopherRepetition, UniqueWords
from shards.filters.heuristics.text import Text, unified

__all__ = ["C4", "FineWeb", "GopherQuality", "GopherRepetition", "Rules", "Text", "UniqueWords"]


class Rules(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The families to apply, in the order of FineWeb's own pipeline; None leaves one out."""

    gopher_repetition: GopherRepetition | None = None
    gopher_quality: GopherQuality | None = None
    unique_words: UniqueWords | None = None
    c4: C4 | None = None
    fineweb: FineWeb | None = None

    def check(self, where: str = "clean") -> None:
        """Raise SpecError for impossible thresholds; `where` names the table that holds the families'."""
        for family in self.__struct_fields__:
            if (settings := getattr(self, family)) is not None:
                settings.check(f"{where}.{family}")

    def apply(self, string: str) -> tuple[str, str]:
        """The text as kept and "", or the text as it was and why it is refused, as "family: rule"."""
        plain = unified(string)
        text = Text(plain)
        reason = ""
        if self.gopher_repetition:
            reason = gopher.judge_repetition(text, self.gopher_repetition)
        if not reason and self.gopher_quality:
            reason = gopher.judge_quality(text, self.gopher_quality)
        if not reason and self.unique_words:
            reason = gopher.judge_unique_words(text, self.unique_words)
        if not reason and self.c4:
            text, reason = c4.judge(text, self.c4)
        if not reason and self.fineweb:
            reason = fineweb.judge(text, self.fineweb)
        return (string, reason) if reason or text.string == plain else (text.string, "")
