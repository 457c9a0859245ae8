"""Scales: ranges and ticks that stay put while data moves, and numbers short enough for a margin."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tui.chart.formatting import compact, duration

__all__ = ["Scale", "compact", "duration", "nice_step", "scale", "value_range"]


class Scale(NamedTuple):
    """The values at the lower and upper edge of a chart, and those that get a label."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False


def scale(low: float, high: float, ticks: int, log: bool = False) -> Scale:
    """A scale that holds [low, high], widened to whole ticks so that it seldom moves. `log` needs high > 0."""
    ticks = max(1, ticks)
    if log and high > 0:
        return _log_scale(low if low > 0 else high * 1e-6, high, ticks)
    if not high - low > 1e-12 * max(abs(low), abs(high)):
        margin = abs(low) * 0.05 or 1.0
        low, high = low - margin, high + margin
    step = nice_step((high - low) / ticks)
    if step == 0.0 or not math.isfinite(high - low):  # wider than a float can say
        return Scale(max(low, -8e307), min(high, 8e307), (0.0,))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return Scale(first * step, last * step, tuple(number * step for number in range(first, last + 1)))


def _log_scale(low: float, high: float, ticks: int) -> Scale:
    if high / low < 20:  # hardly more than a decade: decades would give one tick
        linear = scale(low, high, ticks)
        inside = tuple(tick for tick in linear.ticks if tick > 0)
        bottom = linear.low if linear.low > 0 else low
        return Scale(bottom, linear.high, inside, True)
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    step = max(1, -(-(last - first) // ticks))
    return Scale(10.0**first, 10.0**last, tuple(10.0**power for power in range(first, last + 1, step)), True)


def nice_step(least: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is not below `least`."""
    if least <= 0 or not math.isfinite(least):
        return 0.0
    power = 10.0 ** math.floor(math.log10(least))
    return next((power * factor for factor in (1, 2, 5, 10) if power * factor >= least * (1 - 1e-9)), power * 10)


def value_range(arrays: Sequence[tuple[np.ndarray, np.ndarray]], log: bool) -> tuple[float, float] | None:
    """The smallest and largest finite value of pairs (minima, maxima); only positive ones with `log`."""
    lows, highs = [], []
    for minima, maxima in arrays:
        minima, maxima = minima[np.isfinite(minima)], maxima[np.isfinite(maxima)]
        if log:  # a column that dips below zero is still drawn from its largest value
            minima = np.concatenate([minima[minima > 0], maxima[maxima > 0]])
            maxima = maxima[maxima > 0]
        if len(minima) and len(maxima):
            lows.append(float(minima.min()))
            highs.append(float(maxima.max()))
    return (min(lows), max(highs)) if lows else None
