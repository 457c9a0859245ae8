"""`report`: what became of a build's text on its way into the shards, as one page."""

from __future__ import annotations

import argparse
from pathlib import Path

from shards.commands.output import print_json
from shards.errors import SpecError


def main(args: argparse.Namespace) -> int:
    """The page on the terminal, as JSON, or as a file for a browser."""
    from rich.console import Console

    from shards.commands.page import page, write_html
    from shards.pipeline.reporting import load

    if args.samples < 0:
        raise SpecError(f"--samples is {args.samples} (use 0 or more)")
    report = load(Path(args.path))
    if args.json:
        print_json(report)
    elif args.html is not None:
        try:
            write_html(report, Path(args.html), args.samples)
        except OSError as error:
            raise SpecError(f"--html {args.html}: {error.strerror} (name a file that can be written)") from None
    else:
        console = Console()
        Console(width=None if console.is_terminal else 120).print(page(report, args.samples))
    return 0
