"""The clock of a machine is set while a run trains: no process is taken for another, and no step is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from midwatch.journal import entries as j
from tests.system.harness import Run, gone, recipe_text

CREATED = "import psutil, sys; print(psutil.Process(int(sys.argv[1])).create_time())"


def created(run: Run, pid: int) -> float:
    """When a process was created, as psutil tells it under the run's clock."""
    return float(subprocess.check_output([sys.executable, "-c", CREATED, str(pid)], env=run.environment, text=True))


def test_a_clock_that_is_set_costs_no_rank_and_no_step(run: Run, data: Path, clock: Path) -> None:
    preload = {"LD_PRELOAD": str(clock.parent / "clock.so"), "CLOCK_FILE": str(clock)}
    run.environment = {**run.environment, **preload}
    run.start(recipe_text(data, steps=100_000, every=20))
    run.wait_step(5)
    agent, ranks = run.agents()[0], run.ranks()
    before = created(run, agent.pid)
    for offset in (3600, -3600):
        clock.write_text(f"{offset}\n")
        assert abs(created(run, agent.pid) - before - offset) < 2, "the kernel's time of creation has not moved"
        controller = run.controller()
        run.kill(controller)
        assert gone([controller], 5)
        done = run.midwatch("set", str(run.root), "max_grad_norm", f"{1 + abs(offset) / 1e4 + offset / 1e5}", timeout=90)
        assert done.returncode == 0, done.stdout + done.stderr
        seen = run.snapshot()
        assert seen.generation == 1, run.story()
        run.wait_step(seen.step + 5)
    assert [p.pid for p in run.ranks()] == [p.pid for p in ranks] and run.agents() == [agent]
    assert not [e for _, e in run.entries() if isinstance(e, j.GenerationEnded)]
    run.done("stop")
