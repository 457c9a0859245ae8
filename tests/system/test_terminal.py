"""A real run in a real terminal, by real keys; and the terminal killed under it."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import MIDWATCH, Run, recipe_text


class Terminal:
    """A tmux session of its own."""

    def __init__(self, socket: Path, environment: dict[str, str], command: str, width: int, height: int) -> None:
        self._socket = str(socket)
        clean = {k: v for k, v in environment.items() if k not in ("TMUX", "NO_COLOR")} | {
            "LANG": "C.UTF-8",
            "TERM": "xterm-256color",
        }
        self._tmux("new-session", "-d", "-x", str(width), "-y", str(height), command, env=clean)

    def _tmux(self, *words: str, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(["tmux", "-S", self._socket, *words], capture_output=True, text=True, env=env, timeout=20)
        return done.stdout

    def keys(self, *keys: str) -> None:
        for key in keys:
            self._tmux("send-keys", key)
            time.sleep(0.3)

    def at_once(self, *keys: str) -> None:
        """As fast as a terminal can send them."""
        self._tmux("send-keys", *keys)

    def text(self) -> str:
        return self._tmux("capture-pane", "-p")

    def wait(self, words: str, timeout: float = 40) -> str:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if words in (text := self.text()):
                return text
            time.sleep(0.2)
        raise AssertionError(f"{words!r} never came; the terminal shows:\n{self.text()}")

    def resize(self, width: int, height: int) -> None:
        self._tmux("resize-window", "-x", str(width), "-y", str(height))

    def kill(self) -> None:
        self._tmux("kill-server")


@pytest.fixture
def terminal_for(run: Run, environment: dict[str, str]) -> Iterator[object]:
    if shutil.which("tmux") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("tmux is missing (tests/apt.txt)")
        pytest.skip("tmux is missing")
    opened: list[Terminal] = []

    def open_terminal(command: str, width: int = 80, height: int = 24) -> Terminal:
        terminal = Terminal(Path(environment["XDG_RUNTIME_DIR"]) / f"tmux{len(opened)}", environment, command, width, height)
        opened.append(terminal)
        return terminal

    yield open_terminal
    for terminal in opened:
        terminal.kill()


def test_a_night_watch_by_keys(run: Run, data: Path, terminal_for) -> None:  # type: ignore[no-untyped-def]
    file = run.root.parent / "r.toml"
    file.write_text(recipe_text(data, steps=20_000, every=50))
    terminal = terminal_for(f"{MIDWATCH} run {file} --dir {run.root}")
    terminal.wait("TRAINING")
    run.wait_step(60)
    terminal.keys("c")
    run.wait(lambda s: any(c.verb == "checkpoint" and c.state == "done" for c in s.commands))
    terminal.keys("g")
    golden = run.wait(lambda s: any(c.golden for c in s.checkpoints))
    terminal.keys("p")
    terminal.wait("PAUSED")
    terminal.keys("p")
    run.wait_state("training")
    step = next(c.step for c in golden.checkpoints if c.golden)
    run.wait_step(step + 20)
    terminal.keys("R")
    terminal.wait("Undoes")
    terminal.keys("Escape")
    assert run.snapshot().lineage == 1, "escape sends nothing"
    terminal.keys("R")
    terminal.wait("Undoes")
    terminal.keys("Enter")
    time.sleep(1)
    assert run.snapshot().lineage == 1, "the focus is on Cancel"
    for character in ":rollback golden --skip 2 --lr-scale 0.5":
        terminal.keys("Space" if character == " " else character)
    terminal.keys("Enter")
    terminal.wait("Undoes")
    terminal.at_once("Tab", "Enter")
    rolled = run.wait(lambda s: s.lineage == 2 and s.state == "training")
    assert rolled.lineages[-1].skip == 2
    terminal.resize(1, 1)
    time.sleep(1)
    terminal.resize(80, 24)
    terminal.wait("step")
    generation, where = run.snapshot().generation, run.snapshot().step
    terminal.kill()
    after = run.wait_step(where + 20)
    assert (after.state, after.generation) == ("training", generation), "killing the terminal did not touch the run"


@pytest.mark.soak
def test_a_terminal_that_does_not_read_holds_nobody_up(run: Run, data: Path, environment: dict[str, str]) -> None:
    import pty

    run.start(recipe_text(data, steps=20_000))
    run.wait_step(5)
    master, slave = pty.openpty()
    screen = subprocess.Popen(
        [MIDWATCH, "attach", str(run.root)],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**environment, "TERM": "xterm-256color", "LANG": "C.UTF-8"},
        start_new_session=True,
    )
    os.close(slave)
    try:
        time.sleep(6)  # nobody reads the terminal: its buffer is full and the screen stands still
        before = run.snapshot().step
        time.sleep(3)
        assert run.snapshot().step > before
        began = time.monotonic()
        run.done("pause")
        assert time.monotonic() - began < 5, "another client is served at once"
    finally:
        screen.kill()
        screen.wait()
        os.close(master)
