"""One-row pictures: a sparkline or heat strip (GPU utilisation), a progress bar, the pipeline's stages.

Each returns runs of text in one ink; `text_of` joins them where colour does not matter.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from tui.chart.styles import Ink
from tui.chart.text import plain

Run = tuple[str, Ink]

_BLOCKS = {True: "▁▂▃▄▅▆▇█", False: "_.:-=+*#"}
_REDUCE: dict[str, Callable[[np.ndarray], float]] = {"min": np.min, "mean": np.mean, "max": np.max}
_MISSING = {True: "·", False: "?"}


def spark(
    values: ArrayLike,
    width: int,
    low: float | None = None,
    high: float | None = None,
    unicode: bool = True,
    several: Literal["min", "mean", "max"] = "mean",
) -> list[Run]:
    """Values as blocks of eight heights in up to `width` cells; NaN is a dot of its own.

    More values than cells: a cell stands for several, by their min, mean or max. `low` and `high` default to those of
    the values; beyond them a value is drawn at the edge.
    """
    data = np.asarray(values, np.float64)
    if width <= 0 or len(data) == 0:
        return []
    if len(data) > width:
        data = _bucketed(data, width, several)
    finite = data[np.isfinite(data)]
    low = float(finite.min()) if low is None and len(finite) else low or 0.0
    high = float(finite.max()) if high is None and len(finite) else high or 0.0
    fraction = np.clip((data - low) / (high - low), 0, 1) if high > low else np.where(np.isfinite(data), 0.5, np.nan)
    runs: list[Run] = []
    for part in fraction:
        if np.isnan(part):
            runs.append((_MISSING[unicode], Ink.FAINT))
        else:
            runs.append((_BLOCKS[unicode][int(part * 7.999)], Ink(Ink.HEAT_0 + int(part * 4.999))))
    return merged(runs)


def bar(fraction: float, width: int, unicode: bool = True, ink: Ink = Ink.ACTIVE) -> list[Run]:
    """A progress bar of `width` cells; NaN is no progress known."""
    if width <= 0:
        return []
    known = 0.0 if np.isnan(fraction) else min(1.0, max(0.0, fraction))
    full, half, empty = ("━", "╸", "─") if unicode else ("#", "", "-")
    halves = int(known * width * 2 + 1e-9)
    filled = full * (halves // 2) + (half if halves % 2 else "")
    return merged([(filled, ink), (empty * (width - len(filled)), Ink.AXIS)])


@dataclass(frozen=True)
class StagePart:
    """A stage on the strip: `weight` is its share of the strip, `fraction` how far it is, NaN when that is unknown."""

    name: str
    weight: float
    fraction: float
    active: bool = False


def stage_strip(stages: Sequence[StagePart], width: int, unicode: bool = True) -> list[Run]:
    """The pipeline in one row: each stage its name and a bar; the active one is marked `>` and bold, done ones `✓`."""
    if width <= 0 or not stages:
        return []
    shares = np.array([max(stage.weight, 0.0) for stage in stages]) + 1e-9
    least = min(6, width // len(stages))
    room = width - least * len(stages)
    edges = np.rint(np.cumsum(shares / shares.sum()) * room).astype(int)
    runs: list[Run] = []
    for number, stage in enumerate(stages):
        cells = least + int(edges[number] - (edges[number - 1] if number else 0))
        done = stage.fraction >= 1.0 and not stage.active
        sign = (">" if not unicode else "▸") if stage.active else (("*" if not unicode else "✓") if done else " ")
        ink = Ink.ACTIVE if stage.active else Ink.DONE if done else Ink.FAINT
        label = f"{sign}{plain(stage.name, unicode)} "[: max(0, cells - 1)]
        runs.append((label, ink))
        runs.extend(bar(stage.fraction, cells - len(label) - 1, unicode, ink))
        runs.append((" " if cells else "", Ink.BLANK))
    return merged(runs)


def merged(runs: Sequence[Run]) -> list[Run]:
    """Neighbours of one ink joined, empty ones dropped."""
    joined: list[Run] = []
    for text, ink in runs:
        if text and joined and joined[-1][1] == ink:
            joined[-1] = (joined[-1][0] + text, ink)
        elif text:
            joined.append((text, ink))
    return joined


def text_of(runs: Sequence[Run]) -> str:
    return "".join(text for text, _ in runs)


def _bucketed(data: np.ndarray, width: int, several: str) -> np.ndarray:
    buckets = np.array_split(data, width)
    finite = [bucket[np.isfinite(bucket)] for bucket in buckets]
    return np.array([_REDUCE[several](bucket) if len(bucket) else np.nan for bucket in finite])
