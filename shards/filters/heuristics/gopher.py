"""Gopher's rules (Rae et al. 2021): quality, appendix A.1.1, and repetition, table A1."""

from __future__ import annotations

import math

import numpy as np

from shards.filters.heuristics import marks
from shards.filters.heuristics.settings import GopherQuality, GopherRepetition, UniqueWords
from shards.filters.heuristics.text import Text, Words, crowds, leaders

_BULLETS = ("•", "-")
_ELLIPSES = ("...", "…")


def judge_quality(text: Text, settings: GopherQuality) -> str:
    """Why the text is refused, or ""."""
    reason = _quality(text, settings)
    return f"gopher_quality: {reason}" if reason else ""


def _quality(text: Text, settings: GopherQuality) -> str:
    string, words = text.string, text.words
    proper = (words.kinds & marks.SUBSTANCE) != 0
    count = int(np.count_nonzero(proper))
    if count < max(1, settings.min_words):
        return "too few words" if settings.min_words or not len(words) else "only symbols"
    if settings.max_words and count > settings.max_words:
        return "too many words"
    mean = int(words.lengths()[proper].sum()) / count
    if mean < settings.min_mean_word_length:
        return "words too short"
    if settings.max_mean_word_length and mean > settings.max_mean_word_length:
        return "words too long"
    ellipses = sum(map(string.count, _ELLIPSES))
    if settings.max_symbols:
        if string.count("#") / len(words) > settings.max_symbols:
            return "too many hash signs"
        if ellipses / len(words) > settings.max_symbols:
            return "too many ellipses"
    if settings.max_bullet_lines and _bullet_lines(text, settings.max_bullet_lines) > settings.max_bullet_lines:
        return "too many bullet lines"
    if settings.max_ellipsis_lines and _ellipsis_lines(text, ellipses, settings.max_ellipsis_lines) > settings.max_ellipsis_lines:
        return "too many lines end in an ellipsis"
    if int(np.count_nonzero(words.kinds & marks.ALPHA)) / len(words) < settings.min_alphabetic_words:
        return "too few words with letters"
    if settings.min_stop_words and _stop_words(text, settings) < settings.min_stop_words:
        return "too few stop words"
    return ""


# There are at most as many such lines as such marks, so most texts need no look at their lines.


def _bullet_lines(text: Text, enough: float) -> float:
    """Share of lines that begin with a bullet, or 0 where it cannot be over `enough`."""
    if sum(map(text.string.count, _BULLETS)) <= enough * len(text.lines):
        return 0
    return sum(line.lstrip().startswith(_BULLETS) for line in text.lines) / len(text.lines)


def _ellipsis_lines(text: Text, ellipses: int, enough: float) -> float:
    """Share of lines that end with an ellipsis, or 0 where it cannot be over `enough`."""
    if ellipses <= enough * len(text.lines):
        return 0
    return sum(line.rstrip().endswith(_ELLIPSES) for line in text.lines) / len(text.lines)


def _stop_words(text: Text, settings: GopherQuality) -> int:
    """How many different stop words there are, up to as many as are asked for."""
    found = 0
    for word in dict.fromkeys(settings.stop_words):
        found += _has_word(text, word)
        if found >= settings.min_stop_words:
            break
    return found


def _has_word(text: Text, word: str) -> bool:
    """Whether a word is among the text's. Searching the characters finds a frequent word at once."""
    at, starts, edges = text.string.find(word), text.words.starts, text.words.edges
    tries = 0
    while at >= 0 and tries < 32:
        place = int(np.searchsorted(starts, at))
        if place < len(starts) and starts[place] == at and edges[place + 1] - edges[place] == len(word):
            return True
        at = text.string.find(word, at + 1)
        tries += 1
    # A part of other words over and over ("to" in "tomato"): look at all words of its length instead.
    places = np.flatnonzero(text.words.lengths() == len(word)) if at >= 0 else np.empty(0, np.int64)
    return any(text.string.startswith(word, start) for start in starts[places].tolist())


def judge_repetition(text: Text, settings: GopherRepetition) -> str:
    """Why the text is refused, or ""."""
    if not text.string:
        return "gopher_repetition: empty"
    reason = _repeated_parts(text, settings) or _top_grams(text, settings) or _repeated_grams(text, settings)
    return f"gopher_repetition: {reason}" if reason else ""


