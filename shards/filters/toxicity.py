"""How toxic a text is, by kind: words of small lists over the text's words, and lines that a model takes for profane.

The model is alt-profanity-check's linear classifier of words, which lies inside its wheel. Words that medicine, law and
history cannot do without (anatomy, crimes, what archives quote) count only in the company of words of the same list that no
field needs, and never in texts that use the vocabulary of those fields; the model's share is not looked at there either,
since it knows words and not their company. Violence has no words that no field needs: it goes by the vocabulary alone.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from shards.common.optional import need
from shards.filters.settings import TOXIC_KINDS, Toxicity
from shards.filters.wordlists import FIELDS, NEEDED, NEEDED_SLURS, SLURS, WORDS, digest

FIELD_SHARE = 0.02  # of a text's words that are a field's vocabulary, from which it counts as of that field
_FEWEST_FIELD_WORDS = 3  # different ones
_WORD = re.compile(r"\w+")
_LINE = 400  # characters of a line that are scored at once; longer lines are cut
_PROFANE = 0.8


class Measured(NamedTuple):
    """What one text was found to hold."""

    words: int
    counts: dict[str, int]  # by kind, words of its list
    guarded: bool  # uses the vocabulary of medicine, law or history
    lines: int
    profane_lines: int  # of these the model's; 0 where the model was not asked


class ToxicityScorer:
    """Measures texts, many at a time; SpecError where the model is asked for and not installed."""

    def __init__(self, settings: Toxicity) -> None:
        self.settings = settings
        self._model: Any = need("profanity_check", "scoring toxicity") if settings.score else None
        self._kinds = [kind for kind in TOXIC_KINDS if getattr(settings, kind)]

    def measure(self, texts: Sequence[str]) -> list[Measured]:
        """What each text holds; the model scores the lines of all together, which is several times faster."""
        measured = [self._count(text) for text in texts]
        if self._model is None:
            return measured
        lines: list[str] = []
        ends = []
        for text in texts:
            for line in text.splitlines():
                if line and not line.isspace():
                    lines += [line] if len(line) <= _LINE else [line[at : at + _LINE] for at in range(0, len(line), _LINE)]
            ends.append(len(lines))
        profane: list[bool] = []
        for at in range(0, len(lines), 4096):
            profane += (self._model.predict_prob(lines[at : at + 4096]) >= _PROFANE).tolist()
        starts = [0, *ends[:-1]]
        return [
            found._replace(lines=end - start, profane_lines=sum(profane[start:end]))
            for found, start, end in zip(measured, starts, ends, strict=True)
        ]

    def _count(self, text: str) -> Measured:
        words = Counter(_WORD.findall(text.lower()))
        total = words.total()
        field = FIELDS & words.keys()
        guarded = (
            self.settings.guard and len(field) >= _FEWEST_FIELD_WORDS and sum(words[word] for word in field) >= FIELD_SHARE * total
        )
        counts = {}
        for kind in self._kinds:
            if kind == "slurs":
                marks = {digest(word): count for word, count in words.items()}
                sure, needed = (sum(marks[mark] for mark in marks.keys() & some) for some in (SLURS - NEEDED_SLURS, NEEDED_SLURS))
            else:
                mine = WORDS[kind] & words.keys()
                sure, needed = (sum(words[word] for word in some) for some in (mine - NEEDED, mine & NEEDED))
            alone = self.settings.guard and (guarded or (not sure and kind != "violence"))
            counts[kind] = sure if alone else sure + needed
        return Measured(total, counts, guarded, 0, 0)

    def judge(self, measured: Measured) -> str:
        """Why a text that measures so is refused, or ""."""
        for kind in self._kinds:
            count = measured.counts[kind]
            if count >= self.settings.least and count * 1000 > getattr(self.settings, kind) * measured.words:
                return f"toxicity: {kind}"
        lines = measured.profane_lines
        if (
            self.settings.score
            and not measured.guarded
            and lines >= self.settings.least
            and lines > self.settings.score * measured.lines
        ):
            return "toxicity: score"
        return ""
