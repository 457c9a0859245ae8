"""`python -P -m trainer.probe RUN`: asks on standard input, answers on standard output, framed msgpack; its log is standard error.

It gives way to everything else on the machine, and ends when standard input does: with whoever started it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import sys
import threading
from functools import partial
from pathlib import Path

from shards.common.terminal import log_to_stderr

NICE = 10


def main(arguments: list[str]) -> int:
    answers = os.dup(1)
    os.dup2(2, 1)  # what anything prints goes to the log, not between the answers
    os.nice(NICE)
    with contextlib.suppress(OSError):  # should memory run out, the ranks are not who pays
        Path("/proc/self/oom_score_adj").write_text("1000")
    log_to_stderr("%(asctime)s %(levelname)-7s %(message)s")
    asks = _listen()

    import torch

    from midwatch.protocol import Message, decode, framed
    from midwatch.recipe import RecipeError, load_recipe
    from trainer.probe.judging import RewardScorer
    from trainer.probe.loading import find, load
    from trainer.probe.service import Service

    root = Path(arguments[0])
    try:
        recipe = load_recipe(root / "recipe.toml")
    except RecipeError as error:
        logging.getLogger("trainer.probe").error("%s", error)
        return 2
    torch.set_num_threads(recipe.probe.threads)
    device = torch.device(recipe.probe.device)

    def send(message: Message) -> None:
        data = memoryview(framed(message))
        while data:
            data = data[os.write(answers, data) :]

    judges = RewardScorer(recipe, root, device)
    service = Service(partial(find, root), lambda id: load(recipe, root, id, device), recipe.probe.checkpoints, send, judges)
    with contextlib.suppress(BrokenPipeError):
        while True:
            with contextlib.suppress(queue.Empty):
                while True:
                    service.take(decode(asks.get(block=not service.busy)))
            service.work()
    return 0


def _listen() -> queue.SimpleQueue[bytes]:
    """Frames of standard input, from a thread that ends the process when there are no more."""
    frames: queue.SimpleQueue[bytes] = queue.SimpleQueue()

    def listen() -> None:
        from midwatch.protocol import LENGTH_BYTES, frame_length

        with contextlib.suppress(Exception):
            source = sys.stdin.buffer
            while len(head := source.read(LENGTH_BYTES)) == LENGTH_BYTES:
                frames.put(source.read(frame_length(head)))
        os._exit(0)  # wherever the work is: nobody waits for it

    threading.Thread(target=listen, name="probe-asks", daemon=True).start()
    return frames


if __name__ == "__main__":
    os._exit(main(sys.argv[1:]))
