"""Words and numbers as the screen says them: short, aligned, the same everywhere. No numpy, so that the first paint is early."""

import math
import os
import time
from collections.abc import Mapping

from midwatch.words import plural as plural

_UNITS = ((9_999.5, 1.0, ""), (9.995e5, 1e3, "k"), (9.995e8, 1e6, "M"), (9.995e11, 1e9, "B"), (9.995e14, 1e12, "T"))


def compact(value: float, step: float = 0.0) -> str:
    """A number in a few characters: four digits, or with a `step` as many as tell ticks apart in a margin of 7 cells."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    size = abs(value)
    if size < max(1e-12 * step, 1e-300):
        return "0"
    if size < 1e-3 or size >= 9.995e14:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    unit, suffix = next((unit, suffix) for limit, unit, suffix in _UNITS if size < limit)
    scaled = value / unit
    digits = max(0, min(5, (2 if suffix else 3) - math.floor(math.log10(abs(scaled)))))
    if step:
        digits = min(digits if suffix else 5, max(0, -math.floor(math.log10(step / unit) + 1e-9)))
    text = f"{scaled:.{digits}f}"
    text = text.rstrip("0").rstrip(".") if "." in text and not step else text
    return (text if len(text) < 8 else text.replace("0.", ".", 1)) + suffix


def duration(seconds: float) -> str:
    """A span of time in its two largest units: `3d 4h`, `2h 05m`, `1m 30s`, `12s`."""
    whole = int(seconds)
    days, hours, minutes = whole // 86_400, whole // 3_600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {whole % 60:02}s" if minutes else f"{whole}s"


def size(count: float) -> str:
    """Bytes: `512 B`, `1.3 GB`."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" or count >= 99.5 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def clock(moment: float) -> str:
    """The time of day, `14:03:22`."""
    return time.strftime("%H:%M:%S", time.localtime(moment))


def when(moment: float, now: float) -> str:
    """The time of day, with the date where it is another day's."""
    there, here = time.localtime(moment), time.localtime(now)
    return clock(moment) if there[:3] == here[:3] else time.strftime("%b %d %H:%M", there)


def age(seconds: float) -> str:
    """How long ago: `now`, `40s`, `3m 10s`."""
    return "now" if seconds < 1 else duration(seconds)


def percent(part: float, whole: float) -> str:
    """Rounded down, so that 100 % is said of what is complete alone."""
    return f"{int(100 * part / whole)}%" if whole > 0 else "-"


def setting(value: float) -> str:
    """A live setting: `0.0003`, `1e-05`, `100`."""
    return f"{value:g}"


def speaks_unicode(environment: Mapping[str, str]) -> bool:
    """Whether the terminal takes Unicode, by the locale: an explicit one of another encoding says no, and so does a Linux console.

    Python itself turns a C locale's LC_CTYPE into C.UTF-8 (PEP 538), which therefore says nothing beside LANG=C. MIDWATCH_ASCII=1
    and =0 decide it.
    """
    decided = environment.get("MIDWATCH_ASCII", "")
    if decided in ("0", "1"):
        return decided == "0"
    if environment.get("TERM", "") in ("linux", "dumb", "vt100", "vt220"):
        return False
    language = environment.get("LANG", "")
    character = environment.get("LC_CTYPE", "")
    if character in ("C.UTF-8", "C.utf8", "UTF-8") and language in ("C", "POSIX"):
        character = ""
    locale = environment.get("LC_ALL") or character or language
    return not locale or "utf-8" in locale.lower() or "utf8" in locale.lower()


UNICODE = speaks_unicode(os.environ)
"""Of this process's terminal."""
