"""Ranks that hang: noticed by what they have taken before, their stacks kept, and gathered anew."""

from __future__ import annotations

import signal
import time
from pathlib import Path

from midwatch.journal import entries as j
from tests.system.harness import Run, recipe_text


def test_ranks_that_hang_leave_their_stacks_and_are_restarted(run: Run, data: Path) -> None:
    text = recipe_text(data, steps=20_000, every=20).replace("ranks_per_node = 2", "ranks_per_node = 2\nhang_seconds = 4.0")
    run.start(text)
    run.wait_step(40)
    time.sleep(3)  # for the agent, which looks once a second, to have seen what a step takes
    before = run.snapshot()
    run.ranks()[1].send_signal(signal.SIGSTOP)
    run.wait(lambda s: s.generation == 2 and s.state == "training" and s.step > before.step, 60)
    notes = [e.text for _, e in run.entries() if isinstance(e, j.Noted)]
    assert any("hang: no progress in training" in text for text in notes), run.story()
    ended = next(e for _, e in run.entries() if isinstance(e, j.GenerationEnded))
    assert "rank 1 does not answer" in ended.cause
    (file,) = run.root.glob("logs/*/hang-*.txt")
    stacks = file.read_text()
    waiting, stopped = stacks.split("=== rank 1")
    assert "most recent call first" in waiting and "distributed" in waiting, "rank 0 waits in a collective"
    assert "state T (stopped)" in stopped and "does not answer" in stopped
    assert any(file.name in text for text in notes), "the event says where to look"
