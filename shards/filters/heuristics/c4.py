"""C4's rules (Raffel et al. 2020, section 2.2): lines that are not sentences are dropped, pages that are not text refused."""

from __future__ import annotations

import re

from shards.filters.heuristics.marks import TERMINAL
from shards.filters.heuristics.settings import C4
from shards.filters.heuristics.text import Text

_CITATION = re.compile(r"\[\d*]|\[edit]|\[citation needed]")
_ENDS = (".", "?", "!", '"', "'")
_POLICY = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_SENTENCE = re.compile(rf"[{re.escape(''.join(sorted(TERMINAL)))}]+[\"'”’»)\]]*\s+(?=\S)")


def judge(text: Text, settings: C4) -> tuple[Text, str]:
    """The text of the lines kept, and why it is refused, or ""; a text that is refused is given back as it was."""
    string = text.string
    plain = _CITATION.sub("", string) if settings.citations and "[" in string else string
    low = plain.lower()
    # Which of the phrases occur at all: most texts have none, and their lines need not be searched.
    phrases = tuple(phrase for phrase in (*_POLICY * settings.policy, *("javascript",) * settings.javascript) if phrase in low)
    lorem = settings.lorem_ipsum and "lorem ipsum" in low
    curly = settings.curly_brackets and "{" in plain
    kept: list[str] = []
    sentences = 0
    for raw in text.lines:
        line = raw.strip()
        longest = settings.max_word_length
        if longest and len(line) > longest and max(map(len, line.split()), default=0) > longest:
            continue
        few = settings.min_line_words and len(line.split(None, settings.min_line_words)) < settings.min_line_words
        if settings.citations and "[" in line:
            line = _CITATION.sub("", line)
        if settings.terminal_punctuation and (not line.endswith(_ENDS) or line.endswith("...")):
            continue
        if few:
            continue
        if lorem or phrases:
            lowered = line.lower()
            if lorem and "lorem ipsum" in lowered:
                return text, "c4: lorem ipsum"
            if "javascript" in phrases and "javascript" in lowered:
                continue
        if curly and "{" in line:
            return text, "c4: curly bracket"
        if phrases and any(phrase in lowered for phrase in phrases):
            continue
        if sentences < settings.min_sentences:
            sentences += count_sentences(line)
        kept.append(line)
    if sentences < settings.min_sentences:
        return text, "c4: too few sentences"
    result = "\n".join(kept).strip()
    if not result:
        return text, "c4: no lines left"
    return (text if result == string else Text(result)), ""


def count_sentences(line: str) -> int:
    """Sentences of a line: it is parted after each run of terminal punctuation, closing quotes with it, and white space."""
    return 1 + len(_SENTENCE.findall(line)) if line else 0
