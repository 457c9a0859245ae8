"""`[[watch]]`: a condition on a metric, and what is done when it holds."""

from __future__ import annotations

from typing import Literal

import msgspec


class Watch(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One watch rule; exactly one of `above`, `below`, `sigma` and `not_finite` says when it fires."""

    name: str
    metric: str
    """Slash-path of the metric, as `train/loss`."""
    above: float | None = None
    below: float | None = None
    sigma: float | None = None
    """Standard deviations over the mean of the last `window` values."""
    not_finite: bool = False
    """Fires on NaN and infinity."""
    window: int = 128
    """Values that `sigma` looks back on; it is silent until there are so many."""
    steps: int = 1
    """Values in a row for which the condition must hold."""
    action: Literal["alert", "pause", "rollback", "stop"] = "alert"
    skip: int = 0
    """Rollback: steps of data to pass over."""
    lr_scale: float = 1.0
    """Rollback: factor on the learning rate."""
    cooldown: int = 100
    """Steps after firing in which the rule is silent."""

    def problems(self) -> list[tuple[str, str]]:
        conditions = [self.above is not None, self.below is not None, self.sigma is not None, self.not_finite]
        found: list[tuple[str, str]] = []
        if sum(conditions) != 1:
            found.append(("name", f"watch rule {self.name!r} needs exactly one of above, below, sigma and not_finite"))
        found += [(key, "must be at least 1") for key in ("window", "steps") if getattr(self, key) < 1]
        if self.lr_scale <= 0:
            found.append(("lr_scale", "must be greater than 0"))
        if self.skip < 0:
            found.append(("skip", "must not be negative"))
        return found