def _repeated_parts(text: Text, settings: GopherRepetition) -> str:
    size = len(text.string)
    again, characters = duplicates(text.paragraphs)
    if settings.duplicate_paragraphs and again / len(text.paragraphs) > settings.duplicate_paragraphs:
        return "duplicate paragraphs"
    if settings.duplicate_paragraph_characters and characters / size > settings.duplicate_paragraph_characters:
        return "characters in duplicate paragraphs"
    again, characters = duplicates(text.stretches)
    if settings.duplicate_lines and again / len(text.stretches) > settings.duplicate_lines:
        return "duplicate lines"
    if settings.duplicate_line_characters and characters / size > settings.duplicate_line_characters:
        return "characters in duplicate lines"
    return ""


def duplicates(parts: list[str]) -> tuple[int, int]:
    """How many parts stood before, and their characters."""
    different = set(parts)
    if len(different) == len(parts):
        return 0, 0
    return len(parts) - len(different), sum(map(len, parts)) - sum(map(len, different))


def _top_grams(text: Text, settings: GopherRepetition) -> str:
    if not settings.top or len(text.words) < settings.top[0][0]:
        return ""
    size = len(text.string)
    # n words occur at most as often as the first two of them, which is enough to know for most texts.
    pairs = crowds(text.words.spaced_gram(2))
    most = int(pairs.max(initial=0))
    for n, share in settings.top:
        lengths = text.words.lengths(n) + (n - 1)
        if not len(lengths) or most * int(lengths.max()) <= share * size:
            continue
        possible = int((pairs[: len(lengths)] * lengths).max()) > share * size
        if possible and top_gram_characters(text.words, n) / size > share:
            return f"top {n}-gram"
    return ""


def top_gram_characters(words: Words, n: int) -> int:
    """Characters of the most frequent n words with a space between, all places together; the first of equals."""
    lengths = words.lengths(n) + (n - 1)
    if not len(lengths):
        return 0
    counts = np.bincount(leaders(words.spaced_gram(n)))
    # The first of equals is the one whose first place is first.
    most = int(counts.argmax())
    return int(lengths[most]) * int(counts[most])


def _repeated_grams(text: Text, settings: GopherRepetition) -> str:
    for n, share in settings.duplicated:
        if repeated_gram_characters(text.words, n, share * len(text.string)) / len(text.string) > share:
            return f"duplicate {n}-grams"
    return ""


def repeated_gram_characters(words: Words, n: int, enough: float = math.inf) -> int:
    """Characters of n words run together that stood before, read from the left, each character counted once.

    Counting stops beyond `enough`; where it can be told early that it is not reached, the answer is 0.
    """
    keys = words.gram(n)
    if math.isfinite(enough):
        # Sorting tells how many stood before, if not which: for most texts that is enough.
        ordered = np.sort(keys)
        again = int(np.count_nonzero(ordered[1:] == ordered[:-1]))
        if not again or again * int(words.lengths(n).max()) <= enough:
            return 0
    lead = leaders(keys)
    later = np.flatnonzero(lead != np.arange(len(lead), dtype=np.int32))
    if not len(later):
        return 0
    # An upper bound: every character of the n-grams that stood before.
    ends = words.edges[later + n]
    covered = int((ends - np.maximum(words.edges[later], np.concatenate(([0], ends[:-1])))).sum())
    if math.isfinite(enough) and covered <= enough:
        return 0
    involved = np.zeros(len(lead), np.bool_)
    involved[later] = involved[lead[later]] = True
    places = np.flatnonzero(involved)
    lengths = words.edges[places + n] - words.edges[places]
    seen: set[int] = set()
    total = free = 0
    for place, key, length in zip(places.tolist(), lead[places].tolist(), lengths.tolist(), strict=True):
        if place < free:
            continue
        if key in seen:
            total += length
            free = place + n
            if total > enough:
                break
        else:
            seen.add(key)
    return total


def judge_unique_words(text: Text, settings: UniqueWords) -> str:
    """Why the text is refused, or ""."""
    words = len(text.words)
    if not words or not settings.min_share:
        return ""
    keys = np.sort(text.words.gram(1)) if words <= settings.window else None
    if keys is not None:
        different = 1 + int(np.count_nonzero(keys[1:] != keys[:-1]))
    else:
        whole = words - words % settings.window
        windows = np.sort(text.words.gram(1)[:whole].reshape(-1, settings.window), axis=1)
        different = len(windows) + int(np.count_nonzero(windows[:, 1:] != windows[:, :-1]))
        words = whole  # what is left over is less than a window, and would be judged by another measure
    return "unique_words: too few unique words" if different / words < settings.min_share else ""
