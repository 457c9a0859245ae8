"""Scripts that are written without spaces between words: where a split at white space would give a clause for a word."""

from __future__ import annotations

import re

_ALPHABETS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
"""Thai, Lao, Burmese, Khmer: a word has some four characters."""
_KANA = "\u3040-\u30ff"
"""Hiragana and katakana: some two."""
_HAN = "\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Some one and a half, and most characters are words."""
UNSPACED = re.compile(f"[{_ALPHABETS}{_KANA}{_HAN}]")
"""One character, which counts as a word by itself."""
ALPHABETS, KANA = re.compile(f"[{_ALPHABETS}]"), re.compile(f"[{_KANA}]")


def apart(text: str) -> str:
    """The text with spaces around each such character."""
    return UNSPACED.sub(r" \g<0> ", text)
