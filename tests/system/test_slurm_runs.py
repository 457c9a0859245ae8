"""Runs under Slurm: in an allocation and as a batch job, which loses nodes, meets its time limit, is cancelled and goes on."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from midwatch import protocol as p
from midwatch.transport.client import Client, ClientError
from tests.system.harness import MIDWATCH, Run, recipe_text
from tests.system.slurm import HEAD, Slurm, require_slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    require_slurm()
    with Slurm(("n1", "n2"), tmp_path_factory.mktemp("slurm")) as made:
        yield made


@pytest.fixture
def quiet(slurm: Slurm) -> Iterator[Slurm]:
    """Without a job, before and after."""
    yield slurm
    for job in slurm.run("squeue", "-h", "-o", "%i").stdout.split():
        slurm.run("scancel", "--signal=KILL", "--full", job)
        slurm.run("scancel", job)
    slurm.wait_for("squeue -h", "", 60)


def recipe(data: Path, slurm: Slurm, nodes: str, *, steps: int = 20_000, sbatch: str = "", every: int = 25) -> str:
    """Nodes have a runtime directory each, as machines of their own would."""
    setup = f'setup = ["export XDG_RUNTIME_DIR={slurm.hosts.home(HEAD).parents[1]}/$(hostname)/run"]'
    cluster = f'backend = "slurm"\nnodes = "{nodes}"\nranks_per_node = 1\n{setup}\n[cluster.sbatch]\n{sbatch}'
    text = recipe_text(data, steps=steps, every=every).replace("ranks_per_node = 2\n", "")
    return text.replace('device = "cpu"\n', f'device = "cpu"\n{cluster}\n', 1)


class Login:
    """Commands on the head, as an operator there gives them."""

    def __init__(self, slurm: Slurm, run: Run) -> None:
        self.slurm, self._run = slurm, run
        places = {"HOME": str(slurm.hosts.home(HEAD)), "XDG_RUNTIME_DIR": str(slurm.hosts.home(HEAD).parent / "run")}
        self._environment = {**run.environment, **slurm.environment, **places, "XDG_CACHE_HOME": places["HOME"] + "/cache"}

    def start(self, *words: str) -> subprocess.Popen[str]:
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        inside = self.slurm.hosts.inside(HEAD, *words)
        return subprocess.Popen(
            inside, env=self._environment, cwd=self._run.root.parent, text=True, stdin=null, stdout=pipe, stderr=pipe
        )

    def midwatch(self, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        process = self.start(MIDWATCH, *words)
        out, err = process.communicate(timeout=timeout)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def job(self) -> str:
        return self.slurm.run("squeue", "-h", "-o", "%i").stdout.split()[0]


@pytest.fixture
def login(quiet: Slurm, run: Run) -> Login:
    return Login(quiet, run)


def write(run: Run, text: str) -> str:
    file = run.root.parent / "recipe.toml"
    file.write_text(text)
    return str(file)


def watch(run: Run, wanted: Callable[[p.Snapshot], bool], timeout: float) -> p.Snapshot:
    """Waits, through times without a controller, and starts none."""

    async def look() -> p.Snapshot:
        deadline = time.monotonic() + timeout
        seen: p.Snapshot | None = None
        while time.monotonic() < deadline:
            with contextlib.suppress(ClientError):
                async with Client(run.root, subscribe=True) as client:
                    while time.monotonic() < deadline:
                        seen = client.snapshot
                        if seen is not None and wanted(seen):
                            return seen
                        await asyncio.sleep(0.1)
            await asyncio.sleep(0.2)
        what = (
            f"{seen.state} {seen.reason} step {seen.step} {[(n.name, n.state, n.note) for n in seen.nodes]}" if seen else "nothing"
        )
        logs = "\n".join(f"--- {f}\n{f.read_text(errors='replace')[-3000:]}" for f in sorted((run.root / "logs").rglob("*.log")))
        raise AssertionError(f"waited {timeout} s in vain; last seen: {what}\n{logs}")

    return asyncio.run(look())


def used(s: p.Snapshot) -> set[str]:
    names = {n.name for n in s.nodes if n.state == "up" and n.ranks}
    return names if s.state == "training" and s.step > 0 and s.world == len(names) else set()


def contiguous(run: Run) -> bool:
    steps = [row.step for row in run.rows("train/loss")]
    return steps == list(range(1, len(steps) + 1))


def test_a_batch_job_trains_on_all_its_nodes_and_stops_with_a_checkpoint_when_cancelled(login: Login, run: Run, data: Path) -> None:
    # Without an environment, as some sites submit every job: steps get what the controller has.
    file = write(run, recipe(data, login.slurm, "1:2", sbatch='lines = ["--export=NONE"]', every=1000))
    watcher = login.start(MIDWATCH, "run", file, "--dir", str(run.root), "--headless", "--detach")
    try:
        first = watch(run, lambda s: used(s) == {"n1", "n2"} and s.step > 5, 90)
        for number in ("USR1", "USR2", "HUP"):  # to every process of every step, and none of them is meant
            login.slurm.run("scancel", f"--signal={number}", login.job())
        alive = watch(run, lambda s: used(s) == {"n1", "n2"} and s.step > first.step + 30, 60)
        assert (alive.generation, [n.failures for n in alive.nodes]) == (first.generation, [0, 0])
        status = login.midwatch("status", str(run.root))  # by a step of the job: the head cannot reach the controller's socket
        assert status.returncode == 0 and "training" in status.stdout, status.stderr
        assert status.stderr == ""
        login.slurm.run("scancel", login.job())
        assert watcher.wait(30) == 4
    finally:
        watcher.kill()
        out, errors = watcher.communicate()
    assert "submitted as job" in errors and "training" in out, out + errors
    ledger = run.ledger()
    stop = ledger.commands[ledger.newest_command]
    assert (ledger.state, stop.verb, stop.author, stop.state) == ("released", "stop", "slurm", "done")
    assert [c.step for c in ledger.checkpoints.values()] == [stop.step], "nothing was lost"
    slurm_log = (run.root / "logs" / "slurm.log").read_text()
    assert "the controller has ended with status 0" in slurm_log, slurm_log


@pytest.mark.soak
def test_a_batch_job_goes_on_after_its_time_limit_and_after_it_was_cancelled(login: Login, run: Run, data: Path) -> None:
    slurm = login.slurm
    sbatch = 'partition = "all"\ntime = "10"\nsignal_seconds = 40\nlines = ["--comment=midwatch"]'
    file = write(run, recipe(data, slurm, "2", sbatch=sbatch))
    submitted = login.midwatch("run", file, "--dir", str(run.root), "--detach")
    assert submitted.returncode == 0 and "submitted as job" in submitted.stderr, submitted
    began = time.monotonic()
    first = watch(run, lambda s: used(s) == {"n1", "n2"}, 90)

    job = login.job()
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={int(time.monotonic() - began) // 60 + 1}")
    released = watch(run, lambda s: s.state == "released", 60)
    assert [(c.author, c.state) for c in released.commands if c.verb == "release"] == [("slurm", "done")]
    slurm.wait_for("squeue -h -o %T", "PENDING", 30)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    waiting = login.midwatch("status", str(run.root))
    assert "is pending" in waiting.stdout, waiting
    refused = login.midwatch("checkpoint", str(run.root))
    assert refused.returncode == 1 and "is pending" in refused.stderr, refused

    again = watch(run, lambda s: s.term > first.term and used(s) == {"n1", "n2"}, 90)
    assert again.step >= released.step and again.lineage == first.lineage, "no step was taken twice"
    assert [(c.author, c.state) for c in again.commands if c.verb == "resume"] == [("slurm", "done")]
    watch(run, lambda s: s.step >= again.step + 5, 60)
    assert contiguous(run)

    run.kill(run.controller())
    followed = watch(run, lambda s: s.term > again.term and s.step > again.step + 5, 60)
    assert followed.generation == again.generation, "the job's keeper has started another, and the ranks trained on"

    slurm.run("scancel", job)
    slurm.wait_for("squeue -h", "", 30)
    ledger = run.ledger()
    assert ledger.state == "released" and ledger.commands[ledger.newest_command].verb == "stop"
    by_hand = login.midwatch("resume", str(run.root))
    assert "submitted as job" in by_hand.stdout, by_hand
    on = watch(run, lambda s: s.term > followed.term and used(s) == {"n1", "n2"}, 90)
    assert on.step >= ledger.commands[ledger.newest_command].step
    stopped = login.midwatch("stop", str(run.root))
    assert stopped.returncode == 0 and "stop: done" in stopped.stdout, stopped


def test_a_job_that_waits_is_shown_and_can_be_taken_back(login: Login, run: Run, data: Path) -> None:
    file = write(run, recipe(data, login.slurm, "1", sbatch='lines = ["--hold"]'))
    watcher = login.start(MIDWATCH, "run", file, "--dir", str(run.root), "--headless", "--detach")
    try:
        login.slurm.wait_for("squeue -h -o %T", "PENDING")
        held = login.midwatch("status", str(run.root)).stdout
        assert "is pending (JobHeldUser), and does not start by itself: it is held" in held and "expected to start" not in held
        stopped = login.midwatch("stop", str(run.root))
        assert stopped.returncode == 0 and "is taken back" in stopped.stderr
        assert watcher.wait(20) == 1
    finally:
        watcher.kill()
        out, errors = watcher.communicate()
    assert "is pending (JobHeldUser)" in out and "has ended (cancelled)" in errors, out + errors
    submitted = login.midwatch("resume", str(run.root))
    assert "submitted as job" in submitted.stdout, submitted


def test_what_slurm_refuses_leaves_no_run_behind(login: Login, run: Run, data: Path) -> None:
    file = write(run, recipe(data, login.slurm, "1", sbatch='partition = "nosuch"'))
    done = login.midwatch("run", file, "--dir", str(run.root), "--headless")
    assert done.returncode == 2 and "Invalid partition" in done.stderr and "Traceback" not in done.stderr, done
    assert not run.root.exists()


@pytest.mark.soak
def test_in_an_allocation_the_others_go_on_when_a_node_is_lost(login: Login, run: Run, data: Path) -> None:
    slurm = login.slurm
    file = write(run, recipe(data, slurm, "1:2"))
    start = f"{MIDWATCH} run {file} --dir {run.root} --detach && sleep 300"
    salloc = login.start("salloc", "-N2", "--no-kill", "sh", "-c", start)
    first = watch(run, lambda s: used(s) == {"n1", "n2"}, 90)
    watch(run, lambda s: s.step >= first.step + 30, 60)
    slurm.hosts.kill("n2")
    after = watch(run, lambda s: used(s) == {"n1"}, 60)
    watch(run, lambda s: s.step >= after.step + 5, 60)
    assert contiguous(run)
    run.done("stop")
    salloc.kill()
    salloc.wait()
    slurm.hosts.restart("n2")
    slurm.start_node("n2")
