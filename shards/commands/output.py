"""What the commands share: finding shards, tables, sizes, and a bar for long work."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.common.errors import SpecError
from shards.common.terminal import make_console, safe, write_error

if TYPE_CHECKING:
    from shards.common.progress import Phase, ProgressMeter

PIPE_WIDTH = 250  # in a pipe there is no width to fit: a row stays one line


def directories(path: Path) -> list[Path]:
    """The manifests' directories at or under `path`; SpecError if there are none."""
    from shards.format.manifest import FILE_NAME

    if (path / FILE_NAME).is_file():
        return [path]
    found = sorted(file.parent for pattern in ("*", "*/*") for file in path.glob(f"{pattern}/{FILE_NAME}"))
    if not found:
        raise SpecError(f"{path}: no shards here (give the directory that was built, or one of a source in it)")
    from shards.build.marker import read_marker

    marker = read_marker(path)
    if marker is not None and not marker.done:
        write_error(f"note: {path}: its build is not done: some sources are not here yet")
    return found


@contextmanager
def working(args: Any, phase: Phase, message: str, unit: str, total: int) -> Iterator[ProgressMeter]:
    """A bar on a terminal's stderr while something long goes on; nothing for scripts and in pipes."""
    from shards.common.progress import ProgressMeter, Screen

    with Screen(transient=True) as screen:
        meter = ProgressMeter((lambda progress: None) if args.json or not screen.is_terminal else screen)
        meter.begin(phase, message, unit, total)
        yield meter


def size(count: float) -> str:
    """Bytes, for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def short(count: float) -> str:
    """A number of at most four digits and a letter."""
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.3g}{unit}"
        count /= 1000
    return f"{count:,.3g}T"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None) -> None:
    """A table; a column whose name ends in > is aligned right."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for column in columns:
        right = column.endswith(">")
        table.add_column(column.rstrip(">"), justify="right" if right else "left", overflow="fold", no_wrap=right)
    for row in rows:
        table.add_row(*(Text(safe(cell)) for cell in row))
    make_console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)
