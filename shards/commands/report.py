"""`report`: what became of a build's text on its way into the shards, as one page."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from shards.common.errors import SpecError
from shards.common.terminal import make_console, write_json


def main(args: argparse.Namespace) -> int:
    """The page on the terminal, as JSON, or as a file for a browser."""
    from shards.build.report import load
    from shards.commands.page import page, write_html

    if args.samples < 0:
        raise SpecError(f"--samples is {args.samples} (use 0 or more)")
    report = load(Path(args.path))
    if args.json:
        write_json(report)
    elif args.html is not None:
        try:
            write_html(report, Path(args.html), args.samples)
        except OSError as error:
            raise SpecError(f"--html {args.html}: {error.strerror} (name a file that can be written)") from None
    else:
        make_console(width=None if sys.stdout.isatty() else 120).print(page(report, args.samples))
    return 0
