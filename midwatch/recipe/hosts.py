"""Host lists as clusters write them: `gpu-[01-16,20],login` names eighteen hosts."""

from __future__ import annotations

import re

MOST_HOSTS = 100_000


def expand(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """The hosts that patterns name, in their order. Raises ValueError for one that names none, or for a host named twice."""
    found: list[str] = []
    for pattern in patterns:
        for part in _split(pattern):
            found += _expand(part, pattern)
            if len(found) > MOST_HOSTS:
                raise ValueError(f"{pattern!r} names more than {MOST_HOSTS:,} hosts")
    twice = next((host for host in found if found.count(host) > 1), None) if len(set(found)) < len(found) else None
    if twice is not None:
        raise ValueError(f"{twice!r} is named twice")
    return tuple(found)


def _split(pattern: str) -> list[str]:
    """At the commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(pattern):
        depth += (c == "[") - (c == "]")
        if c == "," and depth == 0:
            parts.append(pattern[start:i])
            start = i + 1
    if depth:
        raise ValueError(f"{pattern!r}: a bracket is not closed")
    return [*parts, pattern[start:]]


def _expand(part: str, whole: str) -> list[str]:
    bracket = re.search(r"\[([^\[\]]*)\]", part)
    if bracket is None:
        if not re.fullmatch(r"[A-Za-z0-9_.@:-]+", part) or part.startswith("-"):
            raise ValueError(f"{whole!r}: {part!r} cannot name a host")
        return [part]
    found: list[str] = []
    for span in bracket.group(1).split(","):
        ends = re.fullmatch(r"(\d+)(?:-(\d+))?", span)
        if ends is None:
            raise ValueError(f"{whole!r}: {span!r} is no range of numbers (as [01-16,20])")
        first, last = ends.group(1), ends.group(2) or ends.group(1)
        if int(last) < int(first) or int(last) - int(first) >= MOST_HOSTS:
            raise ValueError(f"{whole!r}: the range {span} is empty or too long")
        for number in range(int(first), int(last) + 1):
            found += _expand(f"{part[: bracket.start()]}{number:0{len(first)}d}{part[bracket.end() :]}", whole)
    return found
