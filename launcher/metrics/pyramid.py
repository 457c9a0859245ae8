"""The pyramid of one series on one lineage: appending rows, and reading nodes of any width.

New rows gather in memory and are flushed in batches; a flush recomputes, level by level, only the nodes above the rows
it adds. A level exists once the line is 16 of its nodes long, so the levels hold a third of the rows' count in all.
"""

from array import array
from collections.abc import Iterator

import numpy as np

from launcher.metrics.database import BLOCK, Database, Line, block_of
from midwatch.metrics.m4_columns import FANOUT, NODES_A_COLUMN
from midwatch.metrics.m4_nodes import NODE, ROW, Table, between, fold, from_rows


class Pyramid:
    """Rows and nodes of one line. Steps are not negative. Of two rows of one step the first to arrive stays."""

    def __init__(self, database: Database, line: Line) -> None:
        self._database = database
        self.line = line
        self.last = line.last  # with the rows in memory
        self.first = line.first
        self._clear()

    def _clear(self) -> None:
        self._steps, self._values = array("q"), array("d")
        self._tokens, self._times = array("q"), array("d")
        self.late = False  # whether a row in memory comes before another: then flush before reading

    @property
    def pending(self) -> int:
        """Rows in memory."""
        return len(self._steps)

    def append(self, step: int, value: float, tokens: int, time: float) -> None:
        if step <= self.last:
            self.late = True
        else:
            self.last = step
        if step < self.first or self.first < 0:
            self.first = step
        self._steps.append(step)
        self._values.append(value)
        self._tokens.append(tokens)
        self._times.append(time)

    def flush(self) -> None:
        """Moves the rows in memory to the database, within the caller's transaction."""
        if self.pending:
            self.insert(self._tail())
            self._clear()

    def insert(self, rows: Table) -> None:
        """Adds rows ordered by step, [n] of ROW, to the database, and brings the levels above them up to date."""
        line, low, high = self.line, int(rows["step"][0]), int(rows["step"][-1])
        if line.rows and low <= line.last:
            present = self._stored(0, low, high + 1)["step"]
            rows = rows[~np.isin(rows["step"], present)]
            if len(rows) == 0:
                return
            low, high = int(rows["step"][0]), int(rows["step"][-1])
        self._merge(0, rows)
        line.first = low if line.first < 0 else min(line.first, low)
        line.last = max(line.last, high)
        line.rows += len(rows)
        self.first, self.last = line.first, max(self.last, line.last)
        self._raise_levels(low, high)
        self._database.put_line(line)

    def nodes(self, level: int, start: int, stop: int) -> Table:
        """Nodes that hold exactly the rows of the steps [start, stop), ordered, each at most 4^level steps wide.

        Where the stretch begins or ends within a node, finer nodes and at last rows take its place.
        """
        found = self._read(min(level, self.line.top), start, stop)
        if self.pending and self.last >= start:
            tail = between(self._tail(), "step", start, stop)
            found = np.concatenate([found, from_rows(tail)]) if len(tail) else found
        return found

    def rows(self, start: int, stop: int, descending: bool = False) -> Iterator[Table]:
        """Rows of the steps [start, stop), a block at a time; each block ascends even when the blocks descend."""
        tail = self._tail()
        if descending:
            yield between(tail, "step", start, stop)
        if start < stop:
            blocks = self._database.blocks(self.line.id, 0, block_of(max(0, start), 0), block_of(max(0, stop - 1), 0), descending)
            for block in blocks:
                yield between(block, "step", start, stop)
        if not descending:
            yield between(tail, "step", start, stop)

    def _tail(self) -> Table:
        rows = np.empty(self.pending, ROW)
        rows["step"], rows["value"] = self._steps, self._values
        rows["tokens"], rows["time"] = self._tokens, self._times
        if self.late:
            _, first = np.unique(rows["step"], return_index=True)
            rows = rows[first]
        return rows

    def _read(self, level: int, start: int, stop: int) -> Table:
        start, stop = max(start, self.line.first, 0), min(stop, self.line.last + 1)
        if start >= stop:
            return np.empty(0, NODE)
        width = FANOUT**level
        found = self._stored(level, start, stop)
        if level == 0:
            return from_rows(between(found, "step", start, stop))
        low, high = np.searchsorted(found["stop"], start), np.searchsorted(found["start"], stop)
        found = found[low:high]
        head = tail = np.empty(0, NODE)  # what takes the place of a node that lies across `start`, across `stop`
        if len(found) and found["start"][0] < start:
            head = self._read(level - 1, start, min(stop, (int(found["start"][0]) // width + 1) * width))
            found = found[1:]
        if len(found) and found["stop"][-1] >= stop:
            tail = self._read(level - 1, int(found["start"][-1]), stop)
            found = found[:-1]
        return np.concatenate([head, found, tail]) if len(head) or len(tail) else found

    def _stored(self, level: int, start: int, stop: int) -> Table:
        """The records of all blocks that the steps [start, stop) touch."""
        return self._database.records(self.line.id, level, block_of(start, level), block_of(stop - 1, level))

    def _merge(self, level: int, records: Table) -> None:
        """Puts records into their blocks, in place of those of the same step (level 0) or node."""
        field, width = ("start", FANOUT**level) if level else ("step", 1)
        numbers = records[field] // (BLOCK * width)
        heads = np.flatnonzero(np.diff(numbers, prepend=numbers[0] - 1))
        for head, tail in zip(heads, [*heads[1:], len(records)], strict=True):
            number, fresh = int(numbers[head]), records[head:tail]
            for old in self._database.blocks(self.line.id, level, number, number):
                kept = old[~np.isin(old[field] // width, fresh[field] // width)]
                fresh = np.concatenate([kept, fresh])
                if len(kept) and kept[field][-1] > fresh[field][len(kept)]:
                    fresh = fresh[np.argsort(fresh[field], kind="stable")]
            self._database.put_block(self.line.id, level, number, fresh)

    def _raise_levels(self, low: int, high: int) -> None:
        """Recomputes every level's nodes above the steps from `low` to `high`, and adds levels as the line grows."""
        line, level = self.line, 1
        while level <= line.top or FANOUT**level * NODES_A_COLUMN <= line.last + 1:
            if level > line.top:
                low, high = line.first, line.last
                line.top = level
            width = FANOUT**level
            begin, end = low // width * width, (high // width + 1) * width
            below = between(self._stored(level - 1, begin, end), "start" if level > 1 else "step", begin, end)
            children = below if level > 1 else from_rows(below)
            self._merge(level, fold(children, width))
            level += 1
