"""`midwatch logs`: a run's logs, read from its directory, with or without a controller."""

from __future__ import annotations

import re
import time
from pathlib import Path

from launcher.controller.core.queries import read_log
from shards.common.terminal import safe, write_error, write_out

COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def show(root: Path, file: str | None, only_list: bool, lines: int, follow: bool, pattern: str) -> int:
    """Prints the newest lines of one log or of all, and what is added to them."""
    names = sorted(str(f.relative_to(root)) for f in root.rglob("*.log"))
    if only_list:
        write_out("\n".join(names))
        return 0
    if file is not None and file not in names:
        write_error(f"midwatch: there is no log {file!r} (there are: {', '.join(names) or 'none'})")
        return 2
    try:
        re.compile(pattern)
    except re.error as error:
        write_error(f"midwatch: --grep {pattern!r}: {error}")
        return 2
    chosen = [file] if file is not None else names
    offsets = dict.fromkeys(chosen, -1)
    try:
        while True:
            for name in chosen:
                found, offsets[name] = read_log(root / name, offsets[name], max(lines, 1) if offsets[name] < 0 else 10_000, pattern)
                for line in found:
                    shown = safe(COLOURS.sub("", line).expandtabs())
                    write_out(f"{name}: {shown}" if len(chosen) > 1 else shown, flush=follow)
            if not follow:
                return 0
            time.sleep(0.3)
    except KeyboardInterrupt:
        return 0
