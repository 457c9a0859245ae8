"""The order in which samples are read: a pure function of (seed, mixture, position), not a shuffled list.

Positions count samples through a stage. The mixture's weights become whole numbers n_j that sum to a block of 4,096
positions; a keyed permutation of the block's slots says from which source each position reads, and another one of a
source's N_j samples, a new one for each epoch, says which sample. So any position is found in constant time and memory,
at any number of ranks, and every sample of an epoch comes exactly once. New weights, and a source that is used up, open a
new segment that begins where each source was left (shards/sampling/segments.py):

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
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from shards.common.errors import ShardError
from shards.sampling.permutation import permute
from shards.sampling.segments import BLOCK, Change, MixtureSegment, block_of, lay_out, taken

__all__ = ["BLOCK", "VERSION", "MixtureSegment", "Sample", "SampleOrder"]

VERSION = 2  # of the algorithm and its state: any change that could reorder a running job needs a new one

Sample = tuple[str, int, int]  # source, epoch, sample of the epoch's order


class OrderState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All that decides the order; a checkpoint keeps it beside the position."""

    version: int
    seed: int
    sizes: dict[str, int]  # samples of an epoch of each source
    limits: dict[str, int]  # samples that a source gives in all, where it is limited
    changes: list[Change]
    segments: list[MixtureSegment]  # which follow from the rest: what they were when this was written


