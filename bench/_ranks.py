"""How a bench's own rank ends: as the trainer's does, at once; threads of gloo that still run could abort an orderly end."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


def leave_after(action: Callable[[], None]) -> NoReturn:
    """Does it and ends the process: with status 0, or with what it raised told on stderr, as Python would."""
    status = 0
    try:
        action()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
