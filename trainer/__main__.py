"""`python -m trainer RUN`: one rank, as torchrun or the agent starts it."""

from __future__ import annotations

import logging
import os
import sys

from trainer.early import guard, redirect

if __name__ == "__main__":
    redirect()
    guard()
    from trainer.start import main

    status = main(sys.argv[1:])
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # the threads of gloo that still run could abort an orderly end of the interpreter