class SampleOrder:
    """Which sample each position reads. `sizes` is the samples of an epoch by source, `mixture` the weights by source.

    asked: as `reweight` has it. limits: the samples that a source gives in all; then its weight is 0. schedule: mixtures by
    the position, above 0 and rising, from which they hold. Reading is thread-safe: a change swaps one tuple.
    """

    def __init__(
        self,
        seed: int,
        sizes: Mapping[str, int],
        mixture: Mapping[str, float],
        *,
        asked: Mapping[str, float] | None = None,
        limits: Mapping[str, int] | None = None,
        schedule: Sequence[Change] = (),
    ) -> None:
        self.seed = seed
        self.sizes = dict(sizes)
        self.limits = dict(limits or {})
        self._changes: tuple[Change, ...] = ()
        self._segments: tuple[MixtureSegment, ...] = ()
        for change in schedule:
            self._check(change.weights)
        starts = [change.start for change in schedule]
        if starts != sorted({start for start in starts if start > 0}):
            raise ShardError(f"mixture: scheduled at {starts}, which do not rise from above 0 (put them in order)")
        self._changes = tuple(msgspec.structs.replace(change, planned=True) for change in schedule)
        self.reweight(0, mixture, asked)

    @property
    def segments(self) -> tuple[MixtureSegment, ...]:
        return self._segments

    @property
    def end(self) -> int | None:
        """The first position that cannot be read, because all sources of its mixture are used up."""
        last = self._segments[-1]
        return None if last.counts else last.start

    def asked(self, position: int) -> dict[str, float]:
        """The mixture in force at a position, as it was asked for."""
        at = bisect.bisect_right(self._changes, position, key=lambda change: change.start)
        return dict(self._changes[at - 1].asked)

    def add_source(self, name: str, size: int, limit: int | None = None) -> None:
        """Make another source known; it is read once a mixture names it."""
        if name not in self.sizes:
            self.sizes[name] = size
            if limit is not None:
                self.limits[name] = limit

    def _check(self, mixture: Mapping[str, float]) -> None:
        for name, weight in mixture.items():
            if name not in self.sizes:
                known = ", ".join(sorted(self.sizes))
                raise ShardError(f'mixture: there is no source "{name}" (there are: {known})')
            if not math.isfinite(weight) or weight < 0:
                raise ShardError(f'mixture: the weight of "{name}" is {weight} (use 0 or more)')
            if weight > 0 and self.sizes[name] < 1:
                raise ShardError(f'mixture: source "{name}" has no samples (give it weight 0, or more text)')
        if not any(weight > 0 for weight in mixture.values()):
            raise ShardError("mixture: no source has a weight above 0 (give at least one)")

    def reweight(self, position: int, mixture: Mapping[str, float], asked: Mapping[str, float] | None = None) -> None:
        """Read with `mixture` from `position` on, until the next scheduled one; nothing before it changes.

        Sources left out are not read. asked: what `asked` will say; the mixture itself, where left out.
        """
        self._check(mixture)
        operated = [change.start for change in self._changes if not change.planned]
        if operated and position < operated[-1]:
            raise ShardError(f"mixture: it already changed at {operated[-1]}, after {position} (restore an earlier state first)")
        before = [change for change in self._changes if change.start < position]
        after = [change for change in self._changes if change.start > position]
        changes = (*before, Change(position, dict(mixture), dict(mixture if asked is None else asked)), *after)
        segments = lay_out(self.seed, self.limits, changes)
        if not segments[-1].counts and segments[-1].start <= position:
            spent = ", ".join(f'"{name}"' for name, weight in sorted(mixture.items()) if weight > 0)
            raise ShardError(f"mixture: {spent} used up, by max_epochs (give a source that is not used up a weight above 0)")
        self._changes, self._segments = changes, segments

    def delay(self, position: int, count: int) -> None:
        """What is scheduled after `position` comes `count` positions later: so many were passed over."""
        changes = tuple(
            msgspec.structs.replace(change, start=change.start + count) if change.start > position else change
            for change in self._changes
        )
        self._changes, self._segments = changes, lay_out(self.seed, self.limits, changes)

    def taken(self, position: int) -> dict[str, int]:
        """How many samples of each source are read before `position`."""
        return taken(self.seed, self._segment(position), position)

    def at(self, position: int) -> Sample:
        """The sample at one position."""
        return self.span(position, position + 1)[0]

    def span(self, start: int, stop: int) -> list[Sample]:
        """The samples at positions [start, stop). ShardError where the sources do not reach so far."""
        if not 0 <= start <= stop:
            raise ValueError(f"positions {start} to {stop}")
        if self.end is not None and stop > self.end:
            read, limits = self._segments[-1].bases, sorted(self.limits.items())
            spent = ", ".join(f'"{name}"' for name, limit in limits if read.get(name, 0) >= limit)
            raise ShardError(
                f"all sources of the mixture are used up after {self.end:,} samples: {spent} read as often as"
                " max_epochs allows (set mixture.SOURCE of one that is not used up, or advance to the next stage)"
            )
        samples: list[Sample] = []
        while start < stop:
            segment = self._segment(start)
            end = min(stop, self._end(segment), start + BLOCK - (start - segment.start) % BLOCK)
            samples += self._within_block(segment, start, end)
            start = end
        return samples

    def _segment(self, position: int) -> MixtureSegment:
        return self._segments[bisect.bisect_right(self._segments, position, key=lambda segment: segment.start) - 1]

    def _end(self, segment: MixtureSegment) -> int:
        following = [other.start for other in self._segments if other.start > segment.start]
        return following[0] if following else 1 << 62

    def _within_block(self, segment: MixtureSegment, start: int, stop: int) -> list[Sample]:
        block, offset = divmod(start - segment.start, BLOCK)
        names = list(segment.counts)
        sources, ranks = block_of(self.seed, segment.start, block, tuple(segment.counts.values()))
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
        state = OrderState(VERSION, self.seed, dict(self.sizes), dict(self.limits), list(self._changes), list(self._segments))
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
            if self.limits.get(name) != state.limits.get(name):
                raise ShardError(
                    f'source "{name}" gives {self.limits.get(name, "any number of")} samples in all, the checkpoint\'s order counts'
                    f" on {state.limits.get(name, 'any number')} (make max_epochs what it was, or begin the stage anew)"
                )
        if state.seed != self.seed:
            raise ShardError(f"the checkpoint's data seed is {state.seed}, the recipe's {self.seed} (use {state.seed})")
        starts = [change.start for change in state.changes]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ShardError("the checkpoint's data order has no mixture at 0, or unsorted ones (use another checkpoint)")
        for change in state.changes:
            self._check(change.weights)
        segments = lay_out(self.seed, self.limits, state.changes)
        if segments != tuple(state.segments):
            raise ShardError("the checkpoint's data order is malformed: its segments are not those of its mixtures (use another)")
        self._changes, self._segments = tuple(state.changes), segments
