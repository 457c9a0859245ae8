"""Which frames of a source have arrived: the numbers as ranges, so that a resend is known however the gaps lie."""

from bisect import bisect_right

MAX_RANGES = 4096  # gaps come from dropped telemetry; past this many the oldest are taken for closed


class NumberRanges:
    """A set of numbers of one source, kept as sorted, disjoint, inclusive ranges."""

    def __init__(self, ranges: list[tuple[int, int]] | None = None) -> None:
        self.starts = [start for start, _ in ranges or []]
        self.ends = [end for _, end in ranges or []]

    @property
    def ranges(self) -> list[tuple[int, int]]:
        return list(zip(self.starts, self.ends, strict=True))

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self.starts, number) - 1
        return at >= 0 and number <= self.ends[at]

    def add(self, number: int) -> bool:
        """Adds the number; False when it was there already."""
        at = bisect_right(self.starts, number)
        if at and number <= self.ends[at - 1]:
            return False
        joins_left = bool(at) and self.ends[at - 1] == number - 1
        joins_right = at < len(self.starts) and self.starts[at] == number + 1
        if joins_left and joins_right:
            self.ends[at - 1] = self.ends.pop(at)
            del self.starts[at]
        elif joins_left:
            self.ends[at - 1] = number
        elif joins_right:
            self.starts[at] = number
        else:
            self.starts.insert(at, number)
            self.ends.insert(at, number)
            if len(self.starts) > MAX_RANGES:
                self.ends[0] = self.ends.pop(1)
                del self.starts[1]
        return True
