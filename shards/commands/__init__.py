"""The commands over shards, for `python -m shards` and for `midwatch shards`: what they are called and what they take."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

from shards.common.errors import BusyError, ShardError, SpecError
from shards.common.terminal import write_error

__all__ = ["BUSY", "add_commands", "run"]

BUSY = 75  # exit status: another build holds the directory; try again later
SPLITS = ("train", "held_out")


def add_commands(subparsers: Any) -> None:
    """Add the commands to `parser.add_subparsers()`; each sets `shards_command` to its module's `main`."""

    def add(name: str, module: str, about: str, *paths: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = subparsers.add_parser(name, help=about, description=about)
        parser.set_defaults(shards_command=_late(module))
        parser.add_argument("--json", action="store_true", help="JSON, for scripts")
        for path in paths:
            parser.add_argument(path, help="a directory of shards")
        return parser

    build = add("build", "build", "build the shards of a recipe or of a spec, or go on building them")
    build.add_argument("recipe", nargs="?", metavar="RECIPE", help="a recipe, whose [data] and [tokenizer] count")
    build.add_argument("--spec", metavar="FILE", help="instead, a spec as JSON; - reads it from stdin")
    build.add_argument("--workers", type=int, metavar="N", help="processes that encode (default: one a core, at most 8)")
    add("inspect", "inspect", "show what shards hold", "path")
    verify = add("verify", "verify", "check every byte of shards", "path")
    verify.add_argument("--quick", action="store_true", help="look only at sizes and seek tables")
    cat = add("cat", "cat", "print a document, a range of tokens, or a sample as it is learned", "path")
    cat.add_argument("--source", help="the source (default: the only or first one)")
    cat.add_argument("--split", choices=SPLITS, default="train")
    what = cat.add_mutually_exclusive_group(required=True)
    what.add_argument("--document", type=int, metavar="N", help="document N, from 0")
    what.add_argument("--tokens", metavar="A:B", help="tokens A to B, B not included")
    what.add_argument("--sample", type=int, metavar="N", help="sample N, from 0, of a context, with what is learned of it")
    cat.add_argument("--context", type=int, metavar="TOKENS", help="the context that --sample is cut for")
    cat.add_argument("--ids", action="store_true", help="token ids instead of text")
    stats = add("stats", "stats", "count tokens, documents, lengths, sizes and the vocabulary's use", "path")
    stats.add_argument("--context", type=int, default=4096, metavar="TOKENS", help="count documents in windows of so many")
    stats.add_argument("--quick", action="store_true", help="read no tokens: nothing on the vocabulary")
    add("diff", "diff", "what differs between two builds; exit status 1 if anything does", "a", "b")
    report = add("report", "report", "what each step of cleaning took away, with samples of it", "path")
    report.add_argument("--samples", type=int, default=2, metavar="N", help="samples shown for each reason (default 2; 5 are kept)")
    report.add_argument("--html", metavar="FILE", help="write the page to a file for a browser")
    merge = add("merge", "merge", "make one directory of several builds with the same tokenizer")
    merge.add_argument("out", metavar="OUT", help="the directory to make; there must be nothing in it")
    merge.add_argument("builds", metavar="BUILD", nargs="+", help="directories of shards")
    merge.add_argument("--copy", action="store_true", help="copy the files; else they are hard links where that is possible")


def _late(module: str) -> Callable[[argparse.Namespace], int]:
    """Its `main`, imported when it is called: each command brings in what it needs alone."""

    def call(args: argparse.Namespace) -> int:
        status: int = importlib.import_module(f"shards.commands.{module}").main(args)
        return status

    return call


def run(args: argparse.Namespace) -> int:
    """Run a parsed command. Exit status: 0 well, 1 failed, damaged, different or stopped, 2 asked wrongly, 75 busy."""
    try:
        command: Callable[[argparse.Namespace], int] = args.shards_command
        return command(args)
    except SpecError as error:
        write_error(f"error: {error}")
        return 2
    except BusyError as error:
        write_error(f"error: {error}")
        return BUSY
    except ShardError as error:
        write_error(f"error: {error}")
        return 1
