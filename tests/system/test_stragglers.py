"""A rank that is slowed holds up the others, and is the one that is named."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from midwatch import protocol as p
from midwatch.journal import entries as j
from tests.system.harness import Run, recipe_text


@contextmanager
def _slowed(pid: int, awake: float = 0.02, asleep: float = 0.06) -> Iterator[None]:
    """The process runs a quarter of the time, whatever it does."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(asleep)
            os.kill(pid, signal.SIGCONT)
            time.sleep(awake)

    thread = threading.Thread(target=work, name="slows a rank")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _even(snapshot: p.Snapshot) -> bool:
    """Whether both ranks are known, and neither is much slower than the other."""
    own = [beat.own for node in snapshot.nodes if node.stats is not None for beat in node.stats.ranks]
    return len(own) == 2 and min(own) > 0 and max(own) < 1.4 * min(own)


def test_a_real_rank_that_is_slowed_is_named_and_no_other(run: Run, data: Path) -> None:
    text = recipe_text(data, steps=100_000, every=100_000).replace(
        "ranks_per_node = 2", "ranks_per_node = 2\nstraggler_ratio = 1.6\nstraggler_seconds = 2"
    )
    run.start(text)
    run.wait_step(20)
    even = run.wait(lambda s: not s.stragglers and _even(s), 40)
    beats = even.nodes[0].stats.ranks  # type: ignore[union-attr]
    before = len(list(run.entries()))  # where other work takes the machine, a rank may have been slow by itself
    with _slowed(next(beat.pid for beat in beats if beat.rank == 1)):
        found = run.wait(lambda s: s.stragglers, 40)
        assert [straggler.rank for straggler in found.stragglers] == [1]
        assert found.stragglers[0].own > 1.6 * found.stragglers[0].median
    run.wait(lambda s: not s.stragglers, 40)
    notes = [e.text for _, e in list(run.entries())[before:] if isinstance(e, j.Noted) and "rank" in e.text]
    assert len(notes) >= 2 and all(note.startswith("rank 1 on ") for note in notes)
    assert " is slow: " in notes[0] and notes[-1].endswith("keeps up again")
