"""The order in which samples are read: a pure function of (seed, mixture, position), not a shuffled list.

Positions count samples through a stage. The mixture's weights become whole numbers n_j that sum to a block of 4,096
positions; a keyed Feistel permutation (after Luby and Rackoff 1988; with cycle-walking, Black and Rogaway 2002) of the
block's slots says from which source each position reads, and another one of a source's N_j samples, a new one for each
epoch, says which sample. So any position is found in constant time and memory, at any number of ranks, and every sample
of an epoch comes exactly once. New weights open a new segment that begins where each source was left:

    block, offset = divmod(position - start, 4096)
    source        = the one whose slots hold permutation(offset)
    k             = base[source] + block * n[source] + earlier positions of the block with this source
    epoch, i      = divmod(k, N[source])
    sample        = permutation(i), keyed by (seed, source, epoch)

Counting earlier positions, rather than using the permuted slot, is what keeps "exactly once" when the weights change
within a block.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from shards.errors import ShardError

VERSION = 1  # of the algorithm: any change that could reorder a running job needs a new one
BLOCK = 4096
ROUNDS = 6

Sample = tuple[str, int, int]  # source, epoch, sample of the epoch's order
U64 = npt.NDArray[np.uint64]


class Segment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Positions from `start` on, until the next segment, read with one mixture."""

    start: int
    counts: dict[str, int]  # positions of a block for each source; they sum to BLOCK
    bases: dict[str, int]  # samples of each source, ever read, that were taken before `start`


