"""Which source each position reads: mixtures turned into segments, and where a source that has a limit is used up.

A change of mixture opens a segment where each source was left. A source that may be read `limit` samples in all has its
last one at a position that follows from the numbers alone; there another segment opens, in which its weight is 0 and the
others share its place. So all segments are a pure function of (seed, limits, changes), worked out ahead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import msgspec
import numpy as np

from shards.common.errors import ShardError
from shards.sampling.permutation import U64, permute

BLOCK = 4096


class Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """From `start` on sources are read by these weights, until the next change."""

    start: int
    weights: dict[str, float]
    asked: dict[str, float]  # the mixture as the recipe or the operator put it, which the weights were made of
    planned: bool = False  # known ahead: an operator's change holds until the next of these


class MixtureSegment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Positions from `start` on, until the next segment, read with one mixture."""

    start: int
    counts: dict[str, int]  # positions of a block for each source; they sum to BLOCK. None: all sources are used up
    bases: dict[str, int]  # samples of each source, ever read, that were taken before `start`


def apportion(mixture: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers that sum to BLOCK in the weights' proportions, by largest remainder; in order of names.

    A source with any weight at all gets at least one position of a block, so that none is silently never read.
    """
    for name, weight in mixture.items():
        if not math.isfinite(weight) or weight < 0:
            raise ShardError(f'mixture: the weight of "{name}" is {weight} (use 0 or more)')
    total = math.fsum(mixture.values())
    if total <= 0:
        raise ShardError("mixture: no source has a weight above 0 (give at least one)")
    wanted = {name: mixture[name] * BLOCK / total for name in sorted(mixture)}
    counts = {name: max(int(share), 1) if share > 0 else 0 for name, share in wanted.items()}
    by_remainder = sorted(counts, key=lambda name: (int(wanted[name]) - wanted[name], name))
    for name in by_remainder[: max(0, BLOCK - sum(counts.values()))]:
        counts[name] += 1
    while sum(counts.values()) > BLOCK:  # the least shares were rounded up to 1: the largest pays
        counts[max(counts, key=lambda name: (counts[name], name))] -= 1
    return counts


@lru_cache(maxsize=64)
def block_of(seed: int, start: int, block: int, counts: tuple[int, ...]) -> tuple[U64, U64]:
    """For each position of a block: the number of its source, and how many earlier ones of the block have it."""
    slots = permute(np.arange(BLOCK, dtype=np.uint64), BLOCK, f"block {seed} {start} {block}".encode())
    sources = np.searchsorted(np.cumsum(counts), slots, side="right").astype(np.uint64)
    ranks = np.empty(BLOCK, np.uint64)
    for number in range(len(counts)):
        here = sources == number
        ranks[here] = np.arange(np.count_nonzero(here), dtype=np.uint64)
    return sources, ranks


def taken(seed: int, segment: MixtureSegment, position: int) -> dict[str, int]:
    """How many samples of each source are read before `position`, which lies in the segment or at its end."""
    found = dict(segment.bases)
    if not segment.counts:
        return found
    block, offset = divmod(position - segment.start, BLOCK)
    sources, _ = block_of(seed, segment.start, block, tuple(segment.counts.values()))
    within = np.bincount(sources[:offset].astype(np.int64), minlength=len(segment.counts))
    for number, name in enumerate(segment.counts):
        found[name] += block * segment.counts[name] + int(within[number])
    return found


def lay_out(seed: int, limits: Mapping[str, int], changes: Sequence[Change]) -> tuple[MixtureSegment, ...]:
    """All segments. limits: the samples that a source gives in all, where it is limited.

    The last one has no counts where every source of a mixture is used up: what follows cannot be read.
    """
    found: list[MixtureSegment] = []
    for number, change in enumerate(changes):
        stop = changes[number + 1].start if number + 1 < len(changes) else None
        start: int | None = change.start
        while start is not None and (stop is None or start < stop):
            before = taken(seed, found[-1], start) if found else {}
            bases = {name: before.get(name, 0) for name in sorted({*before, *change.weights})}
            spent = {name for name, limit in limits.items() if bases.get(name, 0) >= limit}
            weights = {name: 0.0 if name in spent else weight for name, weight in change.weights.items()}
            if not any(weights.values()):
                return (*found, MixtureSegment(start, {}, bases))
            found.append(MixtureSegment(start, apportion(weights), bases))
            start = _used_up(seed, found[-1], limits)
    return tuple(found)


def _used_up(seed: int, segment: MixtureSegment, limits: Mapping[str, int]) -> int | None:
    """The position after the one that takes the last sample of a source of the segment; of several, the first."""
    left = {name: limits[name] - segment.bases[name] for name, count in segment.counts.items() if count and name in limits}
    if not left:
        return None
    block = min((samples - 1) // segment.counts[name] for name, samples in left.items())
    sources, ranks = block_of(seed, segment.start, block, tuple(segment.counts.values()))
    numbers = {name: number for number, name in enumerate(segment.counts)}
    places = []
    for name, samples in left.items():
        if (samples - 1) // segment.counts[name] == block:
            rank = (samples - 1) % segment.counts[name]
            places.append(int(np.flatnonzero((sources == numbers[name]) & (ranks == rank))[0]))
    return segment.start + block * BLOCK + min(places) + 1
