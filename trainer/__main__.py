"""`python -m trainer RUN`: one rank, as torchrun or the agent starts it, or the process that forks them for the agent."""

from __future__ import annotations

import logging
import os
import sys
import traceback

from shards.common.linux import name_process
from trainer.process.bootstrap import guard, redirect

CERTAIN_STATUS = 78
"""`midwatch.protocol`'s: the next start would end in the same way."""


def rank(arguments: list[str]) -> int:
    """One rank from its first line to its last; the exit status."""
    name_process(f"rank-{os.environ.get('RANK', '0')}")
    redirect()
    guard()
    try:
        from trainer.process.rank import main
    except ImportError:  # midwatch.protocol, which names this status, may be what is missing
        traceback.print_exc()
        return CERTAIN_STATUS

    status = main(arguments)
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


if __name__ == "__main__":
    handle = os.environ.pop("MIDWATCH_FORKSERVER", None)
    if handle is not None:
        from trainer.process.fork_server import serve

        os._exit(serve(int(handle), rank))
    os._exit(rank(sys.argv[1:]))  # the threads of gloo that still run could abort an orderly end of the interpreter
