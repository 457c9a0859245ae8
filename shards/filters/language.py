"""The language of a text, by CLD2's model, which lies inside its wheel."""

from __future__ import annotations

import re
from typing import NamedTuple

from shards.common.optional import need
from shards.filters.settings import Language

UNKNOWN = "un"
# CLD2 refuses bytes that are not characters of an interchange: controls but tab, line feed and return; surrogates; and
# what Unicode sets aside as never being a character.
_UNFIT = re.compile(
    "[\\x00-\\x08\\x0b-\\x1f\\x7f-\\x9f\\ud800-\\udfff\\ufdd0-\\ufdef"
    + "".join(f"{chr(plane * 0x10000 + 0xFFFE)}{chr(plane * 0x10000 + 0xFFFF)}" for plane in range(17))
    + "]"
)


class Guess(NamedTuple):
    """What a text seems to be written in."""

    code: str  # ISO 639-1 where there is one, "un" for unknown
    score: float  # share of the text in this language, 0 to 1


class Detector:
    """Tells languages; SpecError where pycld2 is not installed."""

    def __init__(self) -> None:
        self._cld = need("pycld2", "telling languages")

    def guess(self, text: str) -> Guess:
        """The first language of a text and its share; ("un", 0) where CLD2 does not trust itself."""
        raw = text.encode("utf-8", "replace")
        try:
            reliable, _, found = self._cld.detect(raw)
        except self._cld.error:
            raw = _UNFIT.sub(" ", text).encode("utf-8", "replace")
            try:
                reliable, _, found = self._cld.detect(raw)
            except self._cld.error:
                return Guess(UNKNOWN, 0.0)
        _, code, percent, _ = found[0]
        if not reliable or code == UNKNOWN:
            return Guess(UNKNOWN, 0.0)
        return Guess(code, percent / 100)


def judge(guess: Guess, settings: Language) -> str:
    """Why a text of this language is refused, or ""."""
    if guess.code == UNKNOWN:
        return "" if settings.unknown or not settings.keep else "language: unknown"
    if settings.keep and guess.code not in settings.keep:
        return "language: not kept"
    if settings.keep and guess.score < settings.min_score:
        return "language: mixed"
    return ""
