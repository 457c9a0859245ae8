"""How sure a share is that was measured on few samples."""

from __future__ import annotations

import math

Z = 1.959964
"""Standard deviations of a normal distribution that hold 95 % of it."""


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """The 95 % score interval of a share, 0 to 1, that was seen in `count` > 0 samples (Wilson 1927, JASA 22)."""
    middle = share + Z * Z / (2 * count)
    spread = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count))
    scale = 1 + Z * Z / count
    return (middle - spread) / scale, (middle + spread) / scale
