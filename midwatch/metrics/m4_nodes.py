"""Nodes: M4 summaries of stretches of a series, and how they fold into wider ones.

A node sums up the rows of one series in one stretch of steps: first, smallest, largest and last value (M4, Jugel et
al., "M4: A Visualization-Oriented Time Series Data Aggregation", VLDB 2014), sum and counts. Non-finite values are
gaps. They take no part in the M4; a node counts them, and remembers whether one lies before its first finite value
(`lead`) or after its last (`trail`), which is all that drawing needs, by this rule:

    The line between two consecutive finite values is broken if a gap lies between them, unless both fall in the same
    dot column: such a gap is narrower than a dot, and the column is marked as holding one instead.

`fold` is associative, so a column folded from wide nodes equals the same column folded from its rows (its sum up to
rounding).
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Table = NDArray[Any]  # a structured array: ROW or NODE

ROW = np.dtype([("step", "<i8"), ("value", "<f8"), ("tokens", "<i8"), ("time", "<f8")])

NODE = np.dtype(
    [
        ("start", "<i8"),  # step of the first row, of any value
        ("stop", "<i8"),  # step of the last row
        ("first", "<f8"),  # first finite value; NaN when there is none, like the next three
        ("min", "<f8"),
        ("max", "<f8"),
        ("last", "<f8"),
        ("sum", "<f8"),  # of the finite values
        ("count", "<i4"),  # finite values
        ("nans", "<i4"),  # non-finite values
        ("first_tokens", "<i8"),
        ("last_tokens", "<i8"),
        ("first_time", "<f8"),
        ("last_time", "<f8"),
        ("lead", "?"),
        ("trail", "?"),
    ]
)


def between(table: Table, field: str, start: int, stop: int) -> Table:
    """The records whose `field`, in ascending order, lies in [start, stop); a view."""
    low, high = np.searchsorted(table[field], (start, stop))
    return table[low:high]


def from_rows(rows: Table) -> Table:
    """A node for each row: [n] ROW to [n] NODE."""
    nodes = np.empty(len(rows), NODE)
    finite = np.isfinite(rows["value"])
    value = np.where(finite, rows["value"], np.nan)
    nodes["start"] = nodes["stop"] = rows["step"]
    nodes["first"] = nodes["min"] = nodes["max"] = nodes["last"] = value
    nodes["sum"] = np.where(finite, value, 0.0)
    nodes["count"] = finite
    nodes["nans"] = nodes["lead"] = nodes["trail"] = ~finite
    nodes["first_tokens"] = nodes["last_tokens"] = rows["tokens"]
    nodes["first_time"] = nodes["last_time"] = rows["time"]
    return nodes


def fold(nodes: Table, width: int, origin: int = 0) -> Table:
    """Nodes ordered by step, folded into one for each non-empty stretch of `width` steps counted from `origin`.

    No node may lie across the border of two stretches.
    """
    if len(nodes) == 0:
        return nodes
    stretch = (nodes["start"] - origin) // width
    heads = np.flatnonzero(np.diff(stretch, prepend=stretch[0] - 1))
    tails = np.append(heads[1:], len(nodes)) - 1
    has_value = nodes["count"] > 0
    order = np.arange(len(nodes))
    first = np.minimum.reduceat(np.where(has_value, order, len(nodes) - 1), heads)
    last = np.maximum.reduceat(np.where(has_value, order, 0), heads)
    folded = np.empty(len(heads), NODE)
    folded["start"] = nodes["start"][heads]
    folded["stop"] = nodes["stop"][tails]
    folded["count"] = np.add.reduceat(nodes["count"], heads)
    folded["nans"] = np.add.reduceat(nodes["nans"], heads)
    folded["sum"] = np.add.reduceat(nodes["sum"], heads)
    folded["min"] = np.fmin.reduceat(nodes["min"], heads)
    folded["max"] = np.fmax.reduceat(nodes["max"], heads)
    empty = folded["count"] == 0
    folded["first"] = np.where(empty, np.nan, nodes["first"][first])
    folded["last"] = np.where(empty, np.nan, nodes["last"][last])
    # a stretch that opens with a node of gaps only has a gap before its first value, and likewise at its end
    folded["lead"] = empty | (first > heads) | nodes["lead"][first]
    folded["trail"] = empty | (last < tails) | nodes["trail"][last]
    folded["first_tokens"] = nodes["first_tokens"][heads]
    folded["last_tokens"] = nodes["last_tokens"][tails]
    folded["first_time"] = nodes["first_time"][heads]
    folded["last_time"] = nodes["last_time"][tails]
    return folded
