"""Thresholds of the heuristic rules, a struct for each family; the defaults are the papers', as datatrove 0.10.1 has them.

A threshold of 0 turns its rule off, and so does `false`.
"""

from __future__ import annotations

import math

import msgspec

from shards.common.errors import SpecError


class GopherRepetition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Text that repeats itself: Rae et al. 2021, "Scaling Language Models: ... Gopher", table A1."""

    duplicate_lines: float = 0.30  # share of lines that stood before
    duplicate_paragraphs: float = 0.30  # share of paragraphs that stood before
    duplicate_line_characters: float = 0.20  # their characters over the text's
    duplicate_paragraph_characters: float = 0.20
    top_2_gram: float = 0.20  # characters of the most frequent n-gram, all its places, over the text's
    top_3_gram: float = 0.18
    top_4_gram: float = 0.16
    duplicate_5_grams: float = 0.15  # characters of n-grams that stood before, none counted twice, over the text's
    duplicate_6_grams: float = 0.14
    duplicate_7_grams: float = 0.13
    duplicate_8_grams: float = 0.12
    duplicate_9_grams: float = 0.11
    duplicate_10_grams: float = 0.10

    @property
    def top(self) -> tuple[tuple[int, float], ...]:
        """(n, share) of the rules for the most frequent n-gram, those turned off left out."""
        return tuple((n, share) for n in (2, 3, 4) if (share := getattr(self, f"top_{n}_gram")))

    @property
    def duplicated(self) -> tuple[tuple[int, float], ...]:
        """(n, share) of the rules for repeated n-grams, those turned off left out."""
        return tuple((n, share) for n in range(5, 11) if (share := getattr(self, f"duplicate_{n}_grams")))

    def check(self, where: str) -> None:
        """Raise SpecError for a threshold that no text can be measured against."""
        for name in self.__struct_fields__:
            _share(where, name, getattr(self, name))


class GopherQuality(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Text that is not prose: Rae et al. 2021, appendix A.1.1."""

    min_words: int = 50  # words, symbols left out
    max_words: int = 100_000
    min_mean_word_length: float = 3  # characters
    max_mean_word_length: float = 10
    max_symbols: float = 0.1  # hash signs over words; ellipses over words
    max_bullet_lines: float = 0.9  # share of lines that begin with a bullet or a hyphen
    max_ellipsis_lines: float = 0.3  # share of lines that end with an ellipsis
    min_alphabetic_words: float = 0.8  # share of words with a letter
    min_stop_words: int = 2  # different ones of `stop_words`
    stop_words: tuple[str, ...] = ("the", "be", "to", "of", "and", "that", "have", "with")

    def check(self, where: str) -> None:
        """Raise SpecError for a threshold that no text can be measured against."""
        _range(where, self, "min_words", "max_words")
        _range(where, self, "min_mean_word_length", "max_mean_word_length")
        _ratio(where, "max_symbols", self.max_symbols)
        for name in ("max_bullet_lines", "max_ellipsis_lines", "min_alphabetic_words"):
            _share(where, name, getattr(self, name))
        if not 0 <= self.min_stop_words <= len(set(self.stop_words)):
            raise SpecError(
                f"{where}: min_stop_words is {self.min_stop_words}, but stop_words has {len(set(self.stop_words))}"
                " (ask for at most as many, or 0 to turn the rule off)"
            )


class C4(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Lines and pages that are not text: Raffel et al. 2020, "... Text-to-Text Transformer", section 2.2."""

    citations: bool = True  # take away [1], [edit], [citation needed]
    terminal_punctuation: bool = True  # drop lines that do not end with . ? ! " or '
    min_line_words: int = 3  # words; shorter lines are dropped
    max_word_length: int = 1000  # characters; lines with a longer word are dropped
    min_sentences: int = 5  # sentences of the lines kept; texts with fewer are refused
    javascript: bool = True  # drop lines that name it
    policy: bool = True  # drop lines that speak of cookies, privacy policies and terms of use
    lorem_ipsum: bool = True  # refuse texts with it
    curly_brackets: bool = True  # refuse texts with one

    def check(self, where: str) -> None:
        """Raise SpecError for a threshold that no text can be measured against."""
        for name in ("min_line_words", "max_word_length", "min_sentences"):
            if getattr(self, name) < 0:
                raise SpecError(f"{where}: {name} is {getattr(self, name)} (use 1 or more, or 0 to turn the rule off)")


class FineWeb(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Lists, menus and fragments: Penedo et al. 2024, "The FineWeb Datasets", section 3.6."""

    min_punctuated_lines: float = 0.12  # share of lines that end a sentence
    max_short_lines: float = 0.67  # share of lines of at most `short_line` characters
    short_line: int = 30  # characters
    max_duplicate_line_characters: float = 0.01  # characters of lines that stood before; the paper says 0.1
    max_new_lines: float = 0.3  # line feeds over words

    def check(self, where: str) -> None:
        """Raise SpecError for a threshold that no text can be measured against."""
        for name in ("min_punctuated_lines", "max_short_lines", "max_duplicate_line_characters"):
            _share(where, name, getattr(self, name))
        _ratio(where, "max_new_lines", self.max_new_lines)
        if self.short_line < 1:
            raise SpecError(f"{where}: short_line is {self.short_line} (use 1 character or more)")


class UniqueWords(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Text of too few words said over and over; counted in windows, since any long text's share falls (Heaps' law)."""

    min_share: float = 0.1  # different words over words, of all windows together
    window: int = 1000  # words

    def check(self, where: str) -> None:
        """Raise SpecError for a threshold that no text can be measured against."""
        _share(where, "min_share", self.min_share)
        if self.window < 1:
            raise SpecError(f"{where}: window is {self.window} (use 1 word or more; 1000 suits most)")


def _share(where: str, name: str, value: float) -> None:
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise SpecError(f"{where}: {name} is {value} (use a share from 0 to 1; 0 turns the rule off)")


def _ratio(where: str, name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise SpecError(f"{where}: {name} is {value} (use a ratio of 0 or more; 0 turns the rule off)")


def _range(where: str, settings: msgspec.Struct, low: str, high: str) -> None:
    least, most = getattr(settings, low), getattr(settings, high)
    for name, value in ((low, least), (high, most)):
        if not (math.isfinite(value) and value >= 0):
            raise SpecError(f"{where}: {name} is {value} (use 0 or more; 0 turns the rule off)")
    if most and least > most:
        raise SpecError(f"{where}: {low} is {least}, above {high}, {most} (no text would be kept)")
