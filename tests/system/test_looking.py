"""Looking at a run changes nothing, with a controller or without; and what must change something wakes a controller."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.system.harness import MIDWATCH, Run, recipe_text

LOOKS: tuple[tuple[str, ...], ...] = (
    ("journal",),
    ("metrics", "train/loss"),
    ("samples",),
    ("node", "list"),
    ("logs",),
    ("attach", "--headless"),
)


def files(root: Path) -> dict[str, tuple[int, int]]:
    """Length and time of everything below a directory."""
    found = {str(file): file.stat() for file in (root, *root.rglob("*"))}
    return {name: (status.st_size, status.st_mtime_ns) for name, status in found.items()}


def look(run: Run, words: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    first = 2 if words[0] == "node" else 1
    return run.midwatch(*words[:first], str(run.root), *words[first:])


def test_a_finished_run_is_looked_at_from_its_files_alone(undisturbed: Run) -> None:
    with_controller = undisturbed.midwatch("journal", str(undisturbed.root)).stdout
    address = undisturbed.root / "control" / "address"
    deadline = time.monotonic() + 20
    while address.stat().st_mtime and time.monotonic() < deadline:  # the last controller leaves when its last client has
        time.sleep(0.1)
    before = files(undisturbed.root)
    for words in LOOKS:
        done = look(undisturbed, words)
        assert done.returncode == 0, (words, done.stderr)
        assert done.stdout or words in (("samples",), ("node", "list")), words
    assert look(undisturbed, ("journal",)).stdout == with_controller
    seen = json.loads(look(undisturbed, ("status", "--json")).stdout)
    assert (seen["state"], seen["step"], seen["total_steps"], seen["archived"]) == ("finished", 320, 320, True)
    assert [stage["state"] for stage in seen["stages"]] == ["done", "done", "done"]
    assert "no controller is running" in look(undisturbed, ("status",)).stdout
    last = look(undisturbed, ("metrics", "train/loss", "--last", "1")).stdout
    assert "step 320" in last
    assert files(undisturbed.root) == before, "a look has written something"
    assert address.stat().st_mtime == 0, "the last controller has left, and none has come"


def test_a_run_on_read_only_storage_is_looked_at(undisturbed: Run, make_run: Callable[[str], Run]) -> None:
    copy = make_run("copy")
    shutil.copytree(undisturbed.root, copy.root)
    (copy.root / "control" / "address").unlink()  # it is the original's
    words = " && ".join(
        f"{MIDWATCH} {what} {copy.root} >/dev/null" for what in ("journal", "status", "metrics", "attach --headless")
    )
    inside = f"mount --bind {copy.root} {copy.root} && mount -o remount,bind,ro {copy.root} && ! touch {copy.root}/x && {words}"
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", inside], env=copy.environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_what_asks_for_something_wakes_a_controller_and_a_suspended_one_is_named(run: Run, data: Path) -> None:
    run.start(recipe_text(data, steps=20_000, every=50))
    run.wait_step(5)
    controller = run.controller()
    controller.send_signal(signal.SIGSTOP)
    silent = run.midwatch("status", str(run.root))
    controller.send_signal(signal.SIGCONT)
    assert silent.returncode == 1 and f"kill -CONT {controller.pid}" in silent.stdout.replace("\n", " "), silent
    assert "no controller is running" not in silent.stdout

    run.kill(run.controller())
    controller.wait(10)
    alone = run.midwatch("status", str(run.root))
    assert alone.returncode == 0 and "training (when its controller ended" in alone.stdout.replace("\n", " "), alone
    assert "generation 1" in run.midwatch("journal", str(run.root)).stdout
    assert run.ledger().term == 1, "a look has begun a term"
    saved = run.midwatch("checkpoint", str(run.root))
    assert saved.returncode == 0 and "checkpoint: done" in saved.stdout, saved
    assert run.ledger().term == 2
    run.done("stop")
