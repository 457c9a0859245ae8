"""FineWeb's rules (Penedo et al. 2024, section 3.6) against lists, menus and fragments."""

from __future__ import annotations

from shards.filters.heuristics.gopher import duplicates
from shards.filters.heuristics.marks import TERMINAL
from shards.filters.heuristics.settings import FineWeb
from shards.filters.heuristics.text import Text


def judge(text: Text, settings: FineWeb) -> str:
    """Why the text is refused, or ""."""
    reason = _judge(text, settings)
    return f"fineweb: {reason}" if reason else ""


def _judge(text: Text, settings: FineWeb) -> str:
    rows, string = text.rows, text.string
    if not rows:
        return "empty"
    if sum(row[-1] in TERMINAL for row in rows) / len(rows) < settings.min_punctuated_lines:
        return "too few lines end a sentence"
    short = sum(len(row) <= settings.short_line for row in rows)
    if settings.max_short_lines and short / len(rows) > settings.max_short_lines:
        return "too many short lines"
    breaks = string.count("\n")
    again = duplicates(rows)[1]
    if settings.max_duplicate_line_characters and again / (len(string) - breaks) > settings.max_duplicate_line_characters:
        return "characters in duplicate lines"
    # What white space parts is at least one word each, which spares most texts being split.
    most = settings.max_new_lines
    if most and breaks / len(string.split()) > most and breaks / len(text.words) > most:
        return "too many line breaks"
    return ""
