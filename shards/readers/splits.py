"""Which documents of a source are trained on and which are held out, within its limit of documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from shards.readers.sources import ReadPosition, Rejected, documents, is_held_out
from shards.readers.stdlib import Wanted
from shards.spec import Source
from shards.tokenization.records import Document

SMALL = 100_000  # documents up to which a source that would hold out nothing holds out its last one


class Keyed(Protocol):
    """What is held out or not by the hash of its key."""

    def hashed(self, seed: int) -> int:
        """64 bits."""


Record = TypeVar("Record", bound=Keyed)
Records = Callable[[Callable[[str], bool], Wanted], Iterator[Record | Rejected]]
"""All of a source's records; what is held out and what is still of use, by key, spares making those that are not."""


def quotas(limit: int | None, share: float) -> tuple[int | None, int | None]:
    """How much of a limit is for training and how much is held out: at least 1, if any share and 2 or more are."""
    if limit is None:
        return None, None
    held = min(max(1, round(limit * share)), limit - 1) if share > 0 else 0
    return limit - held, held


def split(source: Source, share: float, seed: int, reading: ReadPosition) -> Iterator[tuple[int, Document | Rejected, bool | None]]:
    """All of a source's records as they are read; see `divide`."""
    return divide(source, share, seed, lambda held_out, wanted: documents(source, reading, held_out, wanted))


def divide(
    source: Source, share: float, seed: int, records: Records[Record]
) -> Iterator[tuple[int, Record | Rejected, bool | None]]:
    """Records, each with its number and whether it is held out (None: beyond the limit), up to where both splits have theirs.

    A pure function of the source's content: the numbers are how a build that was killed finds its place again.
    """
    train_limit, held_limit = quotas(source.max_documents, share)
    limits = (train_limit, held_limit if share > 0 else 0)
    taken = [0, 0]
    keys: set[int] = set()
    last: tuple[int, Record] | None = None  # a training document is kept back until another follows it

    def is_full(held: bool) -> bool:
        limit = limits[held]
        return limit is not None and taken[held] >= limit

    def held_out(key: str) -> bool:
        return is_held_out(key, share, seed)

    def wanted(key: str) -> bool:
        return not is_full(held_out(key))

    early: list[tuple[int, Record]] = []  # held-out documents wait until there is one to train on
    number = 0
    for record in records(held_out, wanted):
        if isinstance(record, Rejected):
            yield number, record, None
            continue
        held = record.hashed(seed) < share * 2**64
        if is_full(held):
            yield number, record, None
        else:
            taken[held] += 1
            if held and taken[False] == 0 and len(early) < SMALL:
                early.append((number, record))
            elif held:
                yield number, record, True
            else:
                for waited, document in early:
                    yield waited, document, True
                early.clear()
                if last is not None:
                    yield last[0], last[1], False
                last = number, record
                last_is_new = _remember(keys, record.hashed(seed))
        number += 1
        if is_full(False) and is_full(True):
            break
    if early and source.path is not None:
        # The user's few documents would all be held out: then the first is trained on.
        yield early[0][0], early[0][1], False
        early = early[1:]
    for waited, document in early:
        yield waited, document, True
    if last is not None:
        # A small source can happen to hold out nothing: then its last document is. Not so the library's files, which are
        # held out in several sources at once.
        may = source.path is not None or source.origin == "stdlib-topics"
        alone = may and share > 0 and taken[1] == 0 and 2 <= taken[0] <= SMALL and last_is_new
        yield last[0], last[1], alone


def _remember(keys: set[int], hashed: int) -> bool:
    """Whether a key is new; forgets to count beyond what a small source has."""
    new = hashed not in keys
    if len(keys) <= SMALL:
        keys.add(hashed)
    return new
