"""`python -m shards build|inspect|verify|cat|stats`."""

from __future__ import annotations

import sys

from shards.commands import add_commands, run
from shards.common.terminal import Parser, run_command


def main() -> int:
    parser = Parser(prog="python -m shards", description="Text to tokens to shards.")
    add_commands(parser.add_subparsers(required=True, metavar="COMMAND"))
    return run_command(lambda: run(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
