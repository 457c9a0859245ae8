"""Numbers as people write and read them: `7B` parameters, 280 GB, 3.2e21 FLOPs, 14 d 6 h."""

from __future__ import annotations

import math
import re

_FACTORS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_SIZES = ("", "k", "M", "B", "T")
_BYTES = ("B", "kB", "MB", "GB", "TB", "PB")


class PlanError(Exception):
    """What is asked cannot be planned; the message says the way out."""


def parse_count(text: str) -> float:
    """A number with a suffix: `350M`, `7B`, `1.5T`, `7e9`. Raises ValueError with what would do."""
    found = re.fullmatch(r"(\d[\d_]*(?:\.\d+)?(?:e\+?\d{1,3})?)\s*([kmbgt]?)", text.strip().lower())
    value = float(found.group(1)) * _FACTORS[found.group(2)] if found else 0.0
    if not 1 <= value <= 1e30:
        raise ValueError(f"{text!r} is no size (write it as 350M, 7B or 1.5T)")
    return value


def count(value: float) -> str:
    """`934k`, `7.0B`, `1.5T`: two or three digits."""
    return _scaled(value, _SIZES, "")


def size(value: float) -> str:
    """Bytes, in powers of ten as memory is sold: `512 B`, `1.3 MB`, `280 GB`."""
    return _scaled(value, _BYTES, " ")


def flops(value: float) -> str:
    """Floating-point operations: `3.2e21`; below a million in full."""
    if value < 1e6:
        return f"{value:,.0f}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def factor(value: float) -> str:
    """A ratio in three digits: `16`, `1.25`, `0.0031`."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}".rstrip("0").rstrip(".") if value < 100 else f"{value:.0f}"


def span(seconds: float) -> str:
    """A time: `12 ms`, `8.5 s`, `4 min 10 s`, `3 h 05 min`, `14 d 6 h`, `2.3 years`."""
    if seconds < 60:
        return _short(seconds)
    minutes, whole = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {whole:02} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    if hours < 48:
        return f"{hours} h {minutes:02} min"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days} d {hours} h" if days < 365 else f"{seconds / 86400 / 365.25:,.1f} years"


def money(usd: float) -> str:
    """`< $0.01`, `$12.30`, `$1,250`, `$1.20M`."""
    if usd >= 1e6:
        return f"${count(usd)}"
    return f"${usd:,.0f}" if usd >= 100 else f"${usd:.2f}" if usd >= 0.01 or usd == 0 else "< $0.01"


def _short(seconds: float) -> str:
    if seconds >= 10:
        return f"{seconds:.0f} s"
    if seconds >= 1:
        return f"{seconds:.1f} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} µs"


def _scaled(value: float, units: tuple[str, ...], gap: str) -> str:
    for unit in units:
        if value < 999.5 or unit == units[-1]:
            digits = 0 if value >= 99.5 or unit == units[0] else 1 if value >= 9.95 else 2
            return f"{value:,.{digits}f}{gap}{unit}"
        value /= 1000
    raise AssertionError
