"""Accelerators: memory and peak rates as their makers' data sheets have them, and a rough price.

Rates are dense (a data sheet's figure with sparsity is halved), with sums in float32. `float32` is the rate without tensor
cores, which is what torch computes float32 with unless told otherwise. Prices are what a GPU rented by the hour costs, to the
order of magnitude; they differ between providers by a factor of three, so give your own.
"""

from __future__ import annotations

import difflib
from typing import Literal

import msgspec

from launcher.plan.units import PlanError

Precision = Literal["float32", "bfloat16", "fp8"]


class Accelerator(msgspec.Struct, frozen=True):
    name: str
    memory_gb: float | None
    """In 10^9 bytes, as it is sold; None: the host's, which is not known here."""
    float32_tflops: float
    bfloat16_tflops: float
    fp8_tflops: float | None
    """None: it has no fp8."""
    usd_per_hour: float

    def flops_per_second(self, precision: Precision) -> float:
        """Peak operations a second. Raises PlanError where there is no such arithmetic."""
        rates = {"float32": self.float32_tflops, "bfloat16": self.bfloat16_tflops, "fp8": self.fp8_tflops}
        rate = rates[precision]
        if rate is None:
            raise PlanError(f"--precision fp8: {self.name} has none (use bfloat16, or one of: {', '.join(_WITH_FP8)})")
        return rate * 1e12


_TABLE = (
    Accelerator("b200", 180, 75, 2250, 4500, 5.0),
    Accelerator("h200", 141, 67, 989, 1979, 3.5),
    Accelerator("h100-sxm", 80, 67, 989, 1979, 2.5),
    Accelerator("h100-nvl", 94, 60, 835, 1671, 2.5),
    Accelerator("h100-pcie", 80, 51, 756, 1513, 2.0),
    Accelerator("h20", 96, 44, 148, 296, 1.5),
    Accelerator("a100-80gb", 80, 19.5, 312, None, 1.5),
    Accelerator("a100-40gb", 40, 19.5, 312, None, 1.2),
    Accelerator("mi300x", 192, 163.4, 1307, 2615, 2.5),
    Accelerator("l40s", 48, 91.6, 362, 733, 1.0),
    Accelerator("l4", 24, 30.3, 121, 242, 0.7),
    Accelerator("a10", 24, 31.2, 125, None, 0.8),
    Accelerator("rtx-5090", 32, 104.8, 209.5, 419, 0.7),
    Accelerator("rtx-4090", 24, 82.6, 165.2, 330, 0.4),
    # One core at 3 GHz with AVX2: two units, each eight multiply-adds a cycle.
    Accelerator("cpu", None, 0.096, 0.096, None, 0.04),
)
ACCELERATORS = {each.name: each for each in _TABLE}
_WITH_FP8 = [each.name for each in _TABLE if each.fp8_tflops]
DEFAULT = "h100-sxm"


def find_accelerator(name: str, usd_per_hour: float | None = None) -> Accelerator:
    """By its name, at a price of one's own where given. Raises PlanError with the list."""
    plain = name.strip().lower().replace("_", "-").replace(" ", "-").removeprefix("nvidia-")
    found = ACCELERATORS.get(plain)
    if found is None:
        like = [known for known in ACCELERATORS if known.startswith(plain)] if plain else []
        close = like or difflib.get_close_matches(plain, ACCELERATORS, 2)
        hint = f" (did you mean {' or '.join(close)}?)" if close else ""
        raise PlanError(f"--gpu: {name!r} is not known{hint}; known are: {', '.join(ACCELERATORS)}")
    return found if usd_per_hour is None else msgspec.structs.replace(found, usd_per_hour=usd_per_hour)