class OrderState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that decides the order; a checkpoint keeps it beside the position."""

    version: int
    seed: int
    sizes: dict[str, int]  # samples of an epoch of each source
    segments: list[Segment]


def permute(values: U64, size: int, key: bytes) -> U64:
    """The images of `values` (each below `size`) under the permutation of range(size) that `key` names; vectorised.

    A balanced Feistel network over the next even number of bits; images beyond `size` are permuted again.
    """
    half = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    subkeys = np.frombuffer(blake2b(key, digest_size=8 * ROUNDS).digest(), "<u8")

    def encipher(plain: U64) -> U64:
        left, right = plain >> half, plain & mask
        for subkey in subkeys:
            mixed = (right + subkey) * np.uint64(0x9E3779B97F4A7C15)
            mixed ^= mixed >> np.uint64(32)
            mixed *= np.uint64(0xD6E8FEB86659FD93)
            mixed ^= mixed >> np.uint64(29)
            left, right = right, left ^ (mixed & mask)
        return (left << half) | right

    images = encipher(values)
    outside = np.flatnonzero(images >= size)
    while outside.size:
        images[outside] = encipher(images[outside])
        outside = outside[images[outside] >= size]
    return images


def apportion(mixture: Mapping[str, float]) -> dict[str, int]:
    """Whole numbers that sum to BLOCK in the weights' proportions, by largest remainder; in order of names.

    A source with any weight at all gets at least one position of a block, so that none is silently never read.
    """
    for name, weight in mixture.items():
        if not math.isfinite(weight) or weight < 0:
            raise ShardError(f'mixture: the weight of "{name}" is {weight} (use 0 or more)')
    total = sum(mixture.values())
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
def _block(seed: int, start: int, block: int, counts: tuple[int, ...]) -> tuple[U64, U64]:
    """For each position of a block: the number of its source, and how many earlier ones of the block have it."""
    slots = permute(np.arange(BLOCK, dtype=np.uint64), BLOCK, f"block {seed} {start} {block}".encode())
    sources = np.searchsorted(np.cumsum(counts), slots, side="right").astype(np.uint64)
    ranks = np.empty(BLOCK, np.uint64)
    for number in range(len(counts)):
        here = sources == number
        ranks[here] = np.arange(np.count_nonzero(here), dtype=np.uint64)
    return sources, ranks


class Order:
    """Which sample each position reads. `sizes` is the samples of an epoch by source, `mixture` the weights by source.

    Reading is thread-safe: a change of mixture swaps one tuple.
    """

    def __init__(self, seed: int, sizes: Mapping[str, int], mixture: Mapping[str, float]) -> None:
        self.seed = seed
        self.sizes = dict(sizes)
        self._segments: tuple[Segment, ...] = ()
        self.reweight(0, mixture)

    @property
    def segments(self) -> tuple[Segment, ...]:
        return self._segments

    def add_source(self, name: str, size: int) -> None:
        """Make another source known; it is read once a mixture names it."""
        self.sizes.setdefault(name, size)

    def reweight(self, position: int, mixture: Mapping[str, float]) -> None:
        """Read with `mixture` from `position` on; nothing before it changes. Sources left out are not read."""
        for name in mixture:
            if name not in self.sizes:
                known = ", ".join(sorted(self.sizes))
                raise ShardError(f'mixture: there is no source "{name}" (there are: {known})')
            if mixture[name] > 0 and self.sizes[name] < 1:
                raise ShardError(f'mixture: source "{name}" has no samples (give it weight 0, or more text)')
        counts = apportion(mixture)
        if self._segments and position < self._segments[-1].start:
            last = self._segments[-1].start
            raise ShardError(f"mixture: it already changed at {last}, after {position} (restore an earlier state first)")
        bases = self.taken(position) if self._segments else {}
        bases = {name: bases.get(name, 0) for name in sorted({*bases, *counts})}
        kept = tuple(segment for segment in self._segments if segment.start < position)
        self._segments = (*kept, Segment(start=position, counts=counts, bases=bases))

    def taken(self, position: int) -> dict[str, int]:
        """How many samples of each source are read before `position`."""
        segment = self._segment(position)
        block, offset = divmod(position - segment.start, BLOCK)
        names = list(segment.counts)
        sources, _ = _block(self.seed, segment.start, block, tuple(segment.counts.values()))
        within = np.bincount(sources[:offset].astype(np.int64), minlength=len(names))
        taken = dict(segment.bases)
        for number, name in enumerate(names):
            taken[name] += block * segment.counts[name] + int(within[number])
        return taken

    def at(self, position: int) -> Sample:
        """The sample at one position."""
        return self.span(position, position + 1)[0]

    def span(self, start: int, stop: int) -> list[Sample]:
        """The samples at positions [start, stop)."""
        if not 0 <= start <= stop:
            raise ValueError(f"positions {start} to {stop}")
        samples: list[Sample] = []
        while start < stop:
            segment = self._segment(start)
            end = min(stop, self._end(segment), start + BLOCK - (start - segment.start) % BLOCK)
            samples += self._within_block(segment, start, end)
            start = end
        return samples

    def _segment(self, position: int) -> Segment:
        return self._segments[bisect.bisect_right(self._segments, position, key=lambda segment: segment.start) - 1]

    def _end(self, segment: Segment) -> int:
        following = [other.start for other in self._segments if other.start > segment.start]
        return following[0] if following else 1 << 62

    def _within_block(self, segment: Segment, start: int, stop: int) -> list[Sample]:
        block, offset = divmod(start - segment.start, BLOCK)
        names = list(segment.counts)
        sources, ranks = _block(self.seed, segment.start, block, tuple(segment.counts.values()))
        sources, ranks = sources[offset : offset + stop - start], ranks[offset : offset + stop - start]
        samples: list[Sample | None] = [None] * (stop - start)
        for number in np.unique(sources).tolist():
            name = names[number]
            where = np.flatnonzero(sources == number)
            size = self.sizes[name]
            taken = ranks[where] + np.uint64(segment.bases[name] + block * segment.counts[name])
            epochs, indices = np.divmod(taken, np.uint64(size))
            for epoch in np.unique(epochs).tolist():
                here = epochs == epoch
                images = permute(indices[here], size, f"sample {self.seed} {name} {epoch}".encode())
                for place, image in zip(where[here].tolist(), images.tolist(), strict=True):
                    samples[place] = (name, epoch, image)
        return samples  # type: ignore[return-value]  # every place was filled: the sources cover the block

    def state(self) -> dict[str, Any]:
        """Plain values, fit for msgpack or JSON."""
        state = OrderState(VERSION, self.seed, dict(self.sizes), list(self._segments))
        plain: dict[str, Any] = msgspec.to_builtins(state)
        return plain

    def restore(self, plain: Mapping[str, Any]) -> None:
        """Take over the order that `state()` gave; ShardError where it cannot be continued exactly."""
        version = plain.get("version")
        if version != VERSION:
            raise ShardError(
                f"the checkpoint's data order is of version {version}, this release reads version {VERSION}"
                " (go on with the release that wrote it, or begin the stage anew)"
            )
        try:
            state = msgspec.convert(plain, OrderState)
        except msgspec.ValidationError as error:
            raise ShardError(f"the checkpoint's data order is malformed: {error} (use another checkpoint)") from None
        for name, size in state.sizes.items():
            if self.sizes.get(name) != size:
                raise ShardError(
                    f'source "{name}" has {self.sizes.get(name, "no")} samples an epoch, the checkpoint\'s order counts on'
                    f" {size} (put its shards back as they were, or begin the stage anew)"
                )
        if state.seed != self.seed:
            raise ShardError(f"the checkpoint's data seed is {state.seed}, the recipe's {self.seed} (use {state.seed})")
        starts = [segment.start for segment in state.segments]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ShardError("the checkpoint's data order has no segment at 0, or unsorted ones (use another checkpoint)")
        for segment in state.segments:
            if sum(segment.counts.values()) != BLOCK or not set(segment.counts) <= set(segment.bases) & set(self.sizes):
                raise ShardError(f"the checkpoint's data order is malformed at {segment.start} (use another checkpoint)")
        self._segments = tuple(state.segments)
