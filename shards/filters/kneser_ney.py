"""Interpolated modified Kneser-Ney n-gram probabilities (Chen and Goodman 1998, section 3; pruning as in Heafield et al. 2013).

With a(g) the adjusted count of an n-gram g = (context, w): how often it occurs for the highest order and where it begins
with <s>, else how many different words stand before it;

    Y = t1 / (t1 + 2 t2),  D_k = k - (k + 1) Y t_(k+1) / t_k  for k = 1, 2, 3,  where t_k n-grams of the order have a = k
    u(w | context) = (a(context w) - D) / sum over x of a(context x),   D = D_min(a, 3)
    b(context)     = what u leaves of 1: all discounts, and all counts of n-grams that were pruned, over the same sum
    p(w | context) = u(w | context) + b(context) p(w | context without its first word)

down to single words, which are interpolated with 1 / V, V being the words that can come: all but <s>.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

UNK, BOS, EOS = 0, 1, 2

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


class NgramOrder(NamedTuple):
    """The n-grams of one order that are kept, one entry each."""

    words: Ints  # [n-grams, n] word ids
    probability: Floats
    backoff: Floats  # b of this n-gram as a context; 1 where nothing follows it


class _NgramCounts(NamedTuple):
    """All n-grams of one order, before pruning."""

    ends: Ints  # where one of its places ends in the text
    prefix: Ints  # number of the n-gram without its last word, among those of the order below
    suffix: Ints  # number of the n-gram without its first word
    times: Ints  # it occurs
    at_start: npt.NDArray[np.bool_]  # begins with <s>


def discounts(adjusted: Ints) -> Floats:
    """D_0 = 0, D_1, D_2, D_3; where too few n-grams tell them, lmplz's fallback of 0.5, 1 and 1.5."""
    t = np.bincount(np.minimum(adjusted, 5), minlength=6).astype(np.float64)
    if t[1:5].all():
        y = t[1] / (t[1] + 2 * t[2])
        found = np.array([0.0, *(k - (k + 1) * y * t[k + 1] / t[k] for k in (1, 2, 3))])
        if all(0 < found[k] <= k for k in (1, 2, 3)):
            return found
    return np.array([0.0, 0.5, 1.0, 1.5])


def estimate(text: Ints, vocabulary: int, order: int, min_count: int) -> list[NgramOrder]:
    """Probabilities of all orders from word ids: sentences one after the other, each between BOS and EOS.

    n-grams of three words and more that occur less than `min_count` times are left out. Orders above the longest sentence
    are empty.
    """
    counted = _count(text, vocabulary, order)
    orders: list[NgramOrder] = []
    lower = np.zeros(0)
    for n, grams in enumerate(counted, 1):
        above = counted[n] if n < len(counted) else None
        adjusted = grams.times
        if above is not None:
            before = np.bincount(above.suffix, minlength=len(grams.times))
            adjusted = np.where(grams.at_start, grams.times, before)
        if n == 1:
            adjusted[BOS] = 0  # <s> is never predicted
        kept = grams.times >= (min_count if n > 2 else 0)
        discount = discounts(adjusted)[np.minimum(adjusted, 3)]
        size = 1 if n == 1 else len(orders_prefix := orders[-1].backoff)
        group = np.zeros(len(adjusted), np.int64) if n == 1 else grams.prefix
        total = np.bincount(group, adjusted, size)
        left = np.bincount(group, np.where(kept, discount, adjusted), size)
        with np.errstate(invalid="ignore", divide="ignore"):
            backoff = np.where(total > 0, left / total, 1.0)
        share = np.where(kept, adjusted - discount, 0) / np.maximum(total, 1e-300)[group]
        if n == 1:
            lower = share + backoff[0] / (vocabulary - 1)
            lower[BOS] = 0
        else:
            orders_prefix[:] = backoff
            lower = share + backoff[group] * lower[grams.suffix]
        words = text[grams.ends[:, None] + np.arange(1 - n, 1)] if n > 1 else np.arange(vocabulary)[:, None]
        orders.append(NgramOrder(words, lower, np.ones(len(lower))))
        counted[n - 1] = grams._replace(times=np.where(kept, grams.times, 0))
    return [
        NgramOrder(grams.words[kept], grams.probability[kept], grams.backoff[kept])
        for n, grams in enumerate(orders, 1)
        for kept in [np.ones(len(grams.words), np.bool_) if n == 1 else counted[n - 1].times > 0]
    ]


def _count(text: Ints, vocabulary: int, order: int) -> list[_NgramCounts]:
    """All n-grams up to an order. An n-gram is told by the number of what comes before its last word, and that word."""
    start = np.maximum.accumulate(np.where(text == BOS, np.arange(len(text)), 0))  # of each place's sentence
    place = np.arange(len(text))
    number = text.copy()  # of the n-gram that ends at each place
    count = np.bincount(text, minlength=vocabulary)
    counted = [
        _NgramCounts(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64), count, np.arange(vocabulary) == BOS)
    ]
    for n in range(2, order + 1):
        ends = np.flatnonzero(place - start >= n - 1)
        prefixes = number[ends - 1]
        keys, first, inverse = np.unique(prefixes * vocabulary + text[ends], return_index=True, return_inverse=True)
        shown = ends[first]
        suffix = number[shown]
        counted.append(
            _NgramCounts(shown, prefixes[first], suffix, np.bincount(inverse, minlength=len(keys)), shown - start[shown] == n - 1)
        )
        number = np.zeros(len(text), np.int64)
        number[ends] = inverse
    return counted
