"""Settings of what judges text, a struct for each judge."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from shards.common.errors import SpecError

PII_KINDS = ("email", "phone", "ip", "card", "iban", "national_id")
TOXIC_KINDS = ("profanity", "slurs", "sexual", "violence")


class Language(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Which languages are kept."""

    keep: tuple[str, ...] = ()  # ISO 639-1 codes such as "en"; empty: all, the language is only told
    min_score: float = 0.65  # share of the text in its first language; FineWeb keeps English from 0.65
    unknown: bool = False  # keep texts that are too short or too mixed to tell

    def check(self, where: str) -> None:
        """Raise SpecError for settings that no text can meet."""
        _share(where, "min_score", self.min_score)
        for code in self.keep:
            if not (2 <= len(code) <= 8 and code == code.lower()):
                raise SpecError(f'{where}: keep has "{code}" (use lower-case codes such as "en", "de", "zh")')


class Perplexity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """An n-gram model of a reference text, and which perplexities are kept."""

    reference: str = ""  # a file or directory of text like what is wanted
    order: int = 5  # words an n-gram; 2 to 6
    vocabulary: int = 65_536  # most frequent words that are told apart; the others are <unk>
    min_count: int = 2  # occurrences below which n-grams of three words and more are left out
    max_words: int = 20_000_000  # words of the reference that are read; training takes about 150 bytes of memory for each
    max_perplexity: float = 0  # texts above it are refused; 0: none
    min_perplexity: float = 0  # texts below it are refused, such as lists of one word; 0: none

    def check(self, where: str) -> None:
        """Raise SpecError for settings that cannot work."""
        if not 2 <= self.order <= 6:
            raise SpecError(f"{where}: order is {self.order} (use 2 to 6, the most that kenlm's wheel reads)")
        if self.vocabulary < 1 or self.max_words < 1:
            raise SpecError(f"{where}: vocabulary and max_words are at least 1")
        if self.min_count < 1:
            raise SpecError(f"{where}: min_count is {self.min_count} (use 1 to leave nothing out)")
        for name in ("max_perplexity", "min_perplexity"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise SpecError(f"{where}: {name} is {getattr(self, name)} (use a perplexity, or 0 for no bound)")
        if 0 < self.max_perplexity <= self.min_perplexity:
            raise SpecError(f"{where}: min_perplexity is {self.min_perplexity}, not below max_perplexity (no text would be kept)")


class Quality(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A classifier of the user's good and bad text."""

    good: str = ""  # a file or directory of text that is wanted
    bad: str = ""  # a file or directory of text that is not
    features: int = 1 << 18  # columns that words and pairs of words are hashed to, a power of two
    held_out: float = 0.2  # share of the examples that the model's own scores are measured on
    characters: int = 20_000  # characters of a document that are looked at, from its start
    regularisation: float = 1.0  # logistic regression's C
    min_score: float = 0  # texts below it are refused; 0: none, the score is only told
    edges: tuple[float, ...] = (0.2, 0.4, 0.6, 0.8)  # scores that part the buckets q0, q1, ...

    def check(self, where: str) -> None:
        """Raise SpecError for settings that cannot work."""
        if not 1 <= self.features <= 1 << 24 or self.features & (self.features - 1):
            raise SpecError(f"{where}: features is {self.features} (use a power of two up to 2^24, such as 262144)")
        if not 0 < self.held_out < 1:
            raise SpecError(f"{where}: held_out is {self.held_out} (use a share between 0 and 1, such as 0.2)")
        if self.characters < 1 or not self.regularisation > 0:
            raise SpecError(f"{where}: characters and regularisation are above 0")
        _share(where, "min_score", self.min_score)
        if list(self.edges) != sorted(set(self.edges)) or not all(0 < edge < 1 for edge in self.edges):
            raise SpecError(f"{where}: edges are {self.edges} (use rising scores between 0 and 1)")


class Pii(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Personal data: what is looked for, and what is done with it."""

    mode: Literal["redact", "drop"] = "redact"  # put a placeholder such as <EMAIL>, or refuse the document
    kinds: tuple[str, ...] = PII_KINDS
    region: str = "US"  # of telephone numbers without a country code; "" leaves such numbers alone
    names: str = ""  # a spaCy model that finds people's names, such as "en_core_web_sm"; "": names are not looked for
    drop_at: int = 1  # findings from which `drop` refuses a document

    def check(self, where: str) -> None:
        """Raise SpecError for settings that cannot work."""
        for kind in self.kinds:
            if kind not in PII_KINDS:
                raise SpecError(f'{where}: kinds has "{kind}" (there are: {", ".join(PII_KINDS)})')
        if self.region and not (len(self.region) == 2 and self.region.isupper()):
            raise SpecError(f'{where}: region is "{self.region}" (use a country\'s code such as "US", or "")')
        if self.drop_at < 1:
            raise SpecError(f"{where}: drop_at is {self.drop_at} (use 1 or more)")


class Toxicity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How much of each kind a text may have; 0 turns a kind off."""

    score: float = 0.5  # share of the text's lines that the model takes for profane at 0.8 and more
    profanity: float = 10  # words of the list, per 1,000 words of the text
    slurs: float = 2
    sexual: float = 10
    violence: float = 0  # off: news and novels are full of it
    least: int = 2  # words of a list, or lines, that a text needs at least, so that one does not refuse a short text
    guard: bool = True  # count words that medicine, law and history need only where other toxic words stand beside them

    def check(self, where: str) -> None:
        """Raise SpecError for settings that cannot work."""
        _share(where, "score", self.score)
        for name in TOXIC_KINDS:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise SpecError(f"{where}: {name} is {getattr(self, name)} (use words per 1,000 words, or 0 to turn it off)")
        if self.least < 1:
            raise SpecError(f"{where}: least is {self.least} (use 1 or more)")


class Contamination(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Evaluation sets that must not be trained on."""

    mode: Literal["drop", "report"] = "drop"
    sets: dict[str, str] = {}  # name of an evaluation set: file or directory of its texts
    ngram: int = 13  # words, as in GPT-3
    least: int = 8  # words of the shortest evaluation text that is looked for, whole
    min_share: float = 0  # share of a document's words inside matches below which it is kept all the same

    def check(self, where: str) -> None:
        """Raise SpecError for settings that cannot work."""
        if not 2 <= self.least <= self.ngram <= 64:
            raise SpecError(f"{where}: least is {self.least} and ngram {self.ngram} (use 2 or more, at most ngram, at most 64)")
        _share(where, "min_share", self.min_share)


def _share(where: str, name: str, value: float) -> None:
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise SpecError(f"{where}: {name} is {value} (use a share from 0 to 1)")
