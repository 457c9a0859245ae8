"""Reads the next batch while the current one is trained on."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from shards.sampling.batches import BatchFeed
from shards.sampling.order import MixtureSegment
from shards.sampling.rows import Batch


class Prefetcher:
    """`read` as Feed has it, with one batch read ahead by a thread named shards-prefetch; `close` ends it.

    After positions [start, stop) it reads [start + stride, stop + stride), the stride being the samples of a whole step
    over all ranks. Asked for others, or after a change of mixture, it reads anew: what comes out is always the feed's.
    An error of the thread is raised by the read that asks for its batch.
    """

    def __init__(self, feed: BatchFeed, stride: int) -> None:
        self._feed = feed
        self._stride = stride
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="shards-prefetch")
        self._ahead: tuple[int, int, Future[tuple[tuple[MixtureSegment, ...], Batch]]] | None = None

    def _read(self, start: int, stop: int) -> tuple[tuple[MixtureSegment, ...], Batch]:
        # Read first, so that a mixture that changes during the read makes the batch stale.
        segments = self._feed.order.segments
        return segments, self._feed.read(start, stop)

    def read(self, start: int, stop: int) -> Batch:
        """The samples at positions [start, stop)."""
        batch = None
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            if ahead[:2] == (start, stop):
                segments, found = ahead[2].result()
                batch = found if segments is self._feed.order.segments else None
            else:
                ahead[2].cancel()
        if batch is None:
            batch = self._feed.read(start, stop)
        following = start + self._stride, stop + self._stride
        self._ahead = *following, self._pool.submit(self._read, *following)
        return batch

    def close(self) -> None:
        """End the thread and wait for it."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.close()
