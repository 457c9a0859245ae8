"""`midwatch logs`: a run's logs, read from its directory, with or without a controller."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from launcher.controller.queries import read_log


def show(root: Path, file: str | None, only_list: bool, lines: int, follow: bool, pattern: str) -> int:
    """Prints the newest lines of one log or of all, and what is added to them."""
    names = sorted(str(f.relative_to(root)) for f in root.rglob("*.log"))
    if only_list:
        print("\n".join(names))
        return 0
    if file is not None and file not in names:
        print(f"midwatch: there is no log {file!r} (there are: {', '.join(names) or 'none'})", file=sys.stderr)
        return 2
    try:
        re.compile(pattern)
    except re.error as error:
        print(f"midwatch: --grep {pattern!r}: {error}", file=sys.stderr)
        return 2
    chosen = [file] if file is not None else names
    offsets = dict.fromkeys(chosen, -1)
    try:
        while True:
            for name in chosen:
                found, offsets[name] = read_log(root / name, offsets[name], max(lines, 1) if offsets[name] < 0 else 10_000, pattern)
                for line in found:
                    print(f"{name}: {line}" if len(chosen) > 1 else line, flush=follow)
            if not follow:
                return 0
            time.sleep(0.3)
    except (KeyboardInterrupt, BrokenPipeError):
        return 0
