"""Pages of the KV cache: who has which, and which hold a prefix that another sequence may share.

A page holds the keys and values of `size` tokens in all layers. A full page is known by a hash of its tokens and of all before
them. One that nobody holds keeps what it has until it is needed for something else, the longest unused first; before any of these
go pages without a prefix, the lowest first, so that what is in use lies together. Kwon et al. 2023 ("PagedAttention"), section 4;
prefixes found by hash as vLLM's automatic prefix caching does.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Sequence as Items

import numpy as np
import xxhash

from trainer.generate.request import Sequence


class BlockManager:
    """Page 0 is nobody's: what is filled up in a batch writes there."""

    def __init__(self, count: int, size: int) -> None:
        """count: pages, that of nobody not among them. size: tokens of a page."""
        self.count, self.size = count, size
        self._holders = [0] * (count + 1)
        self._blank = list(range(1, count + 1))
        """A heap: without a prefix, and nobody's."""
        self._free: OrderedDict[int, None] = OrderedDict()
        """With a prefix, and nobody's."""
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    @property
    def free(self) -> int:
        return len(self._blank) + len(self._free)

    @property
    def held(self) -> int:
        return self.count - self.free

    def needed(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def share(self, sequence: Sequence) -> None:
        """Gives a sequence without pages those that hold its beginning; its last token is always left to be computed."""
        assert not sequence.pages
        key = b""
        for number in range((len(sequence.tokens) - 1) // self.size):
            found = self._key(key, sequence.tokens[number * self.size : (number + 1) * self.size])
            page = self._page_of.get(found)
            if page is None:
                break
            key = found
            self._hold(page)
            sequence.pages.append(page)
        sequence.keyed, sequence.key = len(sequence.pages), key
        sequence.cached = len(sequence.pages) * self.size

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Pages for so many tokens of the sequence in all; whether there were enough. It keeps what it has either way."""
        missing = self.needed(tokens) - len(sequence.pages)
        if missing > self.free:
            return False
        for _ in range(missing):
            page = heapq.heappop(self._blank) if self._blank else self._oldest()
            self._holders[page] = 1
            sequence.pages.append(page)
        return True

    def know(self, sequence: Sequence, tokens: int) -> None:
        """The full pages among the sequence's first `tokens` tokens hold what they should by the time anybody reads them."""
        while (sequence.keyed + 1) * self.size <= tokens:
            at = sequence.keyed
            sequence.key = self._key(sequence.key, sequence.tokens[at * self.size : (at + 1) * self.size])
            page = sequence.pages[at]
            if sequence.key not in self._page_of and page not in self._key_of:
                self._page_of[sequence.key], self._key_of[page] = page, sequence.key
            sequence.keyed += 1

    def release(self, sequence: Sequence) -> None:
        """Takes its pages back. The last goes first: a prefix is of more use than what followed it."""
        for page in reversed(sequence.pages):
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            if page in self._key_of:
                self._free[page] = None
            else:
                heapq.heappush(self._blank, page)
        sequence.pages, sequence.cached, sequence.keyed, sequence.key = [], 0, 0, b""

    def forget(self) -> None:
        """No page holds a prefix any more: the weights have changed."""
        self._page_of.clear()
        self._key_of.clear()
        self._blank += self._free
        self._free.clear()
        heapq.heapify(self._blank)

    def _hold(self, page: int) -> None:
        if not self._holders[page]:
            del self._free[page]
        self._holders[page] += 1

    def _oldest(self) -> int:
        page, _ = self._free.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        return page

    @staticmethod
    def _key(before: bytes, tokens: Items[int]) -> bytes:
        return xxhash.xxh3_128_digest(before + np.asarray(tokens, "<u4").tobytes())
