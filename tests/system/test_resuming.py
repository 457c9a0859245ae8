"""A command is done when its effect is: whatever follows a stop at once meets a run that has stopped."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psutil
import pytest

from midwatch.journal import entries as j
from tests.system.harness import MIDWATCH, Run, gone, recipe_text

LONG = {"steps": 100_000, "every": 20}


def alarms(run: Run) -> list[str]:
    return [e.text for _, e in run.entries() if isinstance(e, j.Noted) and e.level != "info"]


def processes(run: Run) -> list[psutil.Process]:
    return [*run.agents(), *run.ranks(), *run.forks()]


def test_stop_and_resume_at_once_goes_on(run: Run, data: Path) -> None:
    run.start(recipe_text(data, **LONG))
    run.wait_step(5)
    for words in (("stop",), ("stop", "--now"), ("pause", "--release"), ("stop",)):
        before = processes(run)
        done = run.midwatch(words[0], str(run.root), *words[1:])
        assert done.returncode == 0, done.stdout + done.stderr
        if words[0] == "stop":
            assert gone(before, 0.2), "stop was done before its agent and ranks had ended"
        done = run.midwatch("resume", str(run.root))
        assert done.returncode == 0, done.stdout + done.stderr
        assert run.ranks(), "resume was done before there were ranks"
        seen = run.wait_state("training", "failed")
        run.wait_step(seen.step + 3)
    assert run.snapshot().state == "training"
    assert not [text for text in alarms(run) if "ended at once" in text or "failed" in text]


@pytest.mark.parametrize("how", ["stopped", "controller killed"])
def test_two_resumes_at_once_start_one_generation(run: Run, data: Path, how: str) -> None:
    run.start(recipe_text(data, **LONG))
    run.wait_step(5)
    run.done("stop")
    if how == "controller killed":
        run.kill(run.controller())
    both = [subprocess.Popen([MIDWATCH, "resume", str(run.root)], env=run.environment) for _ in range(2)]
    statuses = sorted(process.wait(60) for process in both)
    assert statuses[0] == 0
    seen = run.wait_state("training", "failed")
    assert (seen.state, seen.generation) == ("training", 2)
    run.wait_step(seen.step + 3)
